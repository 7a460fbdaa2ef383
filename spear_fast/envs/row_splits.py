"""The rows of prompt files in the splits train and eval, which share no prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from spear_fast.config.section import Section
from spear_fast.errors import ConfigError, TaskError

from .prompt_rows import Adapt, PromptRow, read_rows
from .splits import unit_hash


class HeldOutParams(Section):
    """Which prompts are held out."""

    eval_file: str | None = None
    """Held-out prompts."""
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Without eval_file: share of train_file that is held out, chosen by a hash of the prompt."""

    def check_held_out(self) -> None:
        """Raise ValueError unless exactly one of the two is set."""
        if (self.eval_file is None) == (self.eval_fraction is None):
            raise ValueError("set either task.params.eval_file or task.params.eval_fraction, and only one of them")


def _prompt(row: PromptRow) -> str:
    return row.identity


def split_rows(
    train_file: str,
    held_out: HeldOutParams,
    adapt: Adapt | None = None,
    identity: Callable[[PromptRow], str] = _prompt,
) -> dict[str, list[PromptRow]]:
    """Return the rows of "train" and of "eval", in the order of the files.

    `adapt` is that of `read_rows`; rows with equal `identity` are one task. Raises TaskError for files that cannot be
    read or share a task, ConfigError where a split stays empty.
    """
    rows = read_rows(Path(train_file), adapt)
    if held_out.eval_file is not None:
        split = {"train": rows, "eval": read_rows(Path(held_out.eval_file), adapt)}
        _check_disjoint(split, identity)
        return split
    share = held_out.eval_fraction or 0.0
    # Equal prompts have equal hashes, so a repeated prompt stays on one side.
    is_eval = [unit_hash(identity(row)) < share for row in rows]
    split = {
        "train": [row for row, out in zip(rows, is_eval, strict=True) if not out],
        "eval": [row for row, out in zip(rows, is_eval, strict=True) if out],
    }
    if not all(split.values()):
        raise ConfigError(
            f"task.params.eval_fraction={share} leaves a split of {train_file} ({len(rows)} rows) empty; "
            f"change it or give more rows"
        )
    return split


def _check_disjoint(split: dict[str, list[PromptRow]], identity: Callable[[PromptRow], str]) -> None:
    held_out = {identity(row): row.place for row in split["eval"]}
    shared = [row for row in split["train"] if identity(row) in held_out]
    if shared:
        raise TaskError(
            f"{len(shared)} prompts are in both task.params.train_file and eval_file, the first at {shared[0].place} "
            f"and {held_out[identity(shared[0])]}; remove them from one"
        )
