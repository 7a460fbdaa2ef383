"""Math without processes: answers in boxes, plain comparison, columns of files, and what an expert computes."""

from __future__ import annotations

from typing import Any

import pytest

from spear_fast.envs.math.boxed import boxed_answer
from spear_fast.envs.math.check_worker import CALLS_NOTHING
from spear_fast.envs.math.columns import math_row
from spear_fast.envs.math.expert_code import expert_code
from spear_fast.envs.math.plain import compare_plain
from spear_fast.errors import TaskError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{ 4 }", "4"),
        (r"\boxed {5}", "5"),
        (r"\fbox{3}", "3"),
        (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{x = \fbox{4}}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"{ } } \boxed{4}", "4"),
        (r"{ \boxed{4}", "4"),
        (r"\boxed{4} and then \boxed{5", "4"),
        (r"It is \boxed 42.", "42"),
        (r"$\boxed 7$", "7"),
        (r"\boxed\frac{1}{2} of it", r"\frac{1}{2}"),
        (r"\boxed 3.5, or so", "3.5"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> it is one", None),
        (r"<think>\boxed{1}", "1"),
        (r"\boxed{}", None),
        (r"\boxed{ }", None),
        (r"\boxed", None),
        (r"\boxed{4", None),
        (r"\boxedtext{4}", None),
        ("42", None),
        ("", None),
    ],
)
def test_boxed_answer(text: str, answer: str | None) -> None:
    assert boxed_answer(text) == answer


def test_boxes_that_never_close_take_linear_time() -> None:
    # Looked at one by one, these would take minutes.
    assert boxed_answer("\\boxed{" * 300_000) is None
    assert boxed_answer("\\boxed{" * 100_000 + "7" + "}" * 100_000) == "7"


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("42", "42", True),
        ("42", " $42$. ", True),
        ("42", r"\(42\)", True),
        ("1234", "1,234", True),
        ("1{,}234", "1234.0", True),
        ("-3", "\u22123", True),
        ("+.50", "0.5", True),
        ("007", "7", True),
        ("42", "43", False),
        ("0.3333333333333333", "0.33333333333333331", False),
        ("12", "1,2", None),
        ("1/2", "0.5", None),
        ("x + 1", "x+1", True),
        ("yes", "no", None),
        ("1", "1e0", None),
        ("1", ".", None),
        ("11/2", "1 1/2", None),
        ("12", "1 2", None),
        ("1 1/2", "1 1/2", True),
    ],
)
def test_plain_comparison(reference: str, answer: str, equal: bool | None) -> None:
    assert compare_plain(reference, answer) is equal


USER = {"role": "user", "content": "1 + 1?"}


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"question": "1 + 1?", "answer": "One and one.\n<<1+1=2>>\n#### 1,002"}, "1 + 1?", "1,002"),
        ({"prompt": [USER], "reward_model": {"ground_truth": "2", "style": "rule"}, "data_source": "d"}, "1 + 1?", "2"),
        ({"problem": "1 + 1?", "answer": 2}, "1 + 1?", "2"),
        ({"ID": "2024-I-1", "Problem": "1 + 1?", "Solution": r"\boxed{3}", "Answer": 2}, "1 + 1?", "2"),
        ({"problem": "1 + 1?", "solution": r"It is $\boxed{\frac{4}{2}}$.", "level": 5}, "1 + 1?", r"\frac{4}{2}"),
        ({"prompt": "1 + 1?", "ground_truth": "2", "answer": None}, "1 + 1?", "2"),
    ],
)
def test_column_shapes(record: dict[str, Any], prompt: str, answer: str) -> None:
    row = math_row("x.jsonl line 1", record)
    assert (row["prompt"], row["ground_truth"]) == (prompt, answer)
    assert "reward_model" not in row


def test_a_conversation_of_several_messages_stays_one() -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    assert math_row("here", {"prompt": messages, "answer": "2"})["prompt"] == messages


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "1 + 1?", "answer": "2"}, r"f line 3: there is no question.*'problem'.*the row has text, answer"),
        ({"question": "1 + 1?"}, r"f line 3: there is no right answer.*'reward_model'.*the row has question"),
        ({"prompt": "?", "reward_model": {"style": "rule"}}, r"f line 3: field 'reward_model' must be an object"),
        ({"question": "?", "answer": "as told above #### "}, r"f line 3: field 'answer' holds no answer: 'as told"),
        ({"question": "?", "answer": ["2"]}, r"f line 3: field 'answer' must be a text or a number, got \['2'\]"),
        ({"problem": "?", "Answer": float("nan")}, r"f line 3: field 'Answer' must be a text or a number, got nan"),
    ],
)
def test_wrong_rows_name_place_and_field(record: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        math_row("f line 3", record)


@pytest.mark.parametrize(
    ("question", "answer", "code"),
    [
        ("State the final answer to the following problem: 4 + 7 - 3 =", "8", "print(4 + 7 - 3)"),
        ("Calculate -(2 + 3) * 4.", "-20", "print(-(2 + 3) * 4)"),
        ("Find the GCD of these numbers: 12, 18.", "6", "import math\nprint(math.gcd(12, 18))"),
        ("Find the Least Common Multiple (LCM) of 4, 6", "12", "import math\nprint(math.lcm(4, 6))"),
        ("4 + 7 =", "12", None),
        ("Find the GCD of 12 and 18, in chapter 5.", "6", None),
        ("How many of 12 apples are left?", "12", None),
        ("What is 1 / 0?", "1/0", None),
        ("What is 3 - 1 in words?", "two", None),
    ],
)
def test_expert_code_comes_from_the_question(question: str, answer: str, code: str | None) -> None:
    assert expert_code(question, answer) == code


@pytest.mark.parametrize("text", ["-3.25*x**2 + 1/2", "[[0, 1], [1, 0]]", "Q _ _ |\n{'a'}".replace("_", "-")])
def test_answers_that_call_nothing(text: str) -> None:
    assert CALLS_NOTHING.fullmatch(text)


@pytest.mark.parametrize("text", ["exit()", "x.y", "1.real", "(x := 2)", "[a:b]", "__name__", "@f", "1..real"])
def test_answers_that_could_call_something(text: str) -> None:
    assert not CALLS_NOTHING.fullmatch(text)
