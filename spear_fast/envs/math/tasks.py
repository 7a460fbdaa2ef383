"""The math task set and its environment: a question, any number of tool calls, one answer."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from spear_fast.errors import MissingDependencyError, TaskError

from ..base import Info, StepResult, Tool
from ..sandbox.choose import make_sandbox
from ..sandbox.tool import CodeInterpreter
from ..splits import Split, unit_hash
from ..text import tool_call_message
from .boxed import boxed_answer
from .checker import Checker, Verdict
from .expert_code import expert_code
from .params import MathParams
from .plain import compare_plain
from .sources import FileProblems, GeneratedProblems, Problem, Source


class MathEnv:
    """One problem. The first message without a tool call ends the episode, with an answer in a box or without."""

    def __init__(self, tasks: MathTasks) -> None:
        self._tasks = tasks
        self._problem: Problem | None = None
        self._shown_code = False
        self.tools: Sequence[Tool] = tasks.tools

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Ask problem `options["index"]` of `options["split"]`, which alone decide it.

        Raises TaskError if there is no such problem.
        """
        self._problem = problem = self._tasks.problem(options["split"], options["index"])
        self._shown_code = False
        parts = (problem.question, self._tasks.params.shown_instruction)
        question = "\n\n".join(part for part in parts if part)
        info = Info(task_type=problem.task_type)
        if problem.earlier:
            system = self._tasks.system_prompt if problem.earlier[0]["role"] != "system" else ""
            opening = [{"role": "system", "content": system}] if system else []
            info["messages"] = [*opening, *map(dict, problem.earlier), {"role": "user", "content": question}]
        return question, info

    async def step(self, text: str) -> StepResult:
        """Check the boxed answer of `text` and end the episode.

        A text without one earns the same reward as a wrong answer but counts as not answered: without a tool call
        before it, the trajectory is incomplete, else it stays a negative sample. An answer whose check fails or takes
        too long is wrong, and the observation says so. Raises TaskError before reset, or if nothing can be checked.
        """
        problem, params = self._started(), self._tasks.params
        answer = boxed_answer(text)
        if answer is None:
            return "", params.reward_wrong, True, False, Info(won=False, action_valid=False, answered=False)
        verdict = await self._tasks.check(problem, answer)
        won = verdict is Verdict.RIGHT
        reward = params.reward_correct if won else params.reward_wrong
        observation = "" if verdict in (Verdict.RIGHT, Verdict.WRONG) else f"The check of the answer {verdict.value}."
        return observation, reward, True, False, Info(won=won, action_valid=True, answered=True)

    async def finish(self, text: str | None) -> tuple[float, Info]:
        """Reward an episode that a limit ended as a wrong answer: its last message, if it was cut, is none."""
        return self._tasks.params.reward_wrong, Info(won=False, answered=False)

    async def close(self) -> None:
        """Nothing is held; the sandbox belongs to the task set."""

    def expert(self) -> str:
        """Return a call that computes the answer where the question says how, and then, or else at once, the answer.

        Raises TaskError before reset, and for problems of files, which no expert can solve.
        """
        problem = self._started()
        if problem.entry is None or problem.answer is None:
            raise TaskError(
                "there are no demonstrations of problems from files; set cold_start.steps=0 and model.path to a model "
                "that can already act"
            )
        code = None if self._shown_code else self._tasks.demo_code(problem)
        if code is not None:
            self._shown_code = True
            return tool_call_message("I will compute it.", "code_interpreter", {"code": code})
        thought = "I have the result." if self._shown_code else "I know this."
        return f"<think>{thought}</think>\\boxed{{{problem.answer}}}"

    def _started(self) -> Problem:
        if self._problem is None:
            raise TaskError("the environment was used before reset; reset it first")
        return self._problem


class MathTasks:
    """Math problems with answers in boxes, with a code interpreter or without.

    Close it to end sandbox and checkers.
    """

    Params = MathParams

    def __init__(self, params: MathParams, seed: int) -> None:
        """`seed` decides which problems generators draw.

        Raises ConfigError or TaskError if there are no such problems or no sandbox, MissingDependencyError without
        reasoning-gym for generators or math-verify for files.
        """
        self.name = "math"
        self.params = params
        self.system_prompt = params.system_prompt
        self._source, self._checker = _source(params, seed)
        self._sandbox = make_sandbox(params.sandbox) if params.tool == "code_interpreter" else None
        self.tools: Sequence[Tool] = ()
        if self._sandbox is not None:
            self.tools = (CodeInterpreter(self._sandbox, params.sandbox.timeout_s).code_interpreter,)

    def size(self, split: str) -> int:
        """Return the number of problems in `split`. Raises TaskError for an unknown split."""
        return self._source.size(split)

    def make(self) -> MathEnv:
        """Return a fresh environment."""
        return MathEnv(self)

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem, the same for the same (params, seed, split, index). Raises TaskError if there is none."""
        return self._source.problem(split, index)

    def demo_code(self, problem: Problem) -> str | None:
        """Return the code of the expert's tool call, None where it answers at once."""
        shows_tool = self.tools and unit_hash(f"tool {problem.question}") < self.params.demo_tool_share
        return expert_code(problem.question, problem.answer or "") if shows_tool else None

    async def check(self, problem: Problem, answer: str) -> Verdict:
        """Return whether `answer` solves `problem`, by the generator's scorer or else by math-verify.

        Raises TaskError if the process that checks cannot be started.
        """
        if len(answer) > self.params.max_answer_chars:
            return Verdict.WRONG
        if problem.dataset is not None and problem.entry is not None:
            if answer == problem.answer:
                return Verdict.RIGHT
            return await self._checker.score(problem.dataset, problem.entry, answer)
        reference = problem.answer or ""
        known = compare_plain(reference, answer)
        if known is None:
            return await self._checker.equal(reference, answer)
        return Verdict.RIGHT if known else Verdict.WRONG

    def close(self) -> None:
        """End the sandbox and the processes that check answers."""
        self._checker.close()
        if self._sandbox is not None:
            self._sandbox.close()


def _source(params: MathParams, seed: int) -> tuple[Source, Checker]:
    """The problems, and what checks their answers."""
    if params.generators is not None:
        problems = GeneratedProblems(params, seed)
        return problems, Checker(
            datasets=problems.scorers, timeout_s=params.check_timeout_s, num_workers=params.check_workers
        )
    if importlib.util.find_spec("math_verify") is None:
        raise MissingDependencyError("math-verify", "math", "checking the answers of problems from files")
    return FileProblems(params), Checker(
        modules=["math_verify"], timeout_s=params.check_timeout_s, num_workers=params.check_workers
    )
