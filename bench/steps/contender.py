"""What the step benchmark asks of a trainer: rows of the table, the setting of one, and the report of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.steps.workloads import WORKLOADS, Script, TrainedRow, Workload, digest, digest_of_actions

LEARNING_RATE = 1e-6
CLIP = 0.2


@dataclass(frozen=True)
class Opening:
    """One trainer on one workload."""

    trainer: str
    """"ours" or "trl"."""
    size: str
    workload: str
    model: str
    """Folder of model and tokenizer."""
    device: str
    engine: str = "hf"
    """"hf" or "vllm"."""
    micro_batch: int = 0
    """TRL: sequences of one backward pass; 0 takes all."""
    liger: bool = False

    @property
    def data(self) -> Workload:
        """The workload itself."""
        return WORKLOADS[self.size][self.workload]

    @property
    def dtype(self) -> str:
        """Of forward and backward passes."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        return AutoTokenizer.from_pretrained(self.model)


@dataclass(frozen=True)
class StepReport:
    """One whole training step, as its trainer saw it."""

    seconds: float
    phases: dict[str, float]
    forcing_s: float
    """Seconds that the hook itself took which puts the drawn tokens in place of the sampled ones."""
    tokens: int
    """Action tokens trained on."""
    digest: str
    """Over all tokens and masks; see `workloads.digest`."""
    actions: str
    """Over the action tokens; see `workloads.digest_of_actions`."""
    advantages: list[float]
    """By prompt and sample."""
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, rows: list[TrainedRow], seconds: float, phases: dict[str, float], forcing_s: float, **facts: Any
    ) -> StepReport:
        """The report of a step that trained on `rows`."""
        rows = sorted(rows, key=lambda row: (row.prompt, row.sample))
        tokens = sum(sum(row.mask) for row in rows)
        advantages = [row.advantage for row in rows]
        return cls(seconds, dict(phases), forcing_s, tokens, digest(rows), digest_of_actions(rows), advantages, facts)


Turn = Callable[[StepReport | None], bool]
"""Called with None when a trainer is ready and after each step with its report; True asks for another step.

It may take any time, which counts for no step.
"""


def run(opening: Opening, turn: Turn, folder: Path) -> None:
    """Build the trainer and take steps for as long as `turn` asks; `folder` is for what it writes.

    Raises whatever stops the trainer, `ImportError` where it is not installed, `NeedsCuda` where it cannot run.
    """
    if opening.trainer == "ours":
        from bench.steps.ours import run_ours

        run_ours(opening, turn, folder)
    else:
        from bench.steps.trl_trainer import run_trl

        run_trl(opening, turn, folder)


def script_of(opening: Opening) -> Script:
    """The drawn workload in the tokens of the opening's model."""
    return Script(opening.data, opening.tokenizer())


def device_of(opening: Opening) -> torch.device:
    """Where it runs."""
    return torch.device(opening.device)
