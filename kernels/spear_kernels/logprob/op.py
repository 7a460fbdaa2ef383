"""`logprob`: log-probability and entropy from logits, differentiable, without a float32 copy of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spear_kernels.autocast import without_autocast
from spear_kernels.backend import resolve_backend
from spear_kernels.checks import (
    compute_dtype,
    integers,
    refuse_second_derivatives,
    require_ids,
    require_matrix,
    require_shape,
)
from spear_kernels.logprob.matrix import partials_table, statistics_table, write_gradient
from spear_kernels.logprob.rows import RowStatistics, combine
from spear_kernels.logprob.scaling import Scaling
from spear_kernels.results import LogProbs
from spear_kernels.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Saved = torch.Tensor
"""Statistics [4, N] kept from the forward for the backward."""

_SCALING = "Tensor? temperature, float temperature_value, float softcap, int vocab_size"
_WHERE = "str group, int vocab_offset, int even_ranks, str backend"


@torch.library.custom_op(
    "spear_kernels::logits_statistics",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor ids, {_SCALING}, {_WHERE}, bool overwrite) -> (Tensor, Tensor, Tensor)",
)
@without_autocast
def _statistics(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    group: str,
    vocab_offset: int,
    even_ranks: int,
    backend: str,
    overwrite: bool,
) -> tuple[torch.Tensor, torch.Tensor, Saved]:
    """logp and entropy [N], and the statistics [4, N]; `overwrite` is read by the backward only."""
    shard = VocabShard(group, vocab_offset, even_ranks)
    scaling = Scaling(temperature, temperature_value, softcap, vocab_size)
    require_ids(ids, shard.total(vocab_size, logits.shape[1]))
    scaling.check(None)
    if shard.is_whole:
        table = statistics_table(logits, ids, scaling, backend)
    else:
        partials = partials_table(logits, shard.local_ids(ids), scaling, backend)
        table = combine(shard.gather(partials[None]))
    return table[0].clone(), table[1].clone(), table


@_statistics.register_fake
def _(logits: torch.Tensor, ids: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, Saved]:
    # len() would turn the number of rows into a constant of the graph.
    num_rows, dtype = logits.shape[0], compute_dtype(logits)
    vectors = logits.new_empty(num_rows, dtype=dtype), logits.new_empty(num_rows, dtype=dtype)
    return *vectors, logits.new_empty(4, num_rows, dtype=dtype)


_GRADIENT = f"Tensor ids, Tensor saved, Tensor d_logp, Tensor? d_entropy, {_SCALING}, str backend"


@torch.library.custom_op(
    "spear_kernels::logits_gradient", mutates_args=(), schema=f"(Tensor logits, {_GRADIENT}) -> Tensor"
)
@without_autocast
def _gradient(
    logits: torch.Tensor,
    ids: torch.Tensor,
    saved: Saved,
    d_logp: torch.Tensor,
    d_entropy: torch.Tensor | None,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> torch.Tensor:
    """Gradient [N, V] of sum(d_logp * logp + d_entropy * entropy) in raw logits."""
    scaling, out = Scaling(temperature, temperature_value, softcap, vocab_size), torch.empty_like(logits)
    write_gradient(out, logits, ids, RowStatistics.of(saved), (d_logp, d_entropy), scaling, backend)
    return out


@_gradient.register_fake
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op(
    "spear_kernels::logits_gradient_", mutates_args=("logits",), schema=f"(Tensor(a!) logits, {_GRADIENT}) -> ()"
)
@without_autocast
def _gradient_(
    logits: torch.Tensor,
    ids: torch.Tensor,
    saved: Saved,
    d_logp: torch.Tensor,
    d_entropy: torch.Tensor | None,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> None:
    """`_gradient` written over the logits."""
    scaling = Scaling(temperature, temperature_value, softcap, vocab_size)
    write_gradient(logits, logits, ids, RowStatistics.of(saved), (d_logp, d_entropy), scaling, backend)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, ids, temperature, *numbers, group, vocab_offset, _, backend, overwrite = inputs
    ctx.save_for_backward(logits, VocabShard(group, vocab_offset).local_ids(ids), output[2], temperature)
    ctx.numbers, ctx.backend, ctx.overwrite = numbers, backend, overwrite
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_logp: torch.Tensor | None, d_entropy: torch.Tensor | None, _: None) -> tuple[Any, ...]:
    if d_logp is None and d_entropy is None:
        return (None,) * 11
    refuse_second_derivatives("logprob")
    logits, ids, saved, temperature = ctx.saved_tensors
    d_logp = torch.zeros_like(saved[0]) if d_logp is None else d_logp
    arguments = (ids, saved, d_logp, d_entropy, temperature, *ctx.numbers, ctx.backend)
    if not ctx.overwrite:
        return _gradient(logits, *arguments), *(None,) * 10
    logits = logits.detach()
    _gradient_(logits, *arguments)
    return logits, *(None,) * 10


_statistics.register_autograd(_backward, setup_context=_setup_context)


def logprob(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    *,
    softcap: float | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_offset: int | None = None,
    backend: str = "auto",
) -> LogProbs:
    """Log-probability of `ids` and entropy of softmax(softcap * tanh(logits / softcap) / temperature), in nats.

    logits [N, V] float16, bfloat16, float32 or float64, may hold -inf; ids int64 [N], 0 <= id < vocab_size; temperature
    a number or [N]; softcap None for none; columns from `vocab_size` on are padding without probability. Returns logp
    and entropy [N], float32 (float64 for float64 logits), differentiable in `logits`: with p the probabilities, the
    gradient is a p - b onehot + g p (log p + entropy), a = b = -d_logp and g = -d_entropy, times dz/dlogits. Each row
    is read once per direction; working memory beyond the gradient is a tile of rows, never [N, V].

    `inplace_backward` writes the gradient over `logits`, whose values are lost to every other use; a second backward
    then raises autograd's error about a modified tensor. Compiled graphs ignore it, since they reuse memory themselves.

    Vocabulary-parallel: with `group`, logits are this rank's columns, by default V = vocabulary / ranks of them in the
    order of ranks, else those from `vocab_offset` on; ids and vocab_size count globally, and all ranks get the same
    result at the cost of one all-gather of [4, N].

    Raises:
        ValueError: wrong shape, an argument out of range (ids are looked at on the CPU only), or a backend that cannot
            run here.
    """
    require_matrix("logits", logits)
    require_shape("ids", ids, (len(logits),))
    width, shard = logits.shape[1], VocabShard.of(group, vocab_offset, logits.shape[1])
    scaling = Scaling.of(temperature, softcap, vocab_size, logits, width, compute_dtype(logits), shard)
    # Rows that share memory, as expanded ones do, cannot each hold a gradient.
    apart = logits.stride(0) != 0 or logits.shape[0] <= 1
    overwrite = inplace_backward and apart and not torch.compiler.is_compiling()
    chosen = resolve_backend(backend, logits)
    ids = integers(ids, logits.device)
    logp, entropy, _ = _statistics(
        logits, ids, *scaling.numbers, shard.group, shard.offset, shard.even_ranks, chosen, overwrite
    )
    return LogProbs(logp, entropy)
