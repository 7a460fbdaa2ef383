"""Launches the row kernels of `logprob`: statistics of rows of logits, and their gradient."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from triton.compiler import max_shared_mem

from spear_kernels.logprob.kernel import row_gradient_kernel, row_reduce_kernel
from spear_kernels.tile import SHARED_BYTES, VECTOR_BYTES, RowLaunch, row_launch


@lru_cache
def shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on a device; for the CPU, which interprets kernels, any number."""
    return max_shared_mem(device.index) if device.type == "cuda" else SHARED_BYTES


def vector(values: torch.Tensor | None) -> torch.Tensor | None:
    """Per-row values [n] that a kernel may address by row number, in float32; None stays None."""
    return None if values is None else values.to(torch.float32).contiguous()


def aligned(*matrices: torch.Tensor | None) -> bool:
    """Whether every row of the matrices [n, V] starts at a multiple of 16 bytes."""
    return all(
        matrix.data_ptr() % VECTOR_BYTES == 0 and matrix.stride(0) * matrix.element_size() % VECTOR_BYTES == 0
        for matrix in matrices
        if matrix is not None
    )


def check_rows(name: str, matrix: torch.Tensor, vocab_size: int) -> None:
    """Check a matrix [n, >= vocab_size] of rows that are contiguous in memory.

    Raises:
        ValueError: the shape, type or stride of the argument `name`, or vocab_size, is not supported.
    """
    if matrix.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}, expected [rows, vocabulary]; reshape it")
    if matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} has dtype {matrix.dtype}; the kernels take float32, bfloat16 and float16")
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(f"{name} has strides {matrix.stride()}, the second must be 1; call .contiguous()")
    if not 1 <= vocab_size <= matrix.shape[1]:
        raise ValueError(f"vocab_size={vocab_size} must be between 1 and the {matrix.shape[1]} columns of {name}")


def check_out(logits: torch.Tensor, out: torch.Tensor, vocab_size: int) -> None:
    """Check a result matrix for the gradient of `logits`: the same shape, and the same memory or none of it.

    Raises:
        ValueError: as `check_rows`, shapes that differ, or memory that overlaps in another layout, where a block of the
            result would overwrite logits that are still to be read.
    """
    check_rows("out", out, vocab_size)
    if out.shape != logits.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the logits {tuple(logits.shape)}; they must agree")
    in_place = (out.data_ptr(), out.dtype, out.stride(0)) == (logits.data_ptr(), logits.dtype, logits.stride(0))
    if not in_place and _spans_overlap(logits, out):
        raise ValueError("out overlaps the memory of logits in another layout; pass logits itself or separate memory")


def _spans_overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the address ranges of two matrices with unit column stride share a byte."""

    def span(matrix: torch.Tensor) -> tuple[int, int]:
        elements = (matrix.shape[0] - 1) * matrix.stride(0) + matrix.shape[1] if matrix.numel() else 0
        return matrix.data_ptr(), matrix.data_ptr() + elements * matrix.element_size()

    (left_start, left_end), (right_start, right_end) = span(left), span(right)
    return left_start < right_end and right_start < left_end


def launch_rows(kernel: Any, logits: torch.Tensor, config: RowLaunch, *args: Any, **constants: Any) -> None:
    """Run a row kernel, whose first argument is `logits` [n, V], with one program for each row; nothing for no row."""
    if len(logits):
        with torch.cuda.device_of(logits):
            kernel[(len(logits),)](logits, *args, **constants, **config.options)


def _reduce(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    partials: bool,
) -> torch.Tensor:
    check_rows("logits", logits, vocab_size)
    out = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    launch_rows(
        row_reduce_kernel,
        logits,
        row_launch(vocab_size, logits.element_size(), shared_bytes=shared_bytes(logits.device)),
        ids.contiguous(),
        vector(temperature),
        out,
        float(temperature_value),
        float(softcap),
        len(logits),
        logits.stride(0),
        vocab_size,
        PARTIALS=partials,
        HAS_SOFTCAP=softcap != 0,
        ALIGNED=aligned(logits),
    )
    return out


def row_partials(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
) -> torch.Tensor:
    """Softmax sums of one shard of the vocabulary, to be joined with those of the others: float32 [4, n].

    With z = logits / T after the soft-cap: peak = max z, total = sum exp(z - peak), weighted = sum exp(z - peak) (z -
    peak), target = z[id]. logits [n, >= vocab_size] float32, bfloat16 or float16, read once; columns from vocab_size on
    are padding. ids int64 [n]; one outside [0, vocab_size) has target -inf. temperature float32 [n], or None for
    `temperature_value` in all rows; softcap 0 for none. A row of -inf alone has peak -inf and sums 0.

    Raises:
        ValueError: a matrix whose columns are not adjacent in memory, another dtype, or a vocab_size out of range.
    """
    return _reduce(logits, ids, temperature, temperature_value, softcap, vocab_size, partials=True)


def row_statistics(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
) -> torch.Tensor:
    """logp, entropy, peak and log total of rows of logits, float32 [4, n]; arguments and errors as `row_partials`.

    logp = target - peak - log total; entropy = log total - weighted / total; both in nats. A row of -inf alone has logp
    -inf and entropy 0.
    """
    return _reduce(logits, ids, temperature, temperature_value, softcap, vocab_size, partials=False)


def row_gradient(
    logits: torch.Tensor,
    ids: torch.Tensor,
    entropy: torch.Tensor,
    peak: torch.Tensor,
    log_total: torch.Tensor,
    d_logp: torch.Tensor,
    d_entropy: torch.Tensor | None,
    temperature: torch.Tensor | None,
    temperature_value: float,
    softcap: float,
    vocab_size: int,
    out: torch.Tensor,
) -> None:
    """Write the gradient of sum(d_logp * logp + d_entropy * entropy) with respect to the raw logits to `out` [n, V].

    entropy, peak, log_total float32 [n] as from `row_statistics` (of the whole vocabulary, if this is a shard); d_logp
    and d_entropy float32 [n]. `out` is `logits` itself or separate memory, in any of the types of logits. Padding
    gets 0; rows whose coefficients are 0 are not read. The other arguments as `row_partials`.

    Raises:
        ValueError: as `row_partials`, or an `out` of another shape or in partly the same memory.
    """
    check_rows("logits", logits, vocab_size)
    check_out(logits, out, vocab_size)
    launch_rows(
        row_gradient_kernel,
        logits,
        row_launch(vocab_size, logits.element_size(), shared_bytes=shared_bytes(logits.device)),
        ids.contiguous(),
        vector(temperature),
        vector(entropy),
        vector(peak),
        vector(log_total),
        vector(d_logp),
        vector(d_entropy),
        out,
        float(temperature_value),
        float(softcap),
        logits.stride(0),
        out.stride(0),
        vocab_size,
        logits.shape[1],
        HAS_SOFTCAP=softcap != 0,
        ALIGNED=aligned(logits, out),
    )
