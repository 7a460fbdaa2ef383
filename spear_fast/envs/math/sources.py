"""The problems: drawn from generators of reasoning-gym, or read from files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from spear_fast.errors import TaskError
from spear_fast.seeds import derive_seed

from ..generators import create_generator, draw_entry
from ..pools import Pools
from ..row_splits import split_rows
from ..splits import SHARES, Split, check_index, check_split, unit_hash
from .boxed import boxed_answer
from .checker import Dataset
from .columns import math_row
from .params import MathParams

CACHED_PROBLEMS = 4096
"""All trajectories of a group ask for the same problem, and some generators take a second for one."""


@dataclass(frozen=True)
class Problem:
    """A question and what its answer is checked against."""

    question: str
    answer: str | None
    """The right answer, or one of them; None where the generator knows none."""
    task_type: str
    """The generator, or what the file calls the row's source."""
    earlier: tuple[dict[str, Any], ...] = ()
    """Messages of the conversation before the question."""
    dataset: int | None = None
    """Place of the generator whose scorer decides, with `entry`; None compares with `answer`."""
    entry: dict[str, Any] | None = None


class Source(Protocol):
    """Where problems come from."""

    def size(self, split: str) -> int:
        """Return the number of problems in `split`. Raises TaskError for an unknown split."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem, the same for the same arguments. Raises TaskError if there is none."""
        ...


class GeneratedProblems:
    """Problems of reasoning-gym in three splits that share no question."""

    def __init__(self, params: MathParams, seed: int) -> None:
        """Raises ConfigError for generators that do not exist, refuse their settings or have too few problems."""
        self._names = [name for name, _ in params.generator_settings]
        seeded = {split: _seeded(params, split, seed) for split in SHARES}
        self._datasets = {
            split: [create_generator(name, **settings) for name, settings in seeded[split]] for split in SHARES
        }
        self.scorers: list[Dataset] = seeded["train"]
        """For `Checker`. What a scorer needs is in the problem's entry, so that one serves all splits."""
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools("math", sizes, self._generate, key=_question, identity=_question)
        self._get = lru_cache(CACHED_PROBLEMS)(self._pools.get)

    def size(self, split: str) -> int:
        """Return the number of problems in `split`. Raises TaskError for an unknown split."""
        return self._pools.size(split)

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem, the same for the same (params, seed, split, index). Raises TaskError if there is none."""
        return self._get(split, index)

    def _generate(self, split: Split, draw: int) -> Problem | None:
        # A hash rather than the rest of a division: the first draws for all problems are multiples of one number.
        place = int(unit_hash(f"{split} {draw}") * len(self._names))
        entry = draw_entry(self._datasets[split][place], draw)
        if entry is None or (split == "demo" and not _can_be_shown(entry["answer"])):
            return None
        return Problem(entry["question"], entry["answer"], self._names[place], (), place, entry)


class FileProblems:
    """Problems of one or two files, in the splits train and eval."""

    def __init__(self, params: MathParams) -> None:
        """Raises TaskError naming file, row and field, ConfigError where a split is empty."""
        assert params.train_file is not None
        rows = split_rows(params.train_file, params, math_row)
        for row in (*rows["train"], *rows["eval"]):
            length = len(row.columns["ground_truth"])
            if length > params.max_answer_chars:
                raise TaskError(
                    f"{row.place}: the right answer has {length} characters, more than task.params.max_answer_chars="
                    f"{params.max_answer_chars}; raise that or remove the row"
                )
        self._rows = rows
        self._sizes = {split: len(rows[split]) for split in rows}

    def size(self, split: str) -> int:
        """Return the number of problems in `split`. Raises TaskError for an unknown split."""
        check_split("math", split, self._sizes)
        return self._sizes[split]

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem, in the order of the file. Raises TaskError if there is none."""
        check_index("math", split, index, self._sizes)
        row = self._rows[split][index]
        source = row.columns.get("data_source") or row.columns.get("ability")
        return Problem(
            row.text,
            row.columns["ground_truth"],
            source if isinstance(source, str) else "math",
            tuple((row.messages or [])[:-1]),
        )


def _seeded(params: MathParams, split: Split, seed: int) -> list[Dataset]:
    """The generators with seeds so far apart that their streams do not meet."""
    return [
        (name, {**settings, "seed": derive_seed(seed, "math", split, place)})
        for place, (name, settings) in enumerate(params.generator_settings)
    ]


def _can_be_shown(answer: Any) -> bool:
    """Whether an expert can put the answer into a box as it is."""
    return isinstance(answer, str) and boxed_answer(f"\\boxed{{{answer}}}") == answer


def _question(problem: Problem) -> str:
    return problem.question
