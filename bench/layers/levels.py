"""All levels of the kernel benchmark by name."""

from __future__ import annotations

from bench.layers.batch_level import BatchLevel
from bench.layers.head_levels import HeadLevel
from bench.layers.level import Level
from bench.layers.policy_level import CovLevel, PolicyLevel

LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        HeadLevel("logits"),
        HeadLevel("hidden-logprob"),
        HeadLevel("hidden"),
        PolicyLevel(),
        CovLevel(),
        BatchLevel(),
    )
}
