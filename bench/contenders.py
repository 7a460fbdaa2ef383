"""What is measured: the products alone, plain torch, and the operators of spear_kernels, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.problems import Problem, row_chunks
from spear_kernels import PolicyLossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss

CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 10.0
CONFIG = PolicyLossConfig("ppo", clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=DUAL_CLIP)
FLOOR_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class Outcome(NamedTuple):
    """Of one forward pass: a 0-d loss to differentiate, and log-probs of all rows or of the action rows."""

    loss: torch.Tensor | None
    logp: torch.Tensor | None = None


Step = Callable[[Problem], Outcome]


@dataclass(frozen=True)
class Contender:
    """Something to measure. `build` imports what it needs, ImportError meaning that it is not installed."""

    name: str
    computes: str
    build: Callable[[torch.device], Step]
    objective: str = "ppo"
    """What its loss must equal: "ppo", "cross_entropy", or "products" for no loss at all."""
    package: str | None = None
    install: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    level: str = "hidden"


def clipped_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Per-token PPO loss with separate bounds and dual clip, in the type of logp [n]."""
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * DUAL_CLIP), loss)


def loss_of_all(logp: torch.Tensor, problem: Problem) -> Outcome:
    """The mean loss over action tokens from log-probs [N] of all rows."""
    losses = clipped_loss(logp.float(), problem.old_logp, problem.advantages)
    return Outcome((losses * problem.mask).sum() / problem.num_active, logp.detach())


class Actions(NamedTuple):
    """The per-token inputs of the action rows, in order."""

    inputs: torch.Tensor
    ids: torch.Tensor
    old_logp: torch.Tensor
    advantages: torch.Tensor


def actions_of(problem: Problem) -> Actions:
    """Gather the action rows; without a copy when all rows are."""
    given = Actions(problem.row_inputs, problem.ids, problem.old_logp, problem.advantages)
    if problem.num_active == problem.shape.num_rows:
        return given
    return Actions(*(tensor.index_select(0, problem.rows) for tensor in given))


def loss_of_actions(logp: torch.Tensor, actions: Actions, problem: Problem) -> Outcome:
    """The mean loss from log-probs of the action rows."""
    losses = clipped_loss(logp.float(), actions.old_logp, actions.advantages)
    return Outcome(losses.sum() / problem.num_active, logp.detach())


def _floor(skip_rows: bool) -> Callable[[torch.device], Step]:
    def build(device: torch.device) -> Step:
        buffers: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}

        def step(problem: Problem) -> Outcome:
            x = (actions_of(problem).inputs if skip_rows else problem.hidden).detach()
            weight, live_share = problem.weight.detach(), problem.num_live / problem.num_active if skip_rows else 1.0
            key = (*x.shape, *weight.shape)
            if key not in buffers:
                buffers.clear()
                rows = max(1, FLOOR_CHUNK_BYTES[device.type] // (len(weight) * x.element_size()))
                buffers[key] = (x.new_empty(min(rows, len(x)), len(weight)), x.clone(), weight.clone())
            _products(x, weight, live_share, *buffers[key])
            return Outcome(None)

        return step

    return build


def _products(
    x: torch.Tensor,
    weight: torch.Tensor,
    live_share: float,
    buffer: torch.Tensor,
    d_hidden: torch.Tensor,
    d_weight: torch.Tensor,
) -> None:
    """Logits of x [n, H] chunk by chunk, and for a share of each chunk the two products of its gradient."""
    d_weight.zero_()
    for rows in row_chunks(len(x), len(weight), buffer.numel()):
        logits = buffer[: rows.stop - rows.start]
        torch.mm(x[rows], weight.t(), out=logits)
        live = slice(rows.start, rows.start + round(live_share * len(logits)))
        d_logits = logits[: live.stop - live.start]
        torch.mm(d_logits, weight, out=d_hidden[live])
        d_weight.addmm_(d_logits.t(), x[live])


def _copy(device: torch.device) -> Step:
    targets: dict[torch.Size, torch.Tensor] = {}

    def step(problem: Problem) -> Outcome:
        assert problem.logits is not None
        logits = problem.logits.detach()
        if logits.shape not in targets:
            targets.clear()
            targets[logits.shape] = torch.empty_like(logits)
        targets[logits.shape].copy_(logits)
        return Outcome(None)

    return step


def naive(problem: Problem) -> Outcome:
    """Full logits, float32 log-softmax, autograd."""
    logits = problem.hidden @ problem.weight.t() if problem.logits is None else problem.logits
    log_probs = torch.log_softmax(logits.float(), dim=1)
    return loss_of_all(log_probs.gather(1, problem.ids[:, None])[:, 0], problem)


def _one_shot(problem: Problem) -> Outcome:
    return _fused_loss(problem, problem.host_advantages, problem.host_mask)


def _one_shot_on_device(problem: Problem) -> Outcome:
    return _fused_loss(problem, problem.advantages, problem.mask)


def _fused_loss(problem: Problem, advantages: torch.Tensor, mask: torch.Tensor) -> Outcome:
    inputs = (problem.hidden, problem.weight, problem.ids, problem.old_logp)
    result = linear_policy_loss(*inputs, advantages, mask, CONFIG, num_tokens=problem.num_active)
    return Outcome(result.loss, result.logp)


def _recompute(problem: Problem) -> Outcome:
    hidden, ids, old_logp, advantages = actions_of(problem)
    logp = linear_logprob(hidden, problem.weight, ids).logp
    mask = torch.ones_like(ids, dtype=torch.bool)
    result = policy_loss(logp, old_logp, advantages, mask, CONFIG, num_tokens=problem.num_active)
    return Outcome(result.loss, logp.detach())


def _from_logits(problem: Problem) -> Outcome:
    assert problem.logits is not None
    logp = logprob(problem.logits, problem.ids).logp
    batch = (problem.old_logp, problem.advantages, problem.mask)
    result = policy_loss(logp, *batch, CONFIG, num_tokens=problem.num_active)
    return Outcome(result.loss, logp.detach())


OWN = (
    Contender(
        "floor",
        "the matrix products that no loss can avoid: logits of action rows, gradients of live rows",
        _floor(skip_rows=True),
        "products",
    ),
    Contender("floor_dense", "three matrix products of every row", _floor(skip_rows=False), "products"),
    Contender("naive", "PPO loss, full logits, float32 log-softmax, autograd; every row", lambda device: naive),
    Contender(
        "naive_compiled",
        "the same under torch.compile",
        lambda device: torch.compile(naive, dynamic=False),
        devices=("cuda",),
    ),
    Contender(
        "linear_policy_loss",
        "PPO loss, metrics, entropy; advantages and mask on the host, as a trainer has them",
        lambda device: _one_shot,
    ),
    Contender(
        "linear_policy_loss_on_device",
        "the same with advantages and mask on the device, which the host does not wait for",
        lambda device: _one_shot_on_device,
        devices=("cuda",),
    ),
    Contender(
        "linear_logprob",
        "linear_logprob + policy_loss: PPO loss, metrics, entropy, logits recomputed; action rows gathered first",
        lambda device: _recompute,
    ),
    Contender("copy", "a copy of the logits: one read, one write", _copy, "products", level="logits"),
    Contender("naive", "PPO loss of float32 log-softmax, autograd", lambda device: naive, level="logits"),
    Contender("logprob", "logprob + policy_loss: PPO loss and entropy", lambda device: _from_logits, level="logits"),
)
