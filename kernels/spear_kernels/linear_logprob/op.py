"""`linear_logprob`: log-probability and entropy from hidden states, without holding the logits of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from spear_kernels.backend import resolve_backend
from spear_kernels.checks import compute_dtype, require_ids, require_shape
from spear_kernels.linear_logprob.head import Head, check_head, chunk_budget
from spear_kernels.linear_logprob.plan import RowPlan
from spear_kernels.linear_logprob.rows import HeadRows, take_coefficients
from spear_kernels.linear_logprob.sums import GradientSums, Wanted
from spear_kernels.logprob.rows import RowStatistics
from spear_kernels.logprob.scaling import Scaling
from spear_kernels.results import LogProbs
from spear_kernels.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor? mask, Tensor? temperature, "
    "float temperature_value, float softcap, int vocab_size, str group, int vocab_offset, "
    "bool even_shards, int chunk_bytes, str backend"
)
"""What every operator on a head begins with; from `temperature` on these are its `Settings`."""
NUM_HEAD_ARGUMENTS = HEAD_SCHEMA.count(",") + 1
Settings = tuple[torch.Tensor | None, float, float, int, str, int, bool, int, str]


def head_settings(scaling: Scaling, shard: VocabShard, chunk_bytes: int, backend: str) -> Settings:
    """The settings as an operator takes them."""
    return *scaling.numbers, shard.group, shard.offset, shard.even, chunk_bytes, backend


def head_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    settings: Settings,
    plan: RowPlan,
) -> HeadRows:
    """The rows that `plan` lets in, in front of this shard's head."""
    temperature, temperature_value, softcap, vocab_size, group, vocab_offset, even, chunk_bytes, backend = settings
    shard = VocabShard(group, vocab_offset, even)
    scaling = Scaling(temperature, temperature_value, softcap, vocab_size)
    head = Head.of(hidden, weight, bias, vocab_size, shard.widest(len(weight)))
    rows = HeadRows(hidden.detach(), shard.local_ids(ids), head, scaling, shard, backend, chunk_bytes)
    rows = rows.take(plan.index) if plan.unknown is None else rows.neutral(plan.unknown)
    if shard.is_whole:
        require_ids(rows.ids, vocab_size)
    return rows


def filled(gradients: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients as an operator returns them, [0] for those not wanted."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.custom_op(
    "spear_kernels::linear_statistics",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, bool keep_logits) -> (Tensor, Tensor, Tensor, Tensor)",
)
def linear_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp [N], entropy [N], statistics [4, N], and the raw logits of the rows that entered, or of none of them."""
    *settings, keep_logits = rest
    plan = RowPlan.of(mask, None, len(ids), hidden.device)
    rows = head_rows(hidden, weight, bias, ids, tuple(settings), plan)
    logits = rows.head.buffer(len(rows) if keep_logits else 0)
    table = plan.spread(rows.statistics(logits if keep_logits else None))
    return table[0].clone(), table[1].clone(), table, logits


@linear_statistics.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, *rest: Any) -> Any:
    # Logits are never kept in a compiled graph, where the number of rows that enter would be unknown.
    num_rows, dtype = ids.shape[0], compute_dtype(hidden, weight)
    vectors = hidden.new_empty(num_rows, dtype=dtype), hidden.new_empty(num_rows, dtype=dtype)
    return *vectors, hidden.new_empty(4, num_rows, dtype=dtype), hidden.new_empty(0, rest[4], dtype=dtype)


@torch.library.custom_op(
    "spear_kernels::linear_gradient",
    mutates_args=(),
    schema=f"({HEAD_SCHEMA}, Tensor saved, Tensor d_logp, Tensor? d_entropy, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor)",
)
def linear_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """Gradients of sum(d_logp * logp + d_entropy * entropy) in hidden, weight (float32) and bias; [0]: not wanted."""
    *settings, saved, d_logp, d_entropy, wanted = rest
    gradients = _gradients((hidden, weight, bias, ids, mask), tuple(settings), saved, d_logp, d_entropy, wanted, None)
    return filled(gradients, hidden)


@linear_gradient.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, ...]:
    return fake_gradients(hidden, weight, rest[-1])


def fake_gradients(hidden: torch.Tensor, weight: torch.Tensor, wanted: Wanted) -> tuple[torch.Tensor, ...]:
    """Tensors of the shapes and types that `filled` returns."""
    dtype = compute_dtype(hidden, weight)
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=dtype) if wanted[1] else hidden.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=dtype) if wanted[2] else hidden.new_empty(0),
    )


def _gradients(
    tensors: tuple[Any, ...],
    settings: Settings,
    saved: torch.Tensor,
    d_logp: torch.Tensor,
    d_entropy: torch.Tensor | None,
    wanted: Wanted,
    logits: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients in hidden, weight and bias, from kept raw `logits`, which are destroyed, or by computing them again."""
    hidden, weight, bias, ids, mask = tensors
    plan = RowPlan.of(mask, None, len(ids), hidden.device)
    rows = head_rows(hidden, weight, bias, ids, settings, plan)
    if plan.unknown is not None:
        d_logp = torch.where(plan.unknown, d_logp, 0)
        d_entropy = None if d_entropy is None else torch.where(plan.unknown, d_entropy, 0)
    sums = GradientSums.zeros(rows.head, rows.hidden, weight, rows.shard, wanted)
    stats = RowStatistics.of(saved)
    coefficients = take_coefficients((d_logp, d_entropy), plan.index)
    rows.add_gradients(sums, stats if plan.index is None else stats.rows(plan.index), coefficients, logits)
    d_hidden, d_weight, d_bias = sums.finish(hidden, rows.shard)
    return None if d_hidden is None else plan.spread(d_hidden, dim=0), d_weight, d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, ids, mask, temperature, *settings, keep_logits = inputs
    ctx.save_for_backward(hidden, weight, bias, ids, mask, temperature, output[2])
    ctx.settings, ctx.kept_logits = tuple(settings), [output[3]] if keep_logits else []
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_logp is None and d_entropy is None:
        return (None,) * (NUM_HEAD_ARGUMENTS + 1)
    *tensors, temperature, saved = ctx.saved_tensors
    d_logp = torch.zeros_like(saved[0]) if d_logp is None else d_logp
    settings, wanted = (temperature, *ctx.settings), ctx.needs_input_grad[:3]
    if ctx.kept_logits:
        # The gradient overwrites the logits; a second backward computes them again.
        gradients = _gradients(tuple(tensors), settings, saved, d_logp, d_entropy, wanted, ctx.kept_logits.pop())
    else:
        gradients = linear_gradient(*tensors, *settings, saved, d_logp, d_entropy, wanted)
    return *gradients_of_type(gradients, tensors, wanted), *(None,) * (NUM_HEAD_ARGUMENTS - 2)


