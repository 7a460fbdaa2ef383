"""What can be set of the math tasks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from spear_fast.config.section import NonNegative, Positive, PositiveFloat, UnitInterval

from ..row_splits import HeldOutParams
from ..sandbox.choose import SandboxParams

INSTRUCTIONS = {
    "code_interpreter": (
        "Reason step by step. Check and compute with the tool code_interpreter where it helps. When you are sure, stop "
        "calling it and end with the final answer in \\boxed{}."
    ),
    "none": "Reason step by step and end with the final answer in \\boxed{}.",
}


class MathParams(HeldOutParams):
    """Where the problems come from, the tool, and the reward. Either `generators` or `train_file` is set."""

    generators: list[str | dict[str, dict[str, Any]]] | None = Field(default=None, min_length=1)
    """Datasets of reasoning-gym, each by its name or, with settings, as {name: {setting: value}}. Problems are drawn
    from all of them alike. A few (polynomial_multiplication, isomorphic_strings, ransom_note) follow Python's hash
    seed: with them a run repeats only under a fixed PYTHONHASHSEED."""
    num_train: Positive = 8192
    """Training problems of generators."""
    num_eval: NonNegative = 256
    """Held-out problems of generators, all different."""
    num_demo: NonNegative = 2048
    """Problems of generators for demonstrations, held out from training as well."""
    train_file: str | None = None
    """Problems in a .jsonl, .json or .parquet file, in the columns of GSM8K, DAPO-Math or AIME."""
    tool: Literal["code_interpreter", "none"] = "code_interpreter"
    """Whether the policy can run Python."""
    sandbox: SandboxParams = Field(default_factory=lambda: SandboxParams.model_validate({}))
    """Where it runs. Its timeout_s should be below rollout.tool_timeout_s: the former is a text for the policy to
    read, the latter fails the trajectory."""
    reward_correct: float = 1.0
    """Reward of a right answer."""
    reward_wrong: float = -1.0
    """Reward of a wrong answer, of a last message without one, and of a trajectory that a limit of turns or tokens
    ends, as in the authors' runs."""
    check_timeout_s: PositiveFloat = 3.0
    """Longest check of one answer, in seconds; then it counts as wrong."""
    check_workers: Positive = 2
    """Processes that check answers."""
    max_answer_chars: Positive = 1000
    """Longer answers are wrong."""
    system_prompt: str = ""
    """System message; empty for none."""
    instruction: str | None = None
    """Text behind each question. None asks for an answer in a box and, with the tool, for its use; empty adds none."""
    demo_tool_share: UnitInterval = 1.0
    """Share of demonstrations that call the tool, of those problems whose question says what to compute. All others
    answer at once."""

    @property
    def shown_instruction(self) -> str:
        """The instruction, or the default that suits the tool."""
        return INSTRUCTIONS[self.tool] if self.instruction is None else self.instruction

    @property
    def generator_settings(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and settings of each generator."""
        plain = [{each: {}} if isinstance(each, str) else each for each in self.generators or ()]
        return [pair for each in plain for pair in each.items()]

    @model_validator(mode="after")
    def _one_source(self) -> MathParams:
        if (self.generators is None) == (self.train_file is None):
            raise ValueError(
                "set either task.params.generators (a list of reasoning-gym datasets) or task.params.train_file, and "
                "only one of them"
            )
        if self.train_file is not None:
            self.check_held_out()
        elif self.eval_file is not None or self.eval_fraction is not None:
            raise ValueError("task.params.eval_file and eval_fraction belong to train_file; remove them")
        if self.reward_correct <= self.reward_wrong:
            raise ValueError(
                f"task.params.reward_correct={self.reward_correct:g} must be above reward_wrong={self.reward_wrong:g}"
            )
        return self

    @model_validator(mode="after")
    def _one_generator_each(self) -> MathParams:
        for each in self.generators or ():
            if isinstance(each, dict) and len(each) != 1:
                raise ValueError(
                    f"task.params.generators holds {each!r}; an entry is a name or one pair of name and settings"
                )
        return self
