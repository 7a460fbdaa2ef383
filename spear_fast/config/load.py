"""From a YAML file and overrides to a checked RunConfig, and back to YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spear_fast.errors import ConfigError

from .files import read_settings
from .merge import merge
from .overrides import parse_overrides
from .presets import PRESETS
from .problems import describe_problems
from .schema import RunConfig
from .yaml_text import dump


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the checked configuration of a run.

    Later sources win: schema defaults, the preset named by `algo.preset`, `base` (nested settings), the YAML file (on
    top of the files its key `base` names), `overrides` (`key=value`, values in YAML). The preset is the one left after
    all sources are merged, so `algo.preset=grpo` replaces the file's, while the file's explicit `algo` keys stay in
    force. `path` None means no file.

    Raises ConfigError if the file cannot be read, or listing every unknown key (with the nearest valid one), wrong
    type and failed check.
    """
    settings = merge(base or {}, read_settings(Path(path)) if path is not None else {})
    settings = _with_preset(merge(settings, parse_overrides(overrides)))
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        problems = describe_problems(error)
    source = str(path) if path is not None else "the configuration"
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))


def dump_config(config: RunConfig) -> str:
    """Return the fully resolved configuration as YAML, every option written out and `algo.preset` kept.

    `load_config` reads it back to an equal object. Since each option then stands in the file, overriding
    `algo.preset` of a dumped file changes the name only.
    """
    return dump(config.model_dump())


def _with_preset(settings: dict[str, Any]) -> dict[str, Any]:
    algo = settings.get("algo")
    preset = algo.get("preset") if isinstance(algo, Mapping) else None
    if not isinstance(preset, str) or preset not in PRESETS:
        # None needs nothing; a wrong name is reported by the schema with all other problems.
        return settings
    return {**settings, "algo": merge(PRESETS[preset], algo or {})}
