"""The quickstart's tasks: reasoning-gym arithmetic, solved with a calculator tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from spear_fast.config.schema import NonNegative, Positive, Section, UnitInterval
from spear_fast.errors import TaskError
from spear_fast.seeds import derive_seed

from .arithmetic import apply, evaluate, format_number, operations
from .base import Info, StepResult, Tool
from .generators import create_generator, draw_entry, is_right
from .pools import Pools
from .splits import SHARES, Split, unit_hash
from .text import tagged, tagged_message, tool_call_message

SYSTEM_PROMPT = "Solve it with the tool. End with <answer>number</answer>."
MAX_DIVISION_SIZE = 12
"""Limit of terms times digits with division: the library tries all divisors up to the root of a product of terms."""


class CalculatorParams(Section):
    """Which expressions are asked, how many, and what the tool can do."""

    tool: Literal["expression", "binary"] = "expression"
    """"expression": one call evaluates a whole expression; "binary": a call takes two operands."""
    min_terms: Annotated[int, Field(ge=2)] = 2
    """Fewest numbers in an expression."""
    max_terms: Annotated[int, Field(ge=2, le=12)] = 4
    """Most numbers in an expression."""
    min_digits: Positive = 1
    """Fewest digits of a number."""
    max_digits: Annotated[int, Field(ge=1, le=8)] = 2
    """Most digits of a number."""
    operators: list[Literal["+", "-", "*", "/"]] = Field(["+", "-"], min_length=1)
    """Operators that occur. Any other choice than both + and - also brings parentheses and negative numbers."""
    allow_negation: bool = False
    """With + and -: negative numbers as well. With other operators: a minus before parentheses."""
    num_train: Positive = 8192
    """Training tasks."""
    num_eval: NonNegative = 256
    """Held-out tasks, all different."""
    num_demo: NonNegative = 4096
    """Tasks for demonstrations, held out from training as well."""
    demo_max_terms: Annotated[int, Field(ge=2, le=12)] | None = None
    """Most numbers in a demonstration; None takes max_terms."""
    demo_max_digits: Annotated[int, Field(ge=1, le=8)] | None = None
    """Most digits in a demonstration; None takes max_digits."""
    demo_tool_share: UnitInterval = 1.0
    """Share of demonstrations that call the tool. The others answer at once, and then it is left to reinforcement
    learning to find out which of the two pays."""
    prompt_style: Literal["short", "full"] = "short"
    """"short" asks `4 + 7 - 3 = ?`, "full" uses the sentence of reasoning-gym."""
    system_prompt: str = SYSTEM_PROMPT
    """System message; empty for none."""

    def largest(self, split: Split) -> tuple[int, int]:
        """Return (most terms, most digits) of the questions of `split`."""
        if split != "demo":
            return self.max_terms, self.max_digits
        return self.demo_max_terms or self.max_terms, self.demo_max_digits or self.max_digits

    @model_validator(mode="after")
    def _ranges_fit(self) -> CalculatorParams:
        parts: tuple[tuple[Split, str], ...] = (("train", ""), ("demo", "demo_"))
        for split, prefix in parts:
            terms, digits = self.largest(split)
            if terms < self.min_terms:
                raise ValueError(f"task.params.{prefix}max_terms={terms} is below min_terms={self.min_terms}; raise it")
            if digits < self.min_digits:
                raise ValueError(
                    f"task.params.{prefix}max_digits={digits} is below min_digits={self.min_digits}; raise it"
                )
            if "/" in self.operators and terms * digits > MAX_DIVISION_SIZE:
                raise ValueError(
                    f"task.params.{prefix}max_terms={terms} times {prefix}max_digits={digits} is above "
                    f"{MAX_DIVISION_SIZE}, the limit with the operator '/'; lower one of them"
                )
        if self.tool == "binary" and "/" in self.operators:
            raise ValueError("task.params.operators has '/', which tool=binary lacks; remove it or use tool=expression")
        return self


@dataclass(frozen=True)
class Problem:
    """One item of a reasoning-gym dataset and the question asked about it, e.g. `4 + 7 - 3 = ?`."""

    question: str
    expression: str
    dataset: Any
    entry: dict[str, Any]


class CalculatorEnv:
    """One question, answered in `<answer>` tags after any number of tool calls. Reward 1 for the right number."""

    def __init__(self, tasks: CalculatorTasks) -> None:
        self._tasks = tasks
        self._problem: Problem | None = None
        self._plan: list[dict[str, Any]] = []
        self._done = 0
        self._result = ""
        self.tools: Sequence[Tool] = [self.calculator if tasks.params.tool == "expression" else self.calculate]

    async def reset(self, *, seed: int, options: Mapping[str, Any]) -> tuple[str, Info]:
        """Ask question `options["index"]` of `options["split"]`, which alone decide it.

        Raises TaskError if there is no such question.
        """
        self._problem = self._tasks.problem(options["split"], options["index"])
        self._plan = self._tasks.plan(self._problem)
        self._done, self._result = 0, ""
        return self._problem.question, Info(task_type=f"calculator-{self._tasks.params.tool}")

    async def step(self, text: str) -> StepResult:
        """End the episode: reward 1 if the answer in `text` is right, else 0. A text without answer is invalid."""
        if self._problem is None:
            raise TaskError("step was called before reset; reset the environment first")
        answer = tagged(text, "answer")
        if answer is None:
            return "", 0.0, True, False, Info(won=False, action_valid=False, answered=False)
        won = is_right(self._problem.dataset, self._problem.entry, answer)
        return "", float(won), True, False, Info(won=won, action_valid=True, answered=True)

    async def close(self) -> None:
        """Nothing is held."""

    def calculator(self, expression: str) -> str:
        """Evaluate an arithmetic expression.

        Args:
            expression: Numbers, + - * / and parentheses.
        """
        return self._remember({"expression": expression}, evaluate(expression))

    def calculate(self, a: int, op: Literal["+", "-", "*"], b: int) -> str:
        """Compute a op b.

        Args:
            a: First number.
            op: Operator.
            b: Second number.
        """
        return self._remember({"a": a, "op": op, "b": b}, apply(Fraction(a), op, Fraction(b)))

    def expert(self) -> str:
        """Return the next planned tool call, or the answer once the plan is done. Raises TaskError before reset."""
        if self._problem is None:
            raise TaskError("expert was called before reset; reset the environment first")
        if not self._plan:
            return tagged_message("I know this.", "answer", self._problem.entry["answer"])
        if self._done < len(self._plan):
            name = self.tools[0].__name__
            return tool_call_message("I will use the calculator.", name, self._plan[self._done])
        return tagged_message("I have the result.", "answer", self._result)

    def _remember(self, arguments: dict[str, Any], value: Fraction) -> str:
        result = format_number(value)
        if self._done < len(self._plan) and arguments == self._plan[self._done]:
            self._done += 1
            self._result = result
        return result


class CalculatorTasks:
    """Arithmetic questions in three disjoint splits: train, eval and demo."""

    Params = CalculatorParams

    def __init__(self, params: CalculatorParams, seed: int) -> None:
        """`seed` decides which questions are drawn. Raises ConfigError if `params` leave too few of them."""
        self.name = "calculator"
        self.params = params
        self.system_prompt = params.system_prompt
        self.tools: Sequence[Tool] = self.make().tools
        self._datasets = {split: _create_dataset(params, split, seed) for split in SHARES}
        sizes = {"train": params.num_train, "eval": params.num_eval, "demo": params.num_demo}
        self._pools = Pools(self.name, sizes, self._generate, key=_expression, identity=_expression)

    def size(self, split: str) -> int:
        """Return the number of tasks in `split`. Raises TaskError for an unknown split."""
        return self._pools.size(split)

    def make(self) -> CalculatorEnv:
        """Return a fresh environment."""
        return CalculatorEnv(self)

    def plan(self, problem: Problem) -> list[dict[str, Any]]:
        """Return the arguments of the expert's tool calls, in order; none where it answers at once."""
        if unit_hash(f"tool {problem.expression}") >= self.params.demo_tool_share:
            return []
        return _plan(problem.expression, self.params.tool)

    def problem(self, split: Split, index: int) -> Problem:
        """Return a problem, the same for the same (params, seed, split, index). Raises TaskError if there is none."""
        return self._pools.get(split, index)

    def _generate(self, split: Split, draw: int) -> Problem | None:
        dataset = self._datasets[split]
        entry = draw_entry(dataset, draw)
        if entry is None or not _is_exact(entry["metadata"]["expression"], entry["answer"]):
            return None
        expression = entry["metadata"]["expression"]
        question = f"{expression} = ?" if self.params.prompt_style == "short" else entry["question"]
        return Problem(question, expression, dataset, entry)


