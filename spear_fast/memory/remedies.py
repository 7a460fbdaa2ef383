"""What to change when a memory plan does not fit: settings in the order of what they cost, each tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from spear_fast.config.schema import RunConfig

MOST_RANKS = 1024
"""Ranks up to which more of them are proposed."""

Fits = Callable[[RunConfig, int], bool]


def remedies(config: RunConfig, num_ranks: int, phase: str, fits: Fits, *, on_cpu: bool = False) -> list[str]:
    """Return one line for each setting that lowers the need of a phase, the cheapest first.

    `fits(config, num_ranks)` tells whether a plan fits; a line says whether its change is enough alone. On the CPU
    there is no other memory to move to.
    """
    lines = []
    for text, changed, ranks in _changes(config, num_ranks, phase, fits, on_cpu):
        lines.append(f"{text} ({'enough alone' if fits(changed, ranks) else 'not enough alone'})")
    return lines


def _changes(
    config: RunConfig, num_ranks: int, phase: str, fits: Fits, on_cpu: bool
) -> Iterator[tuple[str, RunConfig, int]]:
    """(what to set, the changed configuration, ranks)."""
    parallel, rollout = config.parallel, config.rollout
    if config.memory.mode not in ("auto", "offload"):
        yield "memory.mode=auto", _with(config, "memory", mode="auto"), num_ranks
    if phase != "update":
        if config.engine.name == "hf":
            yield from _halved(config, num_ranks, "rollout", "max_concurrent", 1, fits)
        if config.engine.kv_cache_mib is not None:
            yield "engine.kv_cache_mib=null", _with(config, "engine", kv_cache_mib=None), num_ranks
    else:
        if parallel.reduce_gradients == "step":
            changed = _with(config, "parallel", reduce_gradients="micro_batch")
            yield "parallel.reduce_gradients=micro_batch", changed, num_ranks
        if not parallel.activation_checkpointing:
            changed = _with(config, "parallel", activation_checkpointing=True)
            yield "parallel.activation_checkpointing=true", changed, num_ranks
        yield from _halved(config, num_ranks, "update", "token_budget", rollout.max_tokens, fits)
        if not parallel.reshard_after_forward:
            changed = _with(config, "parallel", reshard_after_forward=True)
            yield "parallel.reshard_after_forward=true", changed, num_ranks
    if parallel.replicate > 1:
        yield "parallel.replicate=1", _with(config, "parallel", replicate=1), num_ranks
    if not on_cpu:
        ranks = next((n for n in _doubled(num_ranks) if fits(config, n)), num_ranks * 2)
        yield f"more GPUs: {ranks} ranks", config, ranks
    if not on_cpu and not parallel.cpu_offload:
        yield "parallel.cpu_offload=true", _with(config, "parallel", cpu_offload=True), num_ranks
    if not config.model.lora.rank:
        lora = config.model.lora.model_copy(update={"rank": 32})
        yield "model.lora.rank=32", _with(config, "model", lora=lora), num_ranks


def _halved(
    config: RunConfig, num_ranks: int, section: str, key: str, least: int, fits: Fits
) -> Iterator[tuple[str, RunConfig, int]]:
    """The greatest of the value's halves that fits, not below `least`; `least` itself if none does."""
    value = getattr(getattr(config, section), key)
    if value <= least:
        return
    while value > least:
        value = max(least, value // 2)
        changed = _with(config, section, **{key: value})
        if fits(changed, num_ranks):
            break
    yield f"{section}.{key}={value}", _with(config, section, **{key: value}), num_ranks


def _doubled(num_ranks: int) -> Iterator[int]:
    while (num_ranks := num_ranks * 2) <= MOST_RANKS:
        yield num_ranks


def _with(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
