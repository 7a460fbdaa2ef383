"""The processes that check answers: what is equal, and that no answer can hold them up, break or corrupt them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spear_fast.envs.generators import create_generator
from spear_fast.envs.math.checker import Checker, Verdict
from spear_fast.errors import TaskError

# Scorers that evaluate the answer by eval() and by sympy, one that compares text, and one that raises on junk.
NAMES = ("binary_matrix", "polynomial_multiplication", "chain_sum", "prime_factorization")


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    """Patient, so that a busy machine cannot make a right answer late."""
    checker = Checker(
        modules=["math_verify"], datasets=[(name, {"seed": 3}) for name in NAMES], timeout_s=60, num_workers=1
    )
    yield checker
    checker.close()


def entry(name: str) -> dict[str, Any]:
    return create_generator(name, 3)[0]


def score(checker: Checker, name: str, answer: str) -> Verdict:
    return asyncio.run(checker.score(NAMES.index(name), entry(name), answer))


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("1/2", r"\frac{1}{2}", True),
        (r"\frac12", "0.5", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"50\%", "0.5", True),
        ("5", r"5\text{ cm}", True),
        (r"90^\circ", "90", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        (r"\{1, 2\}", r"\{1, 3\}", False),
        ("[0, 1)", "[0,1)", True),
        ("[0, 1)", "(0, 1)", False),
        ("(1, 2)", "(2, 1)", False),
        ("2^{10}", "1024", True),
        ("x + 1", "1 + x", True),
        ("x = 3", "3", True),
        (r"\pi", "3.14159", False),
        ("1/3", "0.333", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        ("7", "}{", False),
        ("7", "no idea", False),
    ],
)
def test_equal(checker: Checker, reference: str, answer: str, equal: bool) -> None:
    verdict = asyncio.run(checker.equal(reference, answer))
    assert verdict is Verdict.RIGHT if equal else verdict in (Verdict.WRONG, Verdict.FAILED)


@pytest.mark.parametrize("name", NAMES)
def test_library_scores_its_own_answer_right(checker: Checker, name: str) -> None:
    assert score(checker, name, entry(name)["answer"]) is Verdict.RIGHT
    assert score(checker, name, "7") in (Verdict.WRONG, Verdict.FAILED)


def test_score_below_one_is_wrong(checker: Checker) -> None:
    answer = f"x{entry('chain_sum')['answer']}"
    assert 0 < create_generator("chain_sum", 3).score_answer(answer, entry("chain_sum")) < 1
    assert score(checker, "chain_sum", answer) is Verdict.WRONG


def test_scorer_that_raises_is_wrong(checker: Checker) -> None:
    with pytest.raises(ValueError):
        create_generator("prime_factorization", 3).score_answer("junk", entry("prime_factorization"))
    assert score(checker, "prime_factorization", "junk") is Verdict.FAILED


@pytest.mark.parametrize(
    "attack",
    [
        "open({path!r}, 'w').write('x')",
        "__import__('os').system('touch {path}')",
        "__import__('subprocess').run(['touch', {path!r}])",
        "setattr(BinaryMatrixDataset, 'score_answer', lambda *_: 1.0)",
        "globals().update(eval=lambda _: [[1]])",
        "__import__('os')._exit(1)",
        "exit(1)",
    ],
)
def test_answers_that_are_code_do_no_harm(checker: Checker, tmp_path: Path, attack: str) -> None:
    path = tmp_path / "written"
    # The scorer evaluates what looks like a list.
    answer = f"[{attack.format(path=str(path))}]"
    assert score(checker, "binary_matrix", answer) in (Verdict.WRONG, Verdict.FAILED)
    assert not path.exists()
    assert score(checker, "binary_matrix", "[[7]]") is Verdict.WRONG
    assert score(checker, "binary_matrix", entry("binary_matrix")["answer"]) is Verdict.RIGHT


def test_secrets_of_the_parent_are_not_in_its_environment(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEAR_SECRET", "1")
    own = Checker(timeout_s=60, num_workers=1)
    asyncio.run(own.score(0, {}, "1"))
    process = own._workers[0]._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    own.close()
    assert b"SPEAR_SECRET" not in environment


def test_hostile_answers_end_at_the_limit_and_others_are_checked_after_them() -> None:
    checker = Checker(modules=["math_verify"], timeout_s=2.0, num_workers=2)
    hostile = ["9^{9^{9^{9}}}", "{" * 400 + "1" + "}" * 400]

    async def run() -> tuple[list[Verdict], Verdict]:
        verdicts = await asyncio.gather(*(checker.equal("1/3", answer) for answer in hostile))
        return verdicts, await checker.equal("1/2", r"\frac{1}{2}")

    try:
        verdicts, after = asyncio.run(run())
    finally:
        checker.close()
    assert verdicts == [Verdict.TIMED_OUT] * 2
    assert after is Verdict.RIGHT


def test_deep_nesting_is_no_right_answer(checker: Checker) -> None:
    for answer in (r"\frac{1}{" * 60 + "1" + "}" * 60, "^" * 900, r"\sqrt" * 200, "\x00\ud800"):
        assert asyncio.run(checker.equal("1/3", answer)) is not Verdict.RIGHT


def test_the_event_loop_goes_on_during_a_check(checker: Checker) -> None:
    async def run() -> int:
        check = asyncio.ensure_future(checker.equal("1/3", "x" * 300))
        turns = 0
        while not check.done():
            turns += 1
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(run()) > 10


def test_a_cancelled_check_leaves_the_worker_usable(checker: Checker) -> None:
    async def run() -> Verdict:
        check = asyncio.ensure_future(checker.equal("1/3", "x" * 300))
        await asyncio.sleep(0.01)
        check.cancel()
        await asyncio.gather(check, return_exceptions=True)
        return await checker.equal("1/2", r"\frac{1}{2}")

    assert asyncio.run(run()) is Verdict.RIGHT


def test_a_killed_worker_is_replaced_and_the_last_one_ends_with_the_checker() -> None:
    checker = Checker(timeout_s=60, num_workers=1)
    processes = []
    for _ in range(2):
        # There is no dataset: the quickest of answers.
        assert asyncio.run(checker.score(0, {}, "1")) is Verdict.FAILED
        process = checker._workers[0]._process
        assert process is not None
        processes.append(process)
        if len(processes) == 1:
            os.kill(process.pid, 9)
            process.wait()
    checker.close()
    assert processes[0] is not processes[1]
    assert processes[1].poll() is not None


def test_what_cannot_start_is_an_error_and_so_is_use_after_close() -> None:
    broken = Checker(modules=["no_such_module"], timeout_s=1, num_workers=1)
    with pytest.raises(TaskError, match=r"did not start with.*no_such_module"):
        asyncio.run(broken.equal("1/2", "0.5"))
    broken.close()
    with pytest.raises(TaskError, match="was closed"):
        asyncio.run(broken.equal("1/2", "0.5"))
