"""Whether one result file is slower or larger than another: ratios of every measured row, and an exit status.

python bench/compare.py OLD.json NEW.json [--tolerance 0.1]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FIELDS = {"median_s": "time", "peak_extra_bytes": "memory", "peak_bytes": "memory", "bytes_per_trajectory": "memory"}
"""What is compared, in all of it less is better, and how it is called."""
LABELS = ("level", "title", "name", "workload", "size", "operator", "loss", "engine")
"""Fields that tell the elements of a list apart; the others may be measurements."""
CONTAINERS = ("cases", "contenders", "rows")
"""Keys that are left out of a row's place."""
SETTINGS = ("suite", "size", "device", "dtype", "threads", "trajectories")
"""Settings under which figures may be compared only if they are equal."""
SLACK = {"peak_extra_bytes": 1 << 20, "peak_bytes": 1 << 20}
"""Growth that is no news whatever its ratio: pages that a process happens to hold."""
NEVER_WALKED = ("machine", "settings", "gpus_after", "times_s", "errors", "gate")


@dataclass(frozen=True)
class Row:
    """A field of a measured row in both files; a value is None where that file has none."""

    place: str
    field: str
    old: float | None
    new: float | None
    why: str = ""
    """Status of the new row, where it has no value."""

    @property
    def ratio(self) -> float | None:
        """New over old; infinite from 0."""
        if self.old is None or self.new is None:
            return None
        if self.old == 0:
            return math.inf if self.new else 1.0
        return self.new / self.old

    def is_worse(self, tolerance: float) -> bool:
        """Whether it grew by more than the tolerance, or was measured before and is not any more."""
        if self.old is None:
            return False
        if self.new is None:
            return True
        return not self.new <= max(self.old * (1 + tolerance), self.old + SLACK.get(self.field, 0))


def main(arguments: list[str] | None = None) -> int:
    """Print the ratios; return 1 if a row is worse beyond the tolerance, 2 if the files cannot be compared, else 0."""
    args = _parser().parse_args(arguments)
    try:
        old, new = read(args.old), read(args.new)
        check_comparable(old, new, args.across_machines)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = [row for row in rows_of(old, new) if args.only in row.place]
    if not any(row.ratio is not None for row in found):
        print(f"{args.old} and {args.new} have no measured row in common; compare files of one benchmark")
        return 2
    worse = [row for row in found if row.is_worse(args.tolerance)]
    _print(found if args.all else [row for row in found if row in worse or _changed(row, args.tolerance)], args)
    print(f"{len(found)} figures compared, {len(worse)} worse by more than {100 * args.tolerance:g} %")
    return int(bool(worse))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare two result files of one benchmark, by hand.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=_tolerance, default=0.1, help="growth that passes as noise; 0.1 is a tenth")
    parser.add_argument("--only", default="", help="text that the place of a row contains, e.g. linear_policy_loss")
    parser.add_argument("--all", action="store_true", help="also print rows that hardly changed")
    parser.add_argument("--across-machines", action="store_true", help="compare though processor or GPU differ")
    return parser


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more; 0.1 allows a tenth")
    return value


def read(path: Path) -> dict[str, Any]:
    """Return a result file's contents.

    Raises:
        ValueError: it is missing, no JSON, or not an object with the field `machine`.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a result file: {error}") from None
    if not isinstance(result, dict) or "machine" not in result:
        raise ValueError(f"{path} is no result file: it has no field 'machine'; name one that a benchmark wrote")
    return result


def check_comparable(old: dict[str, Any], new: dict[str, Any], across_machines: bool) -> None:
    """Raise ValueError for files of different benchmarks or settings, or of different machines without leave."""
    if old.get("benchmark") != new.get("benchmark"):
        raise ValueError(
            f"benchmark differs: {old.get('benchmark')} and {new.get('benchmark')}; compare like with like"
        )
    settings = [result.get("settings", {}) for result in (old, new)]
    if differ := [name for name in SETTINGS if settings[0].get(name) != settings[1].get(name)]:
        values = "; ".join(f"{name}: {settings[0].get(name)} and {settings[1].get(name)}" for name in differ)
        raise ValueError(f"settings differ ({values}); measure the new file under those of the old one")
    here, there = _hardware(old["machine"]), _hardware(new["machine"])
    if here != there and not across_machines:
        raise ValueError(f"machines differ: {here} and {there}; --across-machines compares them nevertheless")


def _hardware(machine: dict[str, Any]) -> str:
    gpus = [gpu.get("name") for gpu in machine.get("gpus", [])]
    return ", ".join(str(part) for part in (machine.get("processor"), f"{machine.get('cores')} cores", *gpus))


def rows_of(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    """Pair every measured field of the two files by its place, in the old file's order, then what is new."""
    before, after = dict(_measured(old)), dict(_measured(new))
    status = dict(_statuses(new))
    return [
        Row(" / ".join(place), field, before.get((place, field)), after.get((place, field)), status.get(place, ""))
        for place, field in dict.fromkeys([*before, *after])
    ]


Place = tuple[str, ...]


def _measured(result: dict[str, Any]) -> Iterator[tuple[tuple[Place, str], float]]:
    for place, record in _records(result, ()):
        for field in FIELDS:
            value = record.get(field)
            if isinstance(value, int | float) and value >= 0:
                yield (place, field), value


def _statuses(result: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    for place, record in _records(result, ()):
        if isinstance(record.get("status"), str):
            yield place, ": ".join(part for part in (record["status"], record.get("reason")) if part)


def _records(value: Any, place: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every object of a result with the labels that lead to it."""
    if isinstance(value, dict):
        yield place, value
        for key, inner in value.items():
            if key not in NEVER_WALKED and isinstance(inner, dict | list):
                yield from _records(inner, place if key in CONTAINERS else (*place, key))
    elif isinstance(value, list):
        labels = [_label(inner) if isinstance(inner, dict) else "" for inner in value]
        for index, inner in enumerate(value):
            unique = labels[index] and labels.count(labels[index]) == 1
            yield from _records(inner, (*place, labels[index] if unique else f"{labels[index]}#{index}"))


def _label(record: dict[str, Any]) -> str:
    return " ".join(record[name] for name in LABELS if isinstance(record.get(name), str))


def _changed(row: Row, tolerance: float) -> bool:
    return row.ratio is None or not 1 - tolerance <= row.ratio <= 1 + tolerance


def _print(rows: list[Row], args: argparse.Namespace) -> None:
    if not rows:
        return
    table = Table(title=f"{args.old} -> {args.new}")
    for name in ("row", "figure", "old", "new", "new / old"):
        table.add_column(name, justify="left" if name in ("row", "figure") else "right", overflow="fold")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        style = "red" if row.is_worse(args.tolerance) else None
        missing = row.why or "no such row"
        values = [_value(row.old, row.field) or "not measured", _value(row.new, row.field) or missing]
        table.add_row(row.place, FIELDS[row.field], *values, ratio, style=style)
    Console().print(table)


def _value(value: float | None, field: str) -> str:
    if value is None:
        return ""
    return f"{1e3 * value:,.2f} ms" if field.endswith("_s") else f"{value / 2**20:,.2f} MiB"


if __name__ == "__main__":
    sys.exit(main())
