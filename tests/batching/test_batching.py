"""Packing loses and duplicates nothing; collate aligns every token with its values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.batching import Counts, collate, count, pack, rows_from_groups, split
from spear_fast.types import Group, Row, Status, Task, Trajectory, split_row_uid

TASK = Task("calculator", "train", 0, seed=0)
MASKS = st.lists(st.booleans(), max_size=8).map(lambda tail: [False, *tail])


def make_row(uid: int, mask: list[bool], **fields: np.ndarray | None) -> Row:
    """A row whose values tell where they came from: value at token t of row u is 100 * u + t, give or take a sign."""
    places = 100 * uid + np.arange(len(mask))
    return Row(
        uid=uid,
        group_id=uid // 2,
        version=3,
        tokens=places.astype(np.int32),
        action_mask=np.array(mask),
        old_logp=-places.astype(np.float32),
        advantages=2 * places.astype(np.float32),
        **fields,
    )


def first_fit_decreasing(lengths: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for members in bins:
            if sum(lengths[j] for j in members) + lengths[i] <= budget:
                members.append(i)
                break
        else:
            bins.append([i])
    return [sorted(members) for members in bins]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_pack_is_first_fit_decreasing(lengths: list[int], budget: int) -> None:
    rows = [make_row(i, [False] * length) for i, length in enumerate(lengths)]
    batches = pack(rows, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    assert batches == first_fit_decreasing(lengths, budget)


def test_pack_refuses_an_empty_budget() -> None:
    with pytest.raises(ValueError, match="token_budget=0"):
        pack([], 0)


@given(st.lists(MASKS, min_size=1, max_size=6), st.data())
def test_collate_matches_token_by_token(masks: list[list[bool]], data: st.DataObject) -> None:
    rows = [make_row(uid, mask) for uid, mask in enumerate(masks)]
    index = data.draw(st.permutations(range(len(rows))).map(lambda order: order[: max(1, len(order) // 2)]))
    batch = collate(rows, index, "cpu")
    inputs, positions, bounds, actions = [], [], [0], []
    for i in index:
        rank = 0
        for t, is_action in enumerate(masks[i]):
            if is_action:
                actions.append((len(inputs) - 1, 100 * i + t, -(100 * i + t), 2 * (100 * i + t), i, rank))
                rank += 1
            inputs.append(100 * i + t)
            positions.append(t)
        bounds.append(len(inputs))
    assert batch.input_ids.tolist() == inputs
    assert batch.position_ids.tolist() == positions
    assert batch.segments.start.tolist() == bounds[:-1]
    assert batch.segments.length.tolist() == [len(masks[i]) for i in index] and not batch.segments.shared
    assert batch.row_index.tolist() == list(index)
    columns = (batch.predictors, batch.targets, batch.old_logp, batch.advantages, batch.seq_ids, batch.positions)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == actions
    assert batch.ref_logp is None and batch.weight is None and batch.repeats == ()
    assert batch.versions.tolist() == [3] * len(actions)


@given(st.lists(MASKS, min_size=1, max_size=4))
def test_the_predictor_is_the_token_before_in_the_same_sequence(masks: list[list[bool]]) -> None:
    batch = collate([make_row(uid, mask) for uid, mask in enumerate(masks)], range(len(masks)), "cpu")
    assert (batch.input_ids[batch.predictors] == batch.targets - 1).all()
    assert (batch.position_ids[batch.predictors + 1] == batch.position_ids[batch.predictors] + 1).all()


def test_collate_types() -> None:
    batch = collate([make_row(0, [False, True])], [0], torch.device("cpu"))
    long = ("input_ids", "position_ids", "predictors", "targets", "seq_ids", "positions", "row_index")
    assert {getattr(batch, name).dtype for name in long} == {torch.int64}
    assert (batch.versions.dtype, batch.old_logp.dtype, batch.advantages.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )


def test_optional_values_are_aligned() -> None:
    reference = [np.array([0, -1, -2], dtype=np.float32), np.array([0, -3], dtype=np.float32)]
    rows = [
        make_row(0, [False, False, True], ref_logp=reference[0]),
        make_row(1, [False, True], ref_logp=reference[1], weight=np.array([9, 0.5], dtype=np.float32)),
    ]
    batch = collate(rows, [0, 1], "cpu")
    assert batch.ref_logp is not None and batch.ref_logp.tolist() == [-2.0, -3.0]
    assert batch.weight is not None and batch.weight.tolist() == [1.0, 0.5]


def test_collate_refuses_what_it_cannot_align() -> None:
    with pytest.raises(ValueError, match="uid=7 marks token 0"):
        collate([make_row(7, [True, True])], [0], "cpu")
    with pytest.raises(ValueError, match="1 of 2 rows have ref_logp"):
        collate([make_row(0, [False]), make_row(1, [False], ref_logp=np.zeros(1, np.float32))], [0, 1], "cpu")
    with pytest.raises(ValueError, match="index is empty"):
        collate([], [], "cpu")


@given(st.integers(0, 60), st.none() | st.integers(1, 20), st.integers(0, 2**62))
def test_split_is_an_even_partition(num_rows: int, size: int | None, seed: int) -> None:
    parts = split(num_rows, size, seed)
    assert sorted(i for part in parts for i in part) == list(range(num_rows))
    assert len(parts) == math.ceil(num_rows / (size or max(num_rows, 1)))
    sizes = [len(part) for part in parts]
    assert not sizes or (max(sizes) - min(sizes) <= 1 and max(sizes) <= (size or num_rows))
    assert parts == split(num_rows, size, seed)


def test_split_depends_on_the_seed() -> None:
    assert len({str(split(40, 10, seed)) for seed in range(5)}) == 5


def test_split_refuses_a_size_below_one() -> None:
    with pytest.raises(ValueError, match="mini_batch_size=0"):
        split(3, 0, 0)


@given(st.lists(MASKS, max_size=6))
def test_count(masks: list[list[bool]]) -> None:
    rows = [make_row(uid, mask) for uid, mask in enumerate(masks)]
    assert count(rows) == Counts(sum(sum(mask) for mask in masks), sum(any(mask) for mask in masks))


def trajectory(uid: int, **fields: object) -> Trajectory:
    made = Trajectory(TASK, 5, 0, uid, 2, tokens=[4, 5, 6], action_mask=[False, False, True], logps=[0.0, 0.0, -0.5])
    made.reward = 1.5
    made.advantages = np.array([0, 0, 0.25], dtype=np.float32)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_rows_carry_what_the_loss_reads() -> None:
    (row,) = rows_from_groups([Group(5, TASK, [trajectory(11)])])
    assert (row.uid, row.group_id, row.version, row.reward) == (11, 5, 2, 1.5)
    assert (row.ref_logp, row.weight) == (None, None)
    arrays = {name: getattr(row, name) for name in ("tokens", "action_mask", "old_logp", "advantages")}
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "tokens": [4, 5, 6],
        "action_mask": [False, False, True],
        "old_logp": [0.0, 0.0, -0.5],
        "advantages": [0.0, 0.0, 0.25],
    }
    assert [str(array.dtype) for array in arrays.values()] == ["int32", "bool", "float32", "float32"]


def test_rows_leave_out_what_must_not_be_learnt() -> None:
    members = [
        trajectory(1, status=Status.ENV_ERROR),
        trajectory(2, filtered="overlong"),
        trajectory(3, action_mask=[False] * 3),
        trajectory(4, status=Status.TRUNCATED),
    ]
    groups = [Group(5, TASK, members), Group(6, TASK, [trajectory(5)])]
    assert [row.uid for row in rows_from_groups(groups)] == [4, 5]


def test_a_trajectory_of_several_contexts_gives_a_row_for_each() -> None:
    mask = [False, True, False, False, False, True, False, False, True, True]
    made = trajectory(11, tokens=list(range(10)), action_mask=mask, logps=[-0.1 * i for i in range(10)])
    made.row_starts = [0, 2, 4, 7]
    made.advantages = np.arange(10, dtype=np.float32)
    rows = rows_from_groups([Group(5, TASK, [made, trajectory(12)])])
    assert [row.tokens.tolist() for row in rows] == [[0, 1], [4, 5], [7, 8, 9], [4, 5, 6]], "no row of only a prompt"
    assert [row.action_mask.tolist() for row in rows[:3]] == [[False, True], [False, True], [False, True, True]]
    assert [row.advantages.tolist() for row in rows[:3]] == [[0, 1], [4, 5], [7, 8, 9]]
    assert rows[2].old_logp.tolist() == pytest.approx([-0.7, -0.8, -0.9])
    assert [split_row_uid(row.uid) for row in rows] == [(11, 0), (11, 2), (11, 3), (12, 0)]
    assert rows[0].uid == 11, "the draws of a trajectory of one row must not change"


def test_rows_are_copies() -> None:
    made = trajectory(1)
    rows_from_groups([Group(5, TASK, [made])])[0].advantages[:] = 7
    assert made.advantages is not None and made.advantages.tolist() == [0.0, 0.0, 0.25]


def test_rows_refuse_half_filled_trajectories() -> None:
    with pytest.raises(ValueError, match=r"uid=1 has advantages=None; call advantages\.fill"):
        rows_from_groups([Group(5, TASK, [trajectory(1, advantages=None)])])
    with pytest.raises(ValueError, match=r"lengths \[3, 3, 1, 3\]"):
        rows_from_groups([Group(5, TASK, [trajectory(1, logps=[0.0])])])
