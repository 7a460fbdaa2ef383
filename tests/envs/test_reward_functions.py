"""The built-in rewards on answers as models write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.envs.reward_functions import exact_match, numeric_match


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris", 1),
        ("<think>London?</think>Paris", "Paris", 1),
        ("<think>x</think>The city:<answer> Paris </answer>", "Paris", 1),
        ("<answer>London</answer><answer>Paris</answer>", "Paris", 1),
        ("paris", "Paris", 0),
        ("It is Paris", "Paris", 0),
        ("<answer>Paris</answer>", "We look at a map.\n#### Paris", 1),
        ("7", 7, 1),
    ],
)
def test_exact_match(completion: str, reference: object, reward: float) -> None:
    assert exact_match(completion, ground_truth=reference) == reward


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("72", "72", 1),
        ("It costs $1,234.50.", "1234.5", 1),
        ("so 3 + 4 = 7.", "7", 1),
        ("<answer>-5</answer>", -5, 1),
        ("2-5", "5", 1),
        ("2-5", "-5", 0),
        ("(1)-5", "5", 1),
        ("5e2", "500", 1),
        (".5", "0.50", 1),
        ("<think>72</think>71", "72", 0),
        ("<think>71</think>72", "Half of 144.\n#### 72", 1),
        ("none", "72", 0),
        ("", "72", 0),
        ("1e99999999999999999999", "72", 0),
        ("1e999999999", "72", 0),
    ],
)
def test_numeric_match(completion: str, reference: object, reward: float) -> None:
    assert numeric_match(completion, ground_truth=reference) == reward


def test_reference_without_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no number; use the reward exact_match"):
        numeric_match("1", ground_truth="Paris")


@given(st.integers(), st.integers())
def test_numeric_match_is_equality_of_integers(answer: int, reference: int) -> None:
    assert numeric_match(f"<answer>{answer:,}</answer>", ground_truth=str(reference)) == (answer == reference)
    assert numeric_match(f"the answer is {answer}", ground_truth=answer) == 1


@given(st.text(max_size=60))
def test_no_completion_raises(completion: str) -> None:
    assert numeric_match(completion, ground_truth="12345678901234567890123") in (0.0, 1.0)
    assert exact_match(completion, ground_truth="\0") in (0.0, 1.0)
