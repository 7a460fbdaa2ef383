"""Versioned push of the trained weights into the rollout engine, compared by digest afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from spear_fast.errors import EngineError
from spear_fast.rollout.engine import Engine
from spear_fast.weights_digest import Digests

from .buckets import weight_buckets


class _Stream:
    """Hands whole parameters to the engine one by one and keeps account of them."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], dtype: torch.dtype, bucket_bytes: int, digests: Digests | None
    ) -> None:
        self.bytes = 0
        self.buckets = 0
        self.gather_s = 0.0
        self.digest_s = 0.0
        self._buckets = weight_buckets(named, dtype, bucket_bytes)
        self._dtype = dtype
        self._digests = digests
        self._items = self._generate()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._items

    def drain(self) -> int:
        """Go through what the engine left, because the other ranks gather it too; return how much that was."""
        return sum(1 for _ in self._items)

    def metrics(self, pushed_s: float, verify_s: float) -> dict[str, float]:
        """Metrics of a push that took `pushed_s` seconds, and `verify_s` more to look at the engine.

        `sync/bytes` in the engine's type; `sync/buckets`, pieces handed over; `sync/gather_s`, `sync/copy_s`,
        `sync/verify_s` and their sum as `sync/gib_per_s`.
        """
        return {
            "sync/bytes": float(self.bytes),
            "sync/buckets": float(self.buckets),
            "sync/gather_s": self.gather_s,
            "sync/copy_s": pushed_s - self.gather_s - self.digest_s,
            "sync/verify_s": self.digest_s + verify_s,
            "sync/gib_per_s": self.bytes / 2**30 / (pushed_s + verify_s),
        }

    def _generate(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            started = perf_counter()
            bucket = next(self._buckets, None)
            self.gather_s += perf_counter() - started
            if bucket is None:
                return
            self.buckets += 1
            self._account(bucket)
            yield from bucket

    def _account(self, bucket: list[tuple[str, Tensor]]) -> None:
        started = perf_counter()
        for name, tensor in bucket:
            self.bytes += tensor.numel() * self._dtype.itemsize
            if self._digests is not None:
                self._digests.add(name, tensor.to(self._dtype))
        if self._digests is not None and bucket[0][1].is_cuda:
            torch.cuda.current_stream().synchronize()
        self.digest_s += perf_counter() - started


@torch.no_grad()
def push_weights(
    named: Iterable[tuple[str, Tensor]],
    engine: Engine,
    version: int,
    *,
    dtype: torch.dtype,
    bucket_bytes: int,
    verify: bool,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Copy all parameters into the engine of every rank and make sure that it will sample from them.

    Collective if torch.distributed is initialised: all ranks raise if the engine of one fails.

    Args:
        named: All parameters under their Hugging Face names, a tied head left out; plain tensors or FSDP2 shards.
        engine: This rank's engine; none of its requests may be running.
        version: Training steps done.
        dtype: Type of the engine's weights; shards are cast to it before they are gathered.
        bucket_bytes: Most bytes gathered at once.
        verify: Compare digests of what was pushed with digests of what the engine holds.
        group: Ranks that raise together; None takes the default group.

    Returns:
        `sync/version` in training steps, and `_Stream.metrics`; with `verify`, `sync/unverified`, parameters whose
        values this engine cannot tell.

    Raises:
        EngineError: The engine failed, did not take the version, or holds other values than were pushed.
    """
    digests = Digests() if verify else None
    stream = _Stream(named, dtype, bucket_bytes, digests)
    failure: Exception | None = None
    unverified = 0
    started = perf_counter()
    try:
        engine.load_weights(stream, version)
    except Exception as error:  # the other ranks must hear of it, whatever it is
        failure = error
    left = stream.drain()
    pushed_s = perf_counter() - started
    try:
        if failure is None:
            _check_taken(engine, version, left)
            unverified = 0 if digests is None else _compare(digests.result(), engine.weights_digest(), version)
    except Exception as error:  # as above
        failure = error
    metrics = stream.metrics(pushed_s, perf_counter() - started - pushed_s) | {"sync/version": float(version)}
    _raise_together(failure, group)
    return metrics | ({"sync/unverified": float(unverified)} if verify else {})


def _check_taken(engine: Engine, version: int, left: int) -> None:
    if left:
        raise EngineError(f"the engine left {left} of the pushed parameters unread; it would sample from stale weights")
    if engine.weights_version != version:
        raise EngineError(
            f"the engine reports weights version {engine.weights_version} after version {version} was pushed; "
            "it would sample from stale weights"
        )


def _compare(pushed: dict[str, int], held: dict[str, int], version: int) -> int:
    """Raise EngineError where the engine differs; return how many parameters it cannot tell the values of."""
    differing = [name for name, value in pushed.items() if held.get(name, value) != value]
    if differing:
        raise EngineError(
            f"after the push of version {version} the engine's values of {_first(differing)} are not the trainer's "
            f"({len(differing)} of {len(pushed)} parameters); it would sample from stale or wrong weights"
        )
    values = set(pushed.values())
    strangers = [name for name, value in held.items() if name not in pushed and value not in values]
    if strangers:
        raise EngineError(
            f"after the push of version {version} the engine's {_first(strangers)} equals nothing that was pushed; "
            "a tied head must equal its embedding"
        )
    told = len(pushed.keys() & held.keys())
    if pushed and not told:
        raise EngineError(
            "the engine tells no digest of its weights, so they cannot be verified; set engine.verify_weights=never"
        )
    return len(pushed) - told


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _raise_together(failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise this rank's failure, or tell of another's: a rank that went on alone would wait for the others forever."""
    texts: list[str | None] = []
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        texts = [None] * dist.get_world_size(group)
        dist.all_gather_object(texts, None if failure is None else f"{type(failure).__name__}: {failure}", group=group)
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise EngineError(f"the engine of rank {rank} failed to take weights: {text}")
