"""What is measured from hidden states or logits: the products alone, plain torch, and this project's operators."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from bench.layers.problems import Problem, row_chunks
from spear_kernels import PolicyLossConfig, linear_logprob, linear_policy_loss, logprob, policy_loss

CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 10.0
CONFIG = PolicyLossConfig("ppo", clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=DUAL_CLIP)
FLOOR_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class Inputs(Protocol):
    """What a step is given, whatever the level: tensors that want a gradient, and copies to take turns with."""

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        ...

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The tensors that want a gradient."""
        ...

    @property
    def rotating_bytes(self) -> int:
        """Size of what `rotated` copies."""
        ...

    def rotated(self, num_copies: int) -> Sequence[Any]:
        """These inputs and copies of them."""
        ...


class Outcome(NamedTuple):
    """Of one forward pass; log-probs and entropies are those of all rows or of the action rows."""

    loss: torch.Tensor | None
    """0-d, to differentiate; None where nothing is."""
    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    values: tuple[torch.Tensor, ...] = ()
    """Results of an operator that has no gradient."""


Step = Callable[[Any], Outcome]


@dataclass(frozen=True)
class Contender:
    """Something to measure. `build` imports what it needs, ImportError meaning that it is not installed."""

    name: str
    computes: str
    build: Callable[[torch.device], Step]
    objective: str = "loss"
    """What it must equal: the "loss" of the level, another name that the level knows, or "floor" for no result."""
    package: str | None = None
    install: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    levels: tuple[str, ...] = ("hidden",)
    variants: tuple[str, ...] = ()
    """Kinds of loss or operators that it has; empty for all of its level."""
    compiled: bool = False
    """Whether its first call at a size compiles, which no figure should hold."""


# One per kind of loss, size and grad mode; a step beyond the limit would go on uncompiled without a word.
RECOMPILE_LIMIT = 64
COMPILER = "install a C++ compiler, g++ say, or set CXX"


def compiled(function: Step) -> Callable[[torch.device], Step]:
    """Builder of `function` under torch.compile: for each shape on CUDA, one graph for all shapes on the CPU.

    Its ImportError says that there is no C++ compiler, without which torch.compile has no backend on the CPU.
    """

    def build(device: torch.device) -> Step:
        names = (os.environ.get("CXX", ""), "g++", "clang++")
        if device.type == "cpu" and not any(shutil.which(name) for name in names if name):
            raise ImportError(
                "torch.compile needs a C++ compiler on the CPU, and neither CXX, g++ nor clang++ is there"
            )
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(function, dynamic=device.type == "cpu")

    return build


def naive_compiled(
    build: Callable[[torch.device], Step], levels: tuple[str, ...] = ("hidden",), variants: tuple[str, ...] = ()
) -> Contender:
    """The row of a level's plain torch under torch.compile; `build` is what `compiled` makes of it."""
    return Contender(
        "naive_compiled",
        "the same under torch.compile",
        build,
        install=COMPILER,
        levels=levels,
        variants=variants,
        compiled=True,
    )


