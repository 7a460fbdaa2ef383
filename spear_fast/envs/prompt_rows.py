"""Prompt files (JSONL, JSON, parquet) as checked rows, in TRL's and verl's column shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear_fast.errors import MissingDependencyError, TaskError

ROLES = ("system", "user", "assistant", "tool")
REFERENCE_COLUMNS = ("ground_truth", "answer", "solution")
"""Columns that hold the right answer, in the order in which they are looked up."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt, e.g. `PromptRow("math.jsonl line 3", "2 + 2?", None, {"answer": "4", "ground_truth": "4"})`."""

    place: str
    """File and line (or row), for error messages."""
    text: str
    """The last user message."""
    messages: list[dict[str, Any]] | None
    """The whole conversation, where the file gives one."""
    columns: dict[str, Any]
    """What the reward function is given: all other columns, and `ground_truth` where there is a right answer."""

    @property
    def identity(self) -> str:
        """What makes two prompts the same, whatever their other columns."""
        return self.text if self.messages is None else json.dumps(self.messages, sort_keys=True, default=str)


Adapt = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
"""Given its place, brings a record of another shape into TRL's or verl's; raises TaskError where it cannot."""


def read_rows(path: Path, adapt: Adapt | None = None) -> list[PromptRow]:
    """Return the rows of a .jsonl, .json (a list of objects) or .parquet file.

    TRL's shape: `prompt` is text or a list of messages; every other column goes to the reward function. verl's shape:
    `prompt` is a list of messages; `reward_model.ground_truth` becomes the column `ground_truth`. Other shapes
    are for `adapt` to translate. Raises TaskError naming file, line and field, MissingDependencyError for parquet
    without pyarrow.
    """
    try:
        rows = [_row(place, record, adapt) for place, record in _records(path)]
    except FileNotFoundError as error:
        raise TaskError(f"prompt file {path} does not exist; check task.params") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"prompt file {path} cannot be read: {error}") from error
    if not rows:
        raise TaskError(f"prompt file {path} holds no rows")
    return rows


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each record with its place."""
    if path.suffix == ".jsonl":
        # Not splitlines, which also cuts at characters that JSON allows within a string.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                place = f"{path} line {number}"
                yield place, _parsed(place, line)
    elif path.suffix == ".json":
        records = _parsed(str(path), path.read_text(encoding="utf-8"))
        if not isinstance(records, list):
            raise TaskError(f"{path} holds a JSON {type(records).__name__}; it must hold a list of objects")
        yield from ((f"{path} row {number}", record) for number, record in enumerate(records, start=1))
    elif path.suffix == ".parquet":
        records = _parquet_records(path)
        yield from ((f"{path} row {number}", record) for number, record in enumerate(records, start=1))
    else:
        raise TaskError(f"prompt file {path} has an unknown type; use .jsonl, .json or .parquet")


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error


def _parquet_records(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "envs", f"the parquet file {path}") from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise TaskError(f"{path} is not a parquet file: {error}") from error


def _row(place: str, record: Any, adapt: Adapt | None) -> PromptRow:
    if not isinstance(record, Mapping):
        raise TaskError(f"{place}: expected an object with the field 'prompt', got {type(record).__name__}")
    if adapt is not None:
        record = adapt(place, record)
    if "prompt" not in record:
        raise TaskError(f"{place}: field 'prompt' is missing; the row has {', '.join(record) or 'no fields'}")
    prompt = record["prompt"]
    columns = {name: value for name, value in record.items() if name not in ("prompt", "reward_model")}
    reference = _reference(place, record)
    if reference is not None:
        columns["ground_truth"] = reference
    if isinstance(prompt, str):
        if not prompt.strip():
            raise TaskError(f"{place}: field 'prompt' is empty")
        return PromptRow(place, prompt, None, columns)
    messages = _messages(place, prompt)
    return PromptRow(place, messages[-1]["content"], messages, columns)


def _reference(place: str, record: Mapping[str, Any]) -> Any:
    """The right answer, or None where the row has none."""
    reward_model = record.get("reward_model")
    if reward_model is not None:
        if not isinstance(reward_model, Mapping) or reward_model.get("ground_truth") is None:
            raise TaskError(f"{place}: field 'reward_model' must be an object with 'ground_truth'")
        return reward_model["ground_truth"]
    return next((record[name] for name in REFERENCE_COLUMNS if record.get(name) is not None), None)


def _messages(place: str, prompt: Any) -> list[dict[str, Any]]:
    if not isinstance(prompt, list) or not prompt:
        raise TaskError(f"{place}: field 'prompt' must be text or a list of messages, got {type(prompt).__name__}")
    for position, message in enumerate(prompt):
        field = f"prompt[{position}]"
        if not isinstance(message, Mapping):
            raise TaskError(f"{place}: field '{field}' must be an object with role and content")
        if message.get("role") not in ROLES:
            raise TaskError(f"{place}: field '{field}.role' is {message.get('role')!r}; use one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise TaskError(f"{place}: field '{field}.content' must be text")
    if prompt[-1]["role"] != "user":
        raise TaskError(f"{place}: field 'prompt' must end with a user message, it ends with {prompt[-1]['role']!r}")
    # Parquet fills keys that only some messages have with None.
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
