"""Dr.BoT filters against counting by hand."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.losses import keep_top_groups, mark_filtered
from spear_fast.types import Group, Status, Task, Trajectory, Turn

TASK = Task("calculator", "train", 0, seed=0)
ALL = {"overlong": True, "incomplete": True, "repetitive": True, "unreadable": True, "ngram": 20, "max_repeats": 10}
MESSAGES = st.lists(st.lists(st.integers(0, 2), max_size=30), max_size=4)


def trajectory(messages: list[list[int]], observation: list[int] | None = None, **fields: object) -> Trajectory:
    made = Trajectory(TASK, 0, 0, 0, 0, tokens=[9], action_mask=[False], answered=True)
    for message in messages:
        made.tokens += [*(observation or []), *message]
        made.action_mask += [False] * len(observation or []) + [True] * len(message)
        made.turns.append(Turn(len(made.tokens) - len(message), len(made.tokens)))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def mark(made: Trajectory, **settings: object) -> str | None:
    mark_filtered([Group(0, TASK, [made])], **{**ALL, **settings})  # type: ignore[arg-type]
    return made.filtered


def slow_ngram_count(messages: list[list[int]], ngram: int) -> int:
    runs = Counter(tuple(m[i : i + ngram]) for m in messages for i in range(len(m) - ngram + 1))
    return max(runs.values(), default=0)


@given(MESSAGES, st.integers(1, 9), st.integers(1, 6))
def test_repetitive_looks_at_sampled_tokens_only(messages: list[list[int]], ngram: int, max_repeats: int) -> None:
    made = trajectory(messages, observation=[0] * 100)
    expected = "repetitive" if slow_ngram_count(messages, ngram) >= max_repeats else None
    assert mark(made, ngram=ngram, max_repeats=max_repeats) == expected


@given(st.lists(MESSAGES, max_size=4), st.integers(1, 9), st.integers(1, 6))
def test_trajectories_are_judged_one_by_one(texts: list[list[list[int]]], ngram: int, max_repeats: int) -> None:
    members = [trajectory(messages, observation=[0] * 3) for messages in texts]
    stats = mark_filtered([Group(0, TASK, members)], **{**ALL, "ngram": ngram, "max_repeats": max_repeats})  # type: ignore[arg-type]
    expected = [slow_ngram_count(messages, ngram) >= max_repeats for messages in texts]
    assert [member.filtered == "repetitive" for member in members] == expected
    assert stats["filter/repetitive_frac"] == pytest.approx(sum(expected) / max(len(texts), 1))


def test_repetition_that_is_not_asked_for_is_not_marked() -> None:
    assert mark(trajectory([list(range(20)) * 10]), repetitive=False) is None


def test_twenty_tokens_ten_times() -> None:
    phrase = list(range(20))
    assert mark(trajectory([phrase * 10])) == "repetitive"
    assert mark(trajectory([phrase * 9])) is None
    assert mark(trajectory([phrase] * 10)) == "repetitive"
    assert mark(trajectory([phrase[:19]] * 40)) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"status": Status.TRUNCATED}, "overlong"),
        ({"answered": False}, "incomplete"),
        ({"answered": False, "num_tool_calls": 1}, None),
        ({"readable": False}, "unreadable"),
        ({"status": Status.TRUNCATED, "answered": False, "readable": False}, "overlong"),
        ({"answered": False, "readable": False}, "incomplete"),
        ({"status": Status.ENV_ERROR, "readable": False}, None),
        ({}, None),
    ],
)
def test_reasons_and_their_order(fields: dict[str, object], reason: str | None) -> None:
    assert mark(trajectory([[1, 2]], **fields)) == reason


@pytest.mark.parametrize(
    ("switch", "fields"),
    [
        ("overlong", {"status": Status.TRUNCATED}),
        ("incomplete", {"answered": False}),
        ("unreadable", {"readable": False}),
    ],
)
def test_a_filter_that_is_off_clears_the_mark(switch: str, fields: dict[str, object]) -> None:
    made = trajectory([[1, 2]], filtered="overlong", **fields)
    assert mark(made, **{switch: False}) is None


def test_statistics_are_shares_of_usable_trajectories() -> None:
    members = [
        trajectory([[1]], readable=False),
        trajectory([[1]], answered=False),
        trajectory([[1]]),
        trajectory([[1]], answered=False),
        trajectory([[1]], status=Status.ENGINE_ABORT),
    ]
    stats = mark_filtered([Group(0, TASK, members)], **ALL)  # type: ignore[arg-type]
    assert stats == {
        "filter/overlong_frac": 0.0,
        "filter/incomplete_frac": 0.5,
        "filter/repetitive_frac": 0.0,
        "filter/unreadable_frac": 0.25,
    }


REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=5)


@given(st.lists(REWARDS, min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_keeps_the_groups_with_most_spread(rewards: list[list[float]], share: float) -> None:
    groups = [Group(i, TASK, [trajectory([], reward=r) for r in members]) for i, members in enumerate(rewards)]
    kept, stats = keep_top_groups(groups, share)
    spreads = [statistics.stdev(members) if len(members) > 1 else 0.0 for members in rewards]
    best = sorted(range(len(groups)), key=lambda i: (-round(spreads[i], 9), i))[
        : max(1, int(share * len(groups) + 1e-9))
    ]
    assert [group.group_id for group in kept] == sorted(best)
    assert stats["filter/groups_kept_frac"] == pytest.approx(len(best) / len(groups))
    assert stats["filter/reward_std_mean"] == pytest.approx(statistics.fmean(spreads))


def test_share_is_not_lost_to_rounding() -> None:
    groups = [Group(i, TASK, [trajectory([], reward=0.1)] * 3) for i in range(100)]
    kept, _ = keep_top_groups(groups, 0.29)
    assert [group.group_id for group in kept] == list(range(29))


def test_equal_rewards_have_no_spread_whatever_their_rounding() -> None:
    groups = [Group(i, TASK, [trajectory([], reward=reward)] * 3) for i, reward in enumerate([1.0, 0.1])]
    assert [group.group_id for group in keep_top_groups(groups, 0.5)[0]] == [0]


def test_many_ties_go_to_the_earlier_groups() -> None:
    pairs = [[0.0, 1.0 + (i * 7) % 3] for i in range(300)]
    groups = [Group(i, TASK, [trajectory([], reward=reward) for reward in pair]) for i, pair in enumerate(pairs)]
    kept, _ = keep_top_groups(groups, 0.5)
    middle = [i for i, pair in enumerate(pairs) if pair[1] == 2.0]
    assert [i for i in middle if i in {group.group_id for group in kept}] == middle[:50]


def test_no_groups() -> None:
    assert keep_top_groups([], 0.75) == ([], {})