def clipped_loss(logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Per-token PPO loss with separate bounds and dual clip, in the type of logp [n]."""
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * DUAL_CLIP), loss)


def token_losses(objective: str, logp: torch.Tensor, old_logp: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Per-token "ppo" loss, "reinforce" loss -A logp, or "cross_entropy" -logp, in the type of logp [n]."""
    if objective == "ppo":
        return clipped_loss(logp, old_logp, advantages)
    return -advantages * logp if objective == "reinforce" else -logp


def loss_of_all(logp: torch.Tensor, problem: Problem, entropy: torch.Tensor | None = None) -> Outcome:
    """The mean loss over action tokens from log-probs [N] of all rows; `entropy` [N] is passed on."""
    losses = token_losses(problem.objective, logp.float(), problem.old_logp, problem.advantages)
    return Outcome((losses * problem.mask).sum() / problem.count, logp.detach(), entropy)


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


def loss_of_actions(
    logp: torch.Tensor, actions: Actions, problem: Problem, entropy: torch.Tensor | None = None
) -> Outcome:
    """The mean loss from log-probs of the action rows; `entropy` of these is passed on."""
    losses = token_losses(problem.objective, logp.float(), actions.old_logp, actions.advantages)
    return Outcome(losses.sum() / problem.count, logp.detach(), entropy)


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
    """Logits of x [n, H] chunk by chunk, and with gradients on the two products of a share of each chunk."""
    if torch.is_grad_enabled():
        d_weight.zero_()
    for rows in row_chunks(len(x), len(weight), buffer.numel()):
        logits = buffer[: rows.stop - rows.start]
        torch.mm(x[rows], weight.t(), out=logits)
        if not torch.is_grad_enabled():
            continue
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


def _log_probs(problem: Problem) -> torch.Tensor:
    logits = problem.hidden @ problem.weight.t() if problem.logits is None else problem.logits
    return torch.log_softmax(logits.float(), dim=1)


def naive(problem: Problem) -> Outcome:
    """Full logits, float32 log-softmax, autograd."""
    return loss_of_all(_log_probs(problem).gather(1, problem.ids[:, None])[:, 0], problem)


def naive_with_entropy(problem: Problem) -> Outcome:
    """The same with the entropy, which is not differentiated."""
    log_probs = _log_probs(problem)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(1)
    return loss_of_all(log_probs.gather(1, problem.ids[:, None])[:, 0], problem, entropy)


def _one_shot(problem: Problem) -> Outcome:
    return _fused_loss(problem, problem.host_advantages, problem.host_mask)


def _one_shot_on_device(problem: Problem) -> Outcome:
    return _fused_loss(problem, problem.advantages, problem.mask)


def _fused_loss(problem: Problem, advantages: torch.Tensor, mask: torch.Tensor) -> Outcome:
    inputs = (problem.hidden, problem.weight, problem.ids, problem.old_logp)
    result = linear_policy_loss(*inputs, advantages, mask, CONFIG, num_tokens=problem.num_active)
    return Outcome(result.loss, result.logp, result.entropy)


def _recompute(problem: Problem) -> Outcome:
    hidden, ids, old_logp, advantages = actions_of(problem)
    out = linear_logprob(hidden, problem.weight, ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    result = policy_loss(out.logp, old_logp, advantages, mask, CONFIG, num_tokens=problem.num_active)
    return Outcome(result.loss, out.logp.detach(), out.entropy.detach())


def _linear_logprob(problem: Problem) -> Outcome:
    actions = actions_of(problem)
    out = linear_logprob(actions.inputs, problem.weight, actions.ids)
    return loss_of_actions(out.logp, actions, problem, out.entropy.detach())


def _linear_logprob_masked(problem: Problem) -> Outcome:
    out = linear_logprob(problem.hidden, problem.weight, problem.ids, mask=problem.mask)
    return loss_of_all(out.logp, problem, out.entropy.detach())


def _from_logits(problem: Problem) -> Outcome:
    assert problem.logits is not None
    out = logprob(problem.logits, problem.ids)
    batch = (problem.old_logp, problem.advantages, problem.mask)
    result = policy_loss(out.logp, *batch, CONFIG, num_tokens=problem.num_active)
    return Outcome(result.loss, out.logp.detach(), out.entropy.detach())


HEAD_LEVELS = ("hidden", "hidden-logprob")
OWN = (
    Contender(
        "floor",
        "the matrix products that no loss can avoid: logits of action rows, gradients of live rows",
        _floor(skip_rows=True),
        "floor",
        levels=HEAD_LEVELS,
    ),
    Contender("floor_dense", "three matrix products of every row", _floor(skip_rows=False), "floor"),
    Contender(
        "naive",
        "full logits, float32 log-softmax, autograd; every row",
        lambda device: naive,
    ),
    naive_compiled(compiled(naive)),
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
        "linear_logprob + policy_loss: PPO loss, metrics, entropy; action rows gathered first",
        lambda device: _recompute,
    ),
    Contender(
        "naive",
        "full logits, float32 log-softmax, entropy, autograd; every row",
        lambda device: naive_with_entropy,
        levels=("hidden-logprob",),
    ),
    naive_compiled(compiled(naive_with_entropy), levels=("hidden-logprob",)),
    Contender(
        "linear_logprob",
        "log-probs and entropy; action rows gathered first",
        lambda device: _linear_logprob,
        levels=("hidden-logprob",),
    ),
    Contender(
        "linear_logprob_mask",
        "the same given every row and the mask",
        lambda device: _linear_logprob_masked,
        levels=("hidden-logprob",),
    ),
    Contender("copy", "a copy of the logits: one read, one write", _copy, "floor", levels=("logits",)),
    Contender("naive", "PPO loss of float32 log-softmax, autograd", lambda device: naive, levels=("logits",)),
    naive_compiled(compiled(naive), levels=("logits",)),
    Contender(
        "logprob", "logprob + policy_loss: PPO loss and entropy", lambda device: _from_logits, levels=("logits",)
    ),
)
