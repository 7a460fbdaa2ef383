"""Shapes of models as files: those of published models, and the config.json that makes a folder one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.common.machine import ROOT


def published_shape(name: str) -> dict[str, Any]:
    """The config.json called `name` in configs/paper/shapes."""
    return json.loads((ROOT / f"configs/paper/shapes/{name}.json").read_text(encoding="utf-8"))


def write_shape(shape: dict[str, Any], folder: Path) -> Path:
    """Write config.json, which is all that our engines read of a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return folder
