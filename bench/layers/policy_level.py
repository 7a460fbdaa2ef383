"""Levels that begin at log-probs: the policy losses, and the choice of tokens by covariance."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.layers.contenders import Contender, Outcome, compiled, naive_compiled
from bench.layers.gate import relative_distance
from bench.layers.level import Case, CopyFloor
from bench.layers.policy_peers import PEERS, verl_contender
from bench.layers.policy_problems import (
    CONFIGS,
    TokenProblem,
    chosen,
    gate_token_problem,
    make_token_problem,
    plain_loss,
)
from spear_kernels import covariance_select, policy_loss
from spear_kernels.policy_loss.reference import policy_loss_reference


class LossTruth(NamedTuple):
    """In float64: the loss, its gradient [N], the chosen tokens, and the mean of |A|, which errors are measured by."""

    loss: torch.Tensor
    gradient: torch.Tensor
    choice: torch.Tensor | None
    scale: torch.Tensor


class _FromLogProbs:
    """What both levels share: their problems, their truth, and that memory traffic is their floor."""

    is_short = True

    def problem(self, case: Case, device: torch.device, seed: int) -> TokenProblem:
        """Inputs of a batch."""
        return make_token_problem(case.shape, case.variant, device, seed)

    def gate_problem(self, case: Case, device: torch.device, seed: int) -> TokenProblem:
        """Small inputs with every bound in force and no draw."""
        return gate_token_problem(case.variant, case.shape, device, seed)

    def truth(self, problem: TokenProblem, objective: str, max_rows: int | None) -> LossTruth | None:
        """The definition, one sequence at a time; None where it hangs on a draw, or on ties of rounded covariances."""
        by_covariance = problem.cfg.uses_covariance
        if by_covariance and max_rows is not None:
            return None
        logp = problem.logp.detach().double().requires_grad_()
        choice = chosen(problem, logp.detach()) if by_covariance else None
        batch = (problem.old_logp.double(), problem.advantages.double(), problem.mask, problem.cfg, problem.seq_ids)
        loss = policy_loss_reference(logp, *batch, selected=choice)
        loss.backward()
        assert logp.grad is not None
        scale = (problem.advantages.double().abs() * problem.mask).sum() / problem.num_active
        return LossTruth(loss.detach(), logp.grad, choice, scale)

    def least_work(self, contender: Contender, problem: TokenProblem, backward: bool) -> tuple[int, int]:
        """Traffic on the per-token inputs and the gradient."""
        return 0, problem.least_bytes(backward)


class PolicyLevel(_FromLogProbs):
    """ "policy": losses of log-probs, forward and gradient."""

    name = "policy"
    variants = tuple(CONFIGS)
    has_backward = True

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """A copy, plain torch, ours and the peers'."""
        levels = (self.name,)
        return (
            Contender("copy", "a copy of as many bytes as the loss moves at least", CopyFloor, "floor", levels=levels),
            Contender("naive", "the loss in plain torch, autograd", lambda device: _naive, levels=levels),
            naive_compiled(compiled(_naive), levels=levels),
            Contender("policy_loss", "loss and metrics as tensors", lambda device: _own_loss, levels=levels),
            *PEERS,
        )

    def errors(self, outcome: Outcome, problem: TokenProblem, truth: LossTruth) -> dict[str, float]:
        """Relative errors of the loss and of the gradient in the leaf."""
        assert outcome.loss is not None and problem.logp.grad is not None, "the step left no gradient"
        return {
            "loss": ((outcome.loss.detach().double() - truth.loss).abs() / truth.scale).item(),
            "gradient": relative_distance(problem.logp.grad, truth.gradient),
        }


class CovLevel(_FromLogProbs):
    """ "cov": which tokens Clip-Cov or KL-Cov acts on, from log-probs, no gradient."""

    name = "cov"
    variants = ("clip_cov", "kl_cov")
    has_backward = False

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """A copy, plain torch, ours and verl's loss, in which its choice is made."""
        levels = (self.name,)
        return (
            Contender("copy", "a copy of as many bytes as are read at least", CopyFloor, "floor", levels=levels),
            Contender("naive", "nonzero and randperm, or topk, in plain torch", lambda device: _choose, levels=levels),
            naive_compiled(compiled(_choose), levels=levels),
            Contender(
                "covariance_select",
                "a draw that neither cut nor order of the batch changes",
                lambda device: _own_choice,
                levels=levels,
            ),
            verl_contender(self.name, "the whole of compute_policy_loss_*, in which its choice is made, no gradient"),
        )

    def errors(self, outcome: Outcome, problem: TokenProblem, truth: LossTruth) -> dict[str, float]:
        """`choice`: tokens chosen differently as a share of the chosen; of a whole loss its relative error."""
        if not outcome.values:
            assert outcome.loss is not None
            return {"loss": ((outcome.loss.double() - truth.loss).abs() / truth.scale).item()}
        assert truth.choice is not None
        wrong = (outcome.values[0] != truth.choice).sum()
        return {"choice": (wrong / truth.choice.sum().clamp(min=1)).item()}


def _naive(problem: TokenProblem) -> Outcome:
    return Outcome(plain_loss(problem))


def _choose(problem: TokenProblem) -> Outcome:
    return Outcome(None, values=(chosen(problem, problem.logp.detach()),))


def _own_loss(problem: TokenProblem) -> Outcome:
    cfg = problem.cfg
    # As with the others, sequences are named only where the loss needs them.
    named = cfg.per_sequence or cfg.uses_covariance
    result = policy_loss(
        problem.logp,
        problem.old_logp,
        problem.advantages,
        problem.mask,
        cfg,
        problem.seq_ids if named else None,
        positions=problem.positions if named else None,
        num_tokens=problem.num_active,
        num_seqs=problem.shape.num_seqs,
    )
    return Outcome(result.loss)


def _own_choice(problem: TokenProblem) -> Outcome:
    inputs = (problem.logp.detach(), problem.old_logp, problem.advantages, problem.mask, problem.cfg, problem.seq_ids)
    return Outcome(None, values=(covariance_select(*inputs, positions=problem.positions),))
