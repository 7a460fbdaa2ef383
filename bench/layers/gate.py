"""Whether a contender computes what it should: its loss, log-probs and gradients against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from bench.layers.contenders import Outcome, token_losses
from bench.layers.problems import Head, Problem, Shape, make_problem

# Aligned to 128, as real heads are, so that operators take the path that is measured.
GATE_SIZES = (256, 1152)
GATE_ROWS, GATE_ACTIVE, GATE_LIVE = 512, 0.7, 0.5
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Largest relative error of loss and gradients: at real sizes half-precision logits alone cost a few hundredths."""
IN_NATS = ("logp_p99", "logp_max", "entropy_p99")
# Log-ratios on each side of both clip bounds and of the dual clip, far from where rounding would change the side.
LOG_RATIOS = (-0.5, -0.1, 0.0, 0.1, 0.5, 2.6)


@dataclass(frozen=True)
class Truth:
    """In float64, for some action rows: log-probs, their part of the loss, and the gradients of that part."""

    picked: torch.Tensor  # int64 [n], places among the action rows
    rows: torch.Tensor  # int64 [n], the same as rows of the batch
    logp: torch.Tensor  # [n]
    entropy: torch.Tensor  # [n]
    loss: torch.Tensor  # 0-d
    scale: torch.Tensor  # 0-d, what an error of the loss is measured by: the loss with all terms positive
    d_inputs: torch.Tensor  # [n, H] or [n, V]
    d_weight: torch.Tensor | None  # [V, H]

    @property
    def is_whole(self) -> bool:
        """Whether it covers every action row, so that loss and weight gradient can be compared."""
        return self.d_weight is not None


def gate_problem(dtype: torch.dtype, device: torch.device, level: str = "hidden", seed: int = 0) -> Problem:
    """A problem small enough for float64, with masked rows, rows without advantage, and every bound in force."""
    problem = make_problem(Shape(Head(*GATE_SIZES, dtype), GATE_ROWS, GATE_ACTIVE, GATE_LIVE), device, seed, level)
    log_ratios = torch.tensor(LOG_RATIOS, device=device).repeat(GATE_ROWS)[: problem.num_active]
    old_logp = problem.old_logp.index_copy(
        0, problem.rows, truth_of(problem, "cross_entropy").logp.float() - log_ratios
    )
    return replace(problem, old_logp=old_logp)


def truth_of(problem: Problem, objective: str, max_rows: int | None = None) -> Truth:
    """The definition in float64 on all action rows, or on `max_rows` of them at equal distances."""
    distance = math.ceil(problem.num_active / max_rows) if max_rows else 1
    whole = distance == 1
    picked = torch.arange(0, problem.num_active, distance, device=problem.ids.device)
    rows = problem.rows[picked]
    inputs = problem.row_inputs.detach()[rows].double().requires_grad_()
    with_weight = problem.logits is None
    weight = problem.weight.detach().double().requires_grad_(whole and with_weight)
    logits = inputs @ weight.t() if with_weight else inputs
    logp = logits.gather(1, problem.ids[rows][:, None])[:, 0] - logits.logsumexp(1)
    losses = token_losses(objective, logp, problem.old_logp[rows].double(), problem.advantages[rows].double())
    loss = losses.sum() / problem.num_active
    loss.backward()
    assert inputs.grad is not None
    scale = losses.detach().abs().sum() / problem.num_active
    d_weight = weight.grad if with_weight else torch.empty(0, dtype=torch.float64, device=inputs.device)
    log_probs = torch.log_softmax(logits.detach(), 1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    return Truth(picked, rows, logp.detach(), entropy, loss.detach(), scale, inputs.grad, d_weight if whole else None)


def errors_of(outcome: Outcome, problem: Problem, truth: Truth) -> dict[str, float]:
    """Errors of a step whose gradients are in `problem`'s leaves; log-probs in nats, all else relative.

    `logp_p99`, `logp_max`, `entropy_p99`: absent if the contender returns none. `gradient`: of the rows' inputs. Where
    the truth is whole also `loss`, `weight_gradient`, and `gradient` covers the rows that must stay zero.
    """
    errors = {}

    def distances(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        of_all_rows = len(actual) == problem.shape.num_rows
        return (actual[truth.rows if of_all_rows else truth.picked].double() - expected).abs()

    if outcome.logp is not None:
        distance = distances(outcome.logp, truth.logp)
        errors |= {"logp_p99": distance.quantile(0.99).item(), "logp_max": distance.max().item()}
    if outcome.entropy is not None:
        errors["entropy_p99"] = distances(outcome.entropy, truth.entropy).quantile(0.99).item()
    gradient = problem.row_inputs.grad
    assert outcome.loss is not None and gradient is not None, "the step left no gradient"
    if truth.is_whole:
        expected = torch.zeros_like(gradient, dtype=torch.float64).index_copy_(0, truth.rows, truth.d_inputs)
        errors["loss"] = ((outcome.loss.detach().double() - truth.loss).abs() / truth.scale).item()
        errors["gradient"] = relative_distance(gradient, expected)
        if problem.logits is None:
            assert problem.weight.grad is not None and truth.d_weight is not None
            errors["weight_gradient"] = relative_distance(problem.weight.grad, truth.d_weight)
    else:
        errors["gradient"] = relative_distance(gradient[truth.rows], truth.d_inputs)
    return errors


def relative_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def complaint(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """Why a contender with these errors gets no speed figure, or None if it is right; NaN is never right."""
    bound = TOLERANCE[dtype]
    wrong = {name: value for name, value in errors.items() if name not in IN_NATS and not value <= bound}
    if not wrong:
        return None
    return ", ".join(f"{name} off by {value:.2g}" for name, value in wrong.items()) + f", allowed {bound:g}"
