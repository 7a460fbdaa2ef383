"""The level of packed batches: advantages, returns, recalibration, statistics and the repetition filter."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.layers.batch_problems import EPSILON, GAMMA, GROUP, NAIVE, NGRAM, OWN, BatchProblem, Operation, make_batch
from bench.layers.contenders import Contender, Outcome, Step, compiled, naive_compiled
from bench.layers.gate import relative_distance
from bench.layers.level import Case, CopyFloor
from bench.layers.measure import Prepared
from bench.layers.peers import TRL
from bench.layers.problems import NO_HEAD, Shape
from bench.layers.verl_alone import VERL, import_verl
from spear_kernels.discounted_return.reference import discounted_returns_reference
from spear_kernels.group_advantage.reference import group_advantages_reference
from spear_kernels.recalibrate.reference import recalibrated_advantages_reference
from spear_kernels.repetition.reference import max_ngram_counts_reference
from spear_kernels.segment_reduce.reference import segment_stats_reference
from spear_kernels.spans.reference import span_index_reference, spread_reference
from spear_kernels.step_advantage.reference import step_advantages_reference

TRL_EPSILON = 1e-4
GATE_SHAPE = Shape(NO_HEAD, num_rows=2048, active=0.7, num_seqs=32)


class BatchLevel:
    """ "batch": operators without gradient."""

    name = "batch"
    variants = tuple(OWN)
    has_backward = False
    is_short = True

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """A copy, plain torch, ours and the peers', which have GRPO's advantages only."""
        levels, traced = (self.name,), tuple(name for name in NAIVE if name != "repetition")
        return (
            Contender("copy", "a copy of as many bytes as are moved at least", CopyFloor, "floor", levels=levels),
            Contender("naive", "plain torch; repetition in plain Python", _step_of(NAIVE), levels=levels),
            naive_compiled(lambda device: compiled(_step_of(NAIVE)(device))(device), levels=levels, variants=traced),
            Contender("spear_kernels", "computed in float64", _step_of(OWN), levels=levels),
            *PEERS,
        )

    def problem(self, case: Case, device: torch.device, seed: int) -> BatchProblem:
        """Inputs of a batch."""
        return make_batch(case.shape, case.variant, device, seed)

    def gate_problem(self, case: Case, device: torch.device, seed: int) -> BatchProblem:
        """Few enough for the definitions, which compare every row with every other."""
        return make_batch(GATE_SHAPE, case.variant, device, seed)

    def truth(self, problem: BatchProblem, objective: str, max_rows: int | None) -> tuple[torch.Tensor, ...] | None:
        """The definitions in float64; none at the measured size, where they take too long."""
        if max_rows is not None:
            return None
        results = _by_definition(problem, TRL_EPSILON if objective == "trl" else EPSILON)
        return tuple(torch.as_tensor(result).double().to(problem.device) for result in results)

    def errors(self, outcome: Outcome, problem: BatchProblem, truth: tuple[torch.Tensor, ...]) -> dict[str, float]:
        """`values`: the largest relative distance of a result."""
        pairs = zip(outcome.values, truth, strict=True)
        # Statistics by label: one per label here, one per row there, zero behind the last label.
        return {"values": max(relative_distance(actual, expected[: len(actual)]) for actual, expected in pairs)}

    def least_work(self, contender: Contender, problem: BatchProblem, backward: bool) -> tuple[int, int]:
        """Traffic on inputs and results."""
        return 0, problem.least_bytes(backward)


def _step_of(operations: dict[str, Operation]) -> Any:
    def build(device: torch.device) -> Step:
        def step(problem: BatchProblem) -> Outcome:
            return Outcome(None, values=operations[problem.operator](problem.tensors, problem.shape))

        return step

    return build


def _by_definition(problem: BatchProblem, epsilon: float) -> tuple[Any, ...]:
    """The result in float64 from the definitions of each operator; `epsilon` of grpo's standard deviation."""
    t = {name: tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()
         for name, tensor in problem.tensors.items()}  # fmt: skip
    shape = problem.shape
    if problem.operator == "grpo":
        advantages = group_advantages_reference(t["rewards"], t["groups"], std_norm=True)
        if epsilon != EPSILON:
            std = segment_stats_reference(t["rewards"], t["groups"]).std[t["groups"]]
            advantages = advantages * (std + EPSILON) / (std + epsilon)
        spans = span_index_reference(t["starts"], t["starts"] + shape.seq_len, shape.num_rows)
        return (spread_reference(advantages, spans, t["mask"]),)
    if problem.operator == "segment_stats":
        stats = segment_stats_reference(t["values"], t["labels"])
        return stats.mean, stats.std, stats.deviation
    if problem.operator == "repetition":
        return (max_ngram_counts_reference(t["ids"], t["seqs"], NGRAM, num_seqs=shape.num_seqs),)
    if problem.operator == "recalibrate":
        return recalibrated_advantages_reference(t["values"], t["means"], t["stds"], t["stored"])
    if problem.operator == "discounted_returns":
        return (discounted_returns_reference(t["values"], t["episodes"], GAMMA),)
    function, labels = {
        "group_advantages": (group_advantages_reference, "groups"),
        "step_advantages": (step_advantages_reference, "anchors"),
    }[problem.operator]
    return (function(t["values"], t[labels], std_norm=True),)


def _verl_grpo(name: str) -> Any:
    def build(device: torch.device) -> Step:
        function = getattr(import_verl("verl.trainer.ppo.core_algos"), name)

        def make(problem: BatchProblem) -> Any:
            return problem.tensors["groups"].cpu().numpy()  # Its trainer keeps labels in a numpy array.

        def step(problem: BatchProblem, groups: Any) -> Outcome:
            t, shape = problem.tensors, problem.shape
            mask = t["mask"].view(shape.num_seqs, shape.seq_len)
            advantages, _ = function(t["token_rewards"], mask, groups, EPSILON)
            return Outcome(None, values=(advantages.view(-1),))

        return Prepared(make, step)

    return build


def _trl_grpo(device: torch.device) -> Step:
    nanstd = importlib.import_module("trl.trainer.utils").nanstd

    def step(problem: BatchProblem) -> Outcome:
        t, shape = problem.tensors, problem.shape
        by_group = t["rewards"].view(-1, GROUP)
        advantages = t["rewards"] - by_group.nanmean(1).repeat_interleave(GROUP)
        advantages = advantages / (nanstd(by_group, dim=1).repeat_interleave(GROUP) + TRL_EPSILON)
        on_tokens = advantages.nan_to_num(nan=0.0)[:, None] * t["mask"].view(shape.num_seqs, shape.seq_len)
        return Outcome(None, values=(on_tokens.view(-1),))

    return step


def _verl(name: str, function: str) -> Contender:
    return Contender(
        name, f"{function} on padded rows", _verl_grpo(function), package="verl", install=VERL, levels=("batch",),
        variants=("grpo",),
    )  # fmt: skip


PEERS = (
    _verl("verl", "compute_grpo_outcome_advantage"),
    _verl("verl_vectorized", "compute_grpo_vectorized_outcome_advantage"),
    Contender(
        "trl",
        "its trainer's formula, written with its nanstd since it has no function of its own; groups in order",
        _trl_grpo,
        "trl",
        package="trl",
        install=TRL,
        levels=("batch",),
        variants=("grpo",),
    ),
)
