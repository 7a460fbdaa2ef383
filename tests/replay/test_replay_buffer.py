"""The replay buffer and the baseline FIFO against plain lists."""

from __future__ import annotations

import io
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.errors import CheckpointError, ConfigError
from spear_fast.replay.baseline import BaselineQueue, group_statistics
from spear_fast.replay.buffer import ReplayBuffer
from spear_fast.types import Group, Row, Status, Task, Trajectory

TASK = Task("calculator", "train", 0, seed=0)
FLOATS = st.floats(-2, 2, width=32)
TOKENS = st.lists(st.tuples(st.integers(0, 99), st.booleans(), FLOATS, FLOATS, FLOATS), max_size=6)


def make_row(uid: int, version: int, tokens: list[tuple[int, bool, float, float, float]], weighted: bool = True) -> Row:
    columns = zip(*[*tokens, (5, True, -0.5, 0.75, 2.0)], strict=True)
    dtypes = (np.int32, bool, np.float32, np.float32, np.float32)
    ids, mask, old_logp, advantages, weight = (np.array(c, dtype=d) for c, d in zip(columns, dtypes, strict=True))
    return Row(uid, uid // 2, version, ids, mask, old_logp, advantages, uid / 7, weight=weight if weighted else None)


ROWS = st.lists(st.builds(make_row, st.integers(0, 2**40), st.integers(0, 9), TOKENS, st.booleans()), max_size=8)


def same(left: Row, right: Row) -> bool:
    names = ("tokens", "action_mask", "old_logp", "advantages")
    arrays = all(np.array_equal(getattr(left, n), getattr(right, n)) for n in names)
    types = all(getattr(left, n).dtype == getattr(right, n).dtype for n in names)
    weights = (left.weight is None) == (right.weight is None) and (
        left.weight is None or np.array_equal(left.weight, right.weight)  # type: ignore[arg-type]
    )
    scalars = [(r.uid, r.group_id, r.version, r.reward) for r in (left, right)]
    return arrays and types and weights and scalars[0] == scalars[1]


def saved_and_loaded(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    file = io.BytesIO()
    np.savez(file, **state)  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


@given(st.lists(ROWS, max_size=4), st.data())
def test_gives_back_what_was_kept(blocks: list[list[Row]], data: st.DataObject) -> None:
    buffer, kept = ReplayBuffer(), []
    for rows in blocks:
        buffer.push(rows)
        kept += rows
        mask = data.draw(st.lists(st.booleans(), min_size=len(kept), max_size=len(kept)))
        buffer.keep(np.array(mask, dtype=bool))
        kept = [row for row, stays in zip(kept, mask, strict=True) if stays]
    assert len(buffer) == len(kept)
    order = data.draw(st.permutations(range(len(kept))))
    assert all(same(got, kept[i]) for got, i in zip(buffer.take(np.array(order, dtype=int)), order, strict=True))
    assert buffer.versions.tolist() == [row.version for row in kept]
    assert buffer.rewards.tolist() == [row.reward for row in kept]
    means = [statistics.fmean(row.advantages[row.action_mask].tolist()) for row in kept]
    assert buffer.advantages.tolist() == pytest.approx(means, abs=1e-12)


@given(ROWS)
def test_survives_saving(rows: list[Row]) -> None:
    buffer, restored = ReplayBuffer(), ReplayBuffer()
    buffer.push(rows)
    restored.push([make_row(1, 1, [])])
    restored.load_state_dict(saved_and_loaded(buffer.state_dict()))
    assert all(same(a, b) for a, b in zip(restored.take(np.arange(len(rows))), rows, strict=True))
    assert restored.advantages.tolist() == buffer.advantages.tolist()


def test_rows_taken_are_copies() -> None:
    buffer = ReplayBuffer()
    buffer.push([make_row(1, 1, [])])
    buffer.take(np.array([0]))[0].advantages[:] = 9
    assert buffer.take(np.array([0]))[0].advantages.tolist() == [0.75]


def test_memory_is_counted_and_freed() -> None:
    buffer = ReplayBuffer()
    buffer.push([make_row(uid, 0, [(1, False, 0.0, 0.0, 1.0)] * 9) for uid in range(50)])
    assert buffer.num_bytes == 50 * (10 * 17 + 48)
    buffer.clear()
    assert (len(buffer), buffer.num_bytes) == (0, 0)


def test_pushing_and_evicting_whole_steps_moves_nothing() -> None:
    buffer = ReplayBuffer()
    for version in range(4):
        buffer.push([make_row(uid, version, []) for uid in range(version + 1)])
    held = [block.tokens["tokens"] for block in buffer._blocks]
    buffer.keep(buffer.versions >= 2)
    buffer.push([make_row(9, 4, [])])
    kept = [block.tokens["tokens"] for block in buffer._blocks]
    assert [kept[0] is held[2], kept[1] is held[3], len(kept)] == [True, True, 3]


def test_weights_of_one_take_no_memory() -> None:
    buffer, restored = ReplayBuffer(), ReplayBuffer()
    buffer.push([make_row(uid, 0, [], weighted=False) for uid in range(50)])
    assert buffer.num_bytes == 50 * (13 + 48)
    assert buffer.state_dict()["weight"].tolist() == [1.0] * 50
    restored.load_state_dict(buffer.state_dict())
    assert restored.num_bytes == buffer.num_bytes
    assert restored.take(np.array([7]))[0].weight is None


def test_a_loaded_buffer_does_not_change_with_the_state() -> None:
    buffer = ReplayBuffer()
    buffer.push([make_row(1, 1, [])])
    state = buffer.state_dict()
    buffer.load_state_dict(state)
    state["advantages"][:] = 9
    assert buffer.take(np.array([0]))[0].advantages.tolist() == [0.75]


def test_rows_that_cannot_be_replayed_are_refused() -> None:
    no_action = make_row(3, 0, [])
    no_action.action_mask[:] = False
    short = make_row(4, 0, [])
    short.old_logp = np.zeros(0, dtype=np.float32)
    for row in (no_action, short):
        with pytest.raises(ValueError, match=f"uid={row.uid} has"):
            ReplayBuffer().push([row])


def test_a_damaged_state_is_refused_and_changes_nothing() -> None:
    buffer = ReplayBuffer()
    buffer.push([make_row(1, 1, []), make_row(2, 2, [])])
    state = buffer.state_dict()
    damaged = [
        {key: value for key, value in state.items() if key != "uid"},
        {**state, "extra": state["uid"]},
        {**state, "tokens": state["tokens"][:-1]},
        {**state, "reward": state["reward"][:-1]},
        {**state, "offsets": state["offsets"][:-1]},
        {**state, "offsets": state["offsets"][::-1].copy()},
        {**state, "old_logp": state["old_logp"].astype(np.float64)},
    ]
    for broken in damaged:
        with pytest.raises(CheckpointError, match="replay buffer"):
            buffer.load_state_dict(broken)
    assert len(buffer) == 2


@given(st.integers(1, 6), st.lists(st.lists(st.floats(-1, 1), max_size=4), max_size=5))
def test_baseline_keeps_the_newest(capacity: int, blocks: list[list[float]]) -> None:
    queue = BaselineQueue(capacity)
    for block in blocks:
        queue.push(np.array(block), np.array(block) + 5)
    newest = [value for block in blocks for value in block][-capacity:]
    restored = BaselineQueue(capacity)
    restored.load_state_dict(saved_and_loaded(queue.state_dict()))
    for one in (queue, restored):
        assert len(one) == len(newest)
        if newest:
            assert one.median_mean() == pytest.approx(statistics.median(newest))
            assert one.median_std() == pytest.approx(statistics.median(newest) + 5)


def test_baseline_refusals() -> None:
    with pytest.raises(ConfigError, match="baseline_size=0"):
        BaselineQueue(0)
    queue = BaselineQueue(3)
    with pytest.raises(ValueError, match="baseline is empty"):
        queue.median_mean()
    with pytest.raises(ValueError, match="2 means but 1"):
        queue.push(np.zeros(2), np.zeros(1))
    with pytest.raises(CheckpointError, match="reward baseline"):
        queue.load_state_dict({"means": np.zeros(2), "stds": np.zeros(1)})


def test_a_smaller_baseline_restores_the_newest() -> None:
    large, small = BaselineQueue(5), BaselineQueue(2)
    large.push(np.arange(5.0), np.arange(5.0))
    small.load_state_dict(large.state_dict())
    assert small.median_mean() == 3.5


@given(st.lists(st.lists(st.floats(-2, 2, allow_subnormal=False), max_size=5), max_size=5))
def test_group_statistics(rewards: list[list[float]]) -> None:
    groups = []
    for members in rewards:
        made = [Trajectory(TASK, 0, 0, 0, 0, reward=reward) for reward in members]
        groups.append(Group(0, TASK, [*made, Trajectory(TASK, 0, 0, 0, 0, reward=50.0, status=Status.ENV_ERROR)]))
    means, stds = group_statistics(groups)
    filled = [members for members in rewards if members]
    assert means.tolist() == pytest.approx([statistics.fmean(members) for members in filled], abs=1e-12)
    expected = [statistics.stdev(members) if len(members) > 1 else 1.0 for members in filled]
    assert stds.tolist() == pytest.approx(expected, abs=1e-9)


@given(st.floats(-2, 2), st.integers(1, 16))
def test_the_mean_of_equal_rewards_is_that_reward(reward: float, size: int) -> None:
    means, _ = group_statistics([Group(0, TASK, [Trajectory(TASK, 0, 0, 0, 0, reward=reward)] * size)])
    assert means.tolist() == [reward]
