"""Reading metrics.jsonl, torn last line included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spear_fast.errors import SpearError

METRICS_FILE = "metrics.jsonl"
"""Name of the file in a run's folder."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a metrics file in order; each has an integer `step`.

    A last line without its line break is what a killed run leaves behind, and is ignored. Raises SpearError naming
    file and line if any other line is not such an object, and OSError if the file cannot be read.
    """
    complete = path.read_bytes().rpartition(b"\n")[0]
    records = []
    for number, line in enumerate(complete.split(b"\n"), start=1):
        if line.strip():
            records.append(_record(line, f"{path}, line {number}"))
    return records


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SpearError(f"{place} is not JSON ({error}); remove the line") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise SpearError(f"{place} is not an object with an integer 'step'; remove the line")
    return record