def gradients_of_type(
    gradients: tuple[torch.Tensor | None, ...], inputs: Sequence[torch.Tensor | None], wanted: Wanted
) -> tuple[torch.Tensor | None, ...]:
    """Gradients rounded to the types of `inputs`; None where not wanted."""
    return tuple(
        gradient.to(tensor.dtype) if want and gradient is not None and tensor is not None else None
        for gradient, tensor, want in zip(gradients, inputs, wanted, strict=False)
    )


linear_statistics.register_autograd(_backward, setup_context=_setup_context)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_offset: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of `ids` and entropy under softmax(softcap * tanh(raw / softcap) / temperature), in nats.

    raw = hidden @ weight.T + bias with hidden [N, H], weight [V, H], bias [V], any float type; ids int64 [N];
    temperature a number or [N]; softcap None for none; rows of weight from `vocab_size` on are padding. Returns logp
    and entropy [N], float32 (float64 if an input is float64), differentiable in hidden, weight and bias. Rows where
    mask bool [N] is False may hold anything and give 0; a mask on the CPU keeps them out of every product, one on a
    device lets them pass as zeros, since the host does not wait for it.

    At most `chunk_bytes` of logits exist (None: 1 GiB, on the CPU 64 MiB). If all rows fit in, the forward keeps them
    and the whole costs 6 NVH FLOPs; else the backward computes them again, 8 NVH. On the CPU, rows without a gradient
    cost the forward alone. A frozen weight saves 2 NVH. Logits and the sum of the weight gradient are float32 (float64)
    whatever the inputs are.

    Vocabulary-parallel: with `group`, weight and bias are this rank's rows of the head, by default V = vocabulary /
    ranks of them in the order of ranks, else those from `vocab_offset` on; hidden, ids and the results are the same on
    all ranks, and the gradient of hidden is summed over them. One all-gather of [4, N], one all-reduce of [N, H].

    Raises:
        ValueError: wrong shape, an argument out of range (ids are looked at on the CPU only), or a backend that cannot
            run here.
    """
    check_head(hidden, weight, bias, ids)
    require_shape("mask", mask, (len(hidden),))
    shard = VocabShard.of(group, vocab_offset, len(weight))
    dtype = compute_dtype(hidden, weight)
    scaling = Scaling.of(temperature, softcap, vocab_size, len(hidden), len(weight), dtype, shard)
    budget, chosen = chunk_budget(chunk_bytes, hidden.device), resolve_backend(backend, hidden, weight)
    keep = _keeps_logits(hidden, weight, bias, scaling.vocab_size, budget)
    settings = head_settings(scaling, shard, budget, chosen)
    mask = None if mask is None else mask.bool()
    logp, entropy, _, _ = linear_statistics(hidden, weight, bias, ids.long(), mask, *settings, keep)
    return LogProbs(logp, entropy)


def _keeps_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int, budget: int
) -> bool:
    """Whether the logits of all rows wait for the backward: if one comes and they fit."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if not any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)):
        return False
    return len(Head.of(hidden, weight, bias, width, len(weight)).chunks(0, len(hidden), budget)) <= 1
