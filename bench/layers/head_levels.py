"""Levels that begin at hidden states or logits: log-probs, and the whole loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.layers.contenders import OWN, Contender, Outcome
from bench.layers.gate import Truth, errors_of, gate_problem, truth_of
from bench.layers.level import Case
from bench.layers.peers import PEERS
from bench.layers.problems import (
    Problem,
    forward_bytes,
    logits_bytes,
    loss_bytes,
    loss_flops,
    make_problem,
    product_flops,
)


@dataclass(frozen=True)
class HeadLevel:
    """ "hidden" (PPO loss), "hidden-logprob" (log-probs and entropy, loss -A logp) or "logits" (PPO loss)."""

    name: str
    variants: tuple[str, ...] = ("",)
    has_backward: bool = True
    is_short: bool = False

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """Those of this level, the floor first."""
        return tuple(one for one in (*OWN, *PEERS) if self.name in one.levels)

    def problem(self, case: Case, device: torch.device, seed: int) -> Problem:
        """Inputs that look like a language model's."""
        return make_problem(case.shape, device, seed, self.name)

    def gate_problem(self, case: Case, device: torch.device, seed: int) -> Problem:
        """A small head with every bound in force."""
        return gate_problem(case.shape.head.dtype, device, self.name, seed)

    def truth(self, problem: Problem, objective: str, max_rows: int | None) -> Truth:
        """Log-probs, loss and gradients of all or of `max_rows` action rows."""
        return truth_of(problem, problem.objective if objective == "loss" else objective, max_rows)

    def errors(self, outcome: Outcome, problem: Problem, truth: Truth) -> dict[str, float]:
        """See `bench.layers.gate.errors_of`."""
        return errors_of(outcome, problem, truth)

    def least_work(self, contender: Contender, problem: Problem, backward: bool) -> tuple[int, int]:
        """Products and traffic of a loss that keeps logits on the chip; from logits the traffic on them."""
        shape, num_active, num_live = problem.shape, problem.num_active, problem.num_live
        if contender.name == "copy":
            return 0, 2 * logits_bytes(shape.num_rows, shape.head, backward=False)
        if problem.logits is not None:
            return 0, logits_bytes(shape.num_rows, shape.head, backward)
        if contender.name == "floor_dense":
            num_active = num_live = shape.num_rows
        elif contender.objective == "cross_entropy":
            num_live = num_active
        if not backward:
            return product_flops(num_active, shape.head), forward_bytes(num_active, shape.head)
        return loss_flops(num_active, num_live, shape.head), loss_bytes(num_active, num_live, shape.head)
