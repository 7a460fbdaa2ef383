"""How a benchmark writes its result file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(result: Mapping[str, Any], file: Path | None) -> None:
    """Write a result as JSON, making folders; None writes nothing."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ".new")
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        aside.replace(file)
