"""The folder of a run: where things lie in it, and who may write there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_fast.checkpoint.layout import checkpoints_folder, is_complete, newest_first
from spear_fast.config.load import dump_config, load_config
from spear_fast.config.schema import RunConfig
from spear_fast.errors import CheckpointError, ConfigError

CHANGEABLE = (
    *("name", "out", "steps", "device", "eval", "checkpoint", "log"),
    *("engine", "parallel", "memory", "model.attention", "model.liger", "model.compile"),
)
"""Keys, with all below them, that a resumed run may change: none of them alters what a step computes but by rounding.

A run can so go on with other ranks, another engine or less memory.
"""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `<out>/<name>`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def start_model(self) -> Path:
        """The policy before its first training step, as a Hugging Face folder."""
        return self.path / "start_model"

    @property
    def nonfinite(self) -> Path:
        """Rows whose loss or gradient was not finite."""
        return self.path / "nonfinite"

    @property
    def curves(self) -> Path:
        """The picture drawn at the end."""
        return self.path / "curves.png"

    def save_config(self, config: RunConfig) -> None:
        """Write the resolved configuration; a crash leaves the old or the new one."""
        aside = self.config.with_suffix(".new")
        aside.write_text(dump_config(config), encoding="utf-8")
        aside.replace(self.config)


def open_new(config: RunConfig) -> RunFolder:
    """Create the folder of a new run and save its configuration there.

    Raises:
        ConfigError: The folder already holds a run.
    """
    folder = RunFolder(Path(config.out) / config.name)
    if any(is_complete(path) for path in newest_first(checkpoints_folder(folder.path))):
        raise ConfigError(
            f"name={config.name!r}: {folder.path} already holds a run; continue it with --resume, choose another "
            f"name=..., or delete the folder"
        )
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.save_config(config)
    return folder


def open_existing(config: RunConfig) -> RunFolder:
    """Return the folder of a run to resume.

    Raises:
        CheckpointError: There is no such run, or a setting changed that alters what is computed.
    """
    folder = RunFolder(Path(config.out) / config.name)
    if not folder.config.exists():
        raise CheckpointError(
            f"--resume: {folder.path} holds no run; start it without --resume, or correct name and out"
        )
    saved = load_config(folder.config)
    changed = [key for key in _differences(saved.model_dump(), config.model_dump()) if not _may_change(key)]
    if changed:
        raise CheckpointError(
            f"--resume: {', '.join(changed)} differ from {folder.config}; a resumed run may change only "
            f"{', '.join(CHANGEABLE)}. Set them back, or start a new run under another name"
        )
    return folder


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    found: list[str] = []
    for key in sorted({*a, *b}):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}")
    return found


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE)
