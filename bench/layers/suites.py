"""Which cases the kernel benchmark measures: named suites as data, and cases from single options."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.layers.level import Case
from bench.layers.levels import LEVELS
from bench.layers.problems import HEADS, NO_HEAD, Shape

QWEN = ("qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-32b")
ACTIVE_SHARES, LIVE_SHARES = (1.0, 0.7, 0.3), (1.0, 0.5, 0.1)
BATCH_SEQS = 512
"""Sequences of a packed batch; the levels with a head take the 64 of `Shape`."""


@dataclass(frozen=True)
class Block:
    """Cases of one level: every head with every number of tokens, and for each every pair of shares."""

    level: str
    heads: tuple[str, ...] = ("",)
    tokens: tuple[int, ...] = (65536,)
    active: tuple[float, ...] = (1.0,)
    live: tuple[float, ...] = (1.0,)
    variants: tuple[str, ...] = ()
    """Empty for all of the level."""

    def cases(self, dtype: torch.dtype | None = None) -> list[Case]:
        """In order, with heads in `dtype` instead of their own."""
        return [
            Case(self.level, _shape(self.level, head, count, active, live, dtype), variant)
            for head in self.heads
            for count in self.tokens
            for active in self.active
            for live in self.live
            for variant in self.variants or LEVELS[self.level].variants
        ]


def _shape(level: str, name: str, tokens: int, active: float, live: float, dtype: torch.dtype | None) -> Shape:
    if level == "batch":
        return Shape(NO_HEAD, tokens, active, live, num_seqs=BATCH_SEQS)
    head = HEADS[name] if name else NO_HEAD
    return Shape(replace(head, dtype=dtype) if dtype and name else head, tokens, active, live)


_PACKED = (Block("policy"), Block("cov"), Block("batch", tokens=(131072,)))
_CUDA_SHARES = (Block("hidden", QWEN, (8192,), ACTIVE_SHARES, LIVE_SHARES),)
_CUDA_TOKENS = (Block("hidden", QWEN, (4096, 16384, 1024, 65536)),)
_CUDA_LOGPROB = (
    Block("hidden-logprob", QWEN, (8192, 1024, 16384)),
    Block("hidden-logprob", QWEN, (8192,), (0.7,), (0.5,)),
    Block("hidden-logprob", QWEN, (8192,), (0.3,), (0.1,)),
)
_CUDA_LOGITS = (Block("logits", QWEN, (8192, 1024, 4096)),)
_CUDA_PACKED = (
    Block("policy", tokens=(65536, 1 << 20)),
    Block("cov", tokens=(65536, 1 << 20)),
    Block("batch", tokens=(131072, 1 << 20)),
)

SUITES: dict[str, tuple[Block, ...]] = {
    "cpu": (
        Block("hidden", ("cpu-small",), (256, 512, 1024)),
        Block("hidden", ("cpu-small",), (1024,), (0.7,), (0.5,)),
        Block("hidden", ("cpu-small",), (1024,), (0.3,), (0.1,)),
        Block("hidden-logprob", ("cpu-small",), (256, 1024)),
        Block("hidden-logprob", ("cpu-small",), (1024,), (0.3,), (0.1,)),
        Block("logits", ("cpu-small",), (256, 1024)),
        *_PACKED,
    ),
    "tiny": (
        Block("hidden", ("tiny",), (256,), (0.5,)),
        Block("hidden-logprob", ("tiny",), (256,)),
        Block("logits", ("tiny",), (256,)),
        Block("policy", tokens=(1024,)),
        Block("cov", tokens=(1024,)),
        Block("batch", tokens=(4096,)),
    ),
    "cuda-shares": _CUDA_SHARES,
    "cuda-tokens": _CUDA_TOKENS,
    "cuda-logprob": _CUDA_LOGPROB,
    "cuda-logits": _CUDA_LOGITS,
    "cuda-packed": _CUDA_PACKED,
    "cuda": (*_CUDA_SHARES, *_CUDA_TOKENS, *_CUDA_LOGPROB, *_CUDA_LOGITS, *_CUDA_PACKED),
}
"""By name. "tiny" says whether everything runs; those of CUDA go from what is asked first to what is asked last."""