def _create_dataset(params: CalculatorParams, split: Split, seed: int) -> Any:
    """The reasoning-gym dataset that makes the expressions of `split`."""
    max_terms, max_digits = params.largest(split)
    settings: dict[str, Any] = {
        "min_terms": params.min_terms,
        "max_terms": max_terms,
        "min_digits": params.min_digits,
        "max_digits": max_digits,
        "allow_negation": params.allow_negation,
    }
    # Item i uses seed + i: only seeds far apart keep the streams of two splits or runs apart.
    far_seed = derive_seed(seed, "calculator", split)
    if set(params.operators) == {"+", "-"}:
        return create_generator("chain_sum", far_seed, **settings)
    return create_generator("basic_arithmetic", far_seed, operators=params.operators, **settings)


def _is_exact(expression: str, answer: str) -> bool:
    """Whether the tool's value is the library's answer, which rounds some divisions down."""
    try:
        return evaluate(expression) == Fraction(answer)
    except ValueError:
        return False


def _expression(problem: Problem) -> str:
    return problem.expression


def _plan(expression: str, tool: str) -> list[dict[str, Any]]:
    """The arguments of the tool calls that solve `expression`, in order."""
    if tool == "expression":
        return [{"expression": expression}]
    return [{"a": int(left), "op": sign, "b": int(right)} for left, sign, right in operations(expression)[1]]
