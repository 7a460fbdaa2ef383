"""Tables of the kernel benchmark's results: one per case on the terminal, and those that READMEs embed."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
LEVEL_TITLES = {
    "logits": "From logits: log-probs and a PPO loss",
    "hidden-logprob": "From hidden states: log-probs and entropy",
    "hidden": "From hidden states: the whole PPO loss",
    "policy": "From log-probs: the policy loss",
    "cov": "From log-probs: the choice of tokens by covariance",
    "batch": "Packed batches",
}


def print_case(record: Record) -> None:
    """Print a case: with rich where it is installed, else as Markdown."""
    rows = [_terminal_row(name, entry) for name, entry in record["contenders"].items()]
    title = f"{record['level']}: {record['title']}"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([title, "", *_markdown_table(list(TERMINAL_COLUMNS), rows), ""]), flush=True)
        return
    table = Table(title=title, title_justify="left")
    for column in TERMINAL_COLUMNS:
        table.add_column(column, justify="left" if column in ("", "note") else "right", no_wrap=column != "note")
    for row in rows:
        table.add_row(*row)
    # As wide as the table wants to be where no terminal tells its width.
    Console(width=None if Console().is_terminal else 160).print(table)


TERMINAL_COLUMNS = (
    "", "fwd ms", "fwd+bwd ms", "spread", "floor", "TFLOP/s", "GB/s", "MiB", "lp p99", "error", "note",
)  # fmt: skip


def _terminal_row(name: str, entry: Record) -> list[str]:
    if entry["status"] != "measured":
        reason = entry.get("install") or entry.get("reason", "")
        return [name, *[""] * (len(TERMINAL_COLUMNS) - 2), entry["status"] + (f": {reason}" if reason else "")]
    both = "forward" in entry
    forward = entry.get("forward", entry)
    return [
        name,
        milliseconds(forward["median_s"]),
        milliseconds(entry["median_s"]) if both else "",
        f"{entry['slowest_s'] / entry['fastest_s'] - 1:.0%}",
        _optional(entry.get("floor_share"), ".2f"),
        _optional(entry.get("tflop_per_s"), ".3g"),
        f"{entry['gb_per_s']:.3g}",
        _optional(_mebibytes(entry, 0), ".0f"),
        _optional(errors_of(entry).get("logp_p99"), ".0e"),
        _optional(worst_error(entry), ".0e"),
        f"memory: {entry['no_memory_figure']}" if "no_memory_figure" in entry else "",
    ]


def errors_of(entry: Record) -> dict[str, float]:
    """Errors at the measured size, or where that has none those of the small problem."""
    return entry.get("errors") or entry.get("gate") or {}


def worst_error(entry: Record) -> float | None:
    """The error of the gradient, or where there is none the largest error that is not one of log-probs."""
    errors = errors_of(entry)
    relative = [value for name, value in errors.items() if not name.endswith(("_p99", "_max"))]
    return errors.get("gradient", max(relative, default=None))


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _mebibytes(entry: Record, gradient_bytes: int) -> float | None:
    peak = entry.get("peak_extra_bytes")
    return None if peak is None else max(0, peak - gradient_bytes) / 2**20


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(result: Record) -> str:
    """All results as Markdown, without a heading: per level the detail of its largest case, then all of its cases.

    `result` is what bench/kernels.py writes. A contender without figures is named below its table, with the reason.
    """
    parts = []
    for level, title in LEVEL_TITLES.items():
        cases = [case for case in result["cases"] if case["level"] == level]
        heads = dict.fromkeys(_head(case) for case in cases)
        for head in heads:
            of_head = [case for case in cases if _head(case) == head]
            parts += [f"**{title}**{f', {head}' if head else ''}", ""]
            parts += _by_variant(of_head) if of_head[0]["variant"] else _by_size(of_head)
            parts += [absent(of_head), ""]
    return "\n".join(part for part, after in zip(parts, [*parts[1:], "x"], strict=True) if part or after).strip() + "\n"


def _head(case: Record) -> str:
    if "vocab_size" not in case:
        return ""
    return f"H {case['hidden_size']}, V {case['vocab_size']}, {case['dtype']}"


def _by_size(cases: list[Record]) -> list[str]:
    full = [case for case in cases if case["active_share"] == case["live_share"] == 1]
    largest = max(full or cases, key=lambda case: case["num_rows"])
    rows = []
    for name, entry in _by_time(largest):
        errors = errors_of(entry)
        rows.append(
            [
                name,
                _optional_ms(entry.get("forward")),
                milliseconds(entry["median_s"]),
                _optional(entry.get("floor_share"), ".2f"),
                _optional(_mebibytes(entry, largest["gradient_bytes"]), ".0f"),
                _optional(errors.get("logp_p99"), ".0e"),
                _optional(errors.get("gradient"), ".0e"),
            ]
        )
    titles = ["", "forward ms", "with backward ms", "share of floor", "extra MiB", "log-prob error", "gradient error"]
    lines = [f"{_size(largest)}:", "", *_markdown_table(titles, rows), ""]
    if len(cases) == 1:
        return lines
    names = list(dict.fromkeys(name for case in (largest, *cases) for name, _ in _by_time(case)))
    table = [[name, *(_time_and_share(case["contenders"].get(name)) for case in cases)] for name in names]
    return [*lines, "Forward and backward in ms (share of the floor):", "",
            *_markdown_table(["", *(_size(case) for case in cases)], table), ""]  # fmt: skip


def _by_variant(cases: list[Record]) -> list[str]:
    lines = []
    for size in dict.fromkeys(case["num_rows"] for case in cases):
        of_size = [case for case in cases if case["num_rows"] == size]
        names = list(dict.fromkeys(name for case in of_size for name in case["contenders"]))
        names = [name for name in names if any(_measured(case, name) for case in of_size)]
        if not names:
            continue
        rows = [
            [case["variant"], *(_time_and_share(case["contenders"].get(name), share=False) for name in names)]
            for case in of_size
        ]
        backward = ", forward and backward" if "forward" in of_size[0]["contenders"][names[0]] else ""
        lines += [f"{size} rows, ms{backward}:", "", *_markdown_table(["", *names], rows), ""]
    return lines


def _measured(case: Record, name: str) -> bool:
    return case["contenders"].get(name, {}).get("status") == "measured"


def _by_time(case: Record) -> list[tuple[str, Record]]:
    measured = [(name, entry) for name, entry in case["contenders"].items() if entry["status"] == "measured"]
    return sorted(measured, key=lambda pair: pair[1]["median_s"])


def _size(case: Record) -> str:
    shares = "" if case["active_share"] == case["live_share"] == 1 else (
        f", active {case['active_share']:g}, live {case['live_share']:g}"
    )  # fmt: skip
    return f"N {case['num_rows']}{shares}"


def _optional_ms(part: Record | None) -> str:
    return "" if part is None else milliseconds(part["median_s"])


def _time_and_share(entry: Record | None, share: bool = True) -> str:
    if entry is None:
        return "-"
    if entry["status"] != "measured":
        return entry["status"]
    shown = f" ({entry['floor_share']:.2f})" if share and "floor_share" in entry else ""
    return milliseconds(entry["median_s"]) + shown


def absent(cases: list[Record]) -> str:
    reasons: dict[str, str] = {}
    for case in cases:
        for name, entry in case["contenders"].items():
            if entry["status"] != "measured" and not any(_measured(other, name) for other in cases):
                reason = f": {entry['reason']}" if entry["status"] in ("refused", "failed") else ""
                reasons[name] = f"{name} ({entry['status']}{reason})"
    return f"No figure: {', '.join(reasons.values())}." if reasons else ""


def _markdown_table(titles: list[str], rows: list[list[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(cells)} |" for cells in (titles, *rows))
    return [head, f"|{'---|' * len(titles)}", *body]
