"""Saved samples: complete as data, readable and inert as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from spear_fast.log.samples import pick_samples, write_samples
from spear_fast.types import Group, Status, Task, Trajectory, Turn


def trajectory(uid: int = 0, reward: float = 1.0, messages: list[dict[str, Any]] | None = None) -> Trajectory:
    return Trajectory(
        task=Task("calculator", "train", 17, 5),
        group_id=2,
        sample=uid,
        uid=uid,
        version=3,
        tokens=[1, 2, 3, 4, 5],
        action_mask=[False, True, True, False, True],
        turns=[Turn(1, 3), Turn(4, 5)],
        messages=messages or [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "5"}],
        reward=reward,
        outcome_reward=reward,
        success=reward > 0,
        advantages=np.array([0, 0.5, 0.5, 0, -1], dtype=np.float32),
    )


def group_of(rewards: list[float]) -> list[Group]:
    return [
        Group(0, Task("calculator", "train", 17, 5), [trajectory(uid, reward) for uid, reward in enumerate(rewards)])
    ]


def test_the_record_holds_what_was_trained_on(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 10, [trajectory()])
    assert path == tmp_path / "samples" / "step_000010.md"
    record = json.loads(path.with_suffix(".jsonl").read_text())
    assert record["task"] == {"name": "calculator", "split": "train", "index": 17, "seed": 5}
    assert (record["status"], record["reward"], record["success"]) == ("ok", 1.0, True)
    assert (record["tokens"], record["action_tokens"]) == (5, 3)
    assert record["turn_advantages"] == [0.5, -1.0]
    assert record["messages"] == trajectory().messages


def test_the_page_tells_the_story(tmp_path: Path) -> None:
    failed = trajectory(uid=4, reward=0.0)
    failed.status, failed.error, failed.filtered = Status.TRUNCATED, "too <long>", "overlong"
    failed.advantages = None
    page = write_samples(tmp_path, 1, [trajectory(), failed]).read_text()
    for text in ("What is 2 + 3?", "status ok", "reward 1.000", "advantage per turn +0.500, -1.000", "sample 4"):
        assert text in page
    assert "status truncated: too \\<long\\>" in page
    assert "left out of the loss: overlong" in page


@given(
    content=st.text() | st.sampled_from(["```", "````\n# x", "</pre><script>", "\x1b[31m", "\u202e", "\ud800", "`" * 9])
)
def test_sampled_text_cannot_leave_its_fence(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    """Rendered, the page has the same structure whatever was sampled: the text is the content of one code block."""
    message = {"role": "assistant", "content": f"a\n{content}\na", "tool_calls": [{"name": content}]}
    path = write_samples(tmp_path_factory.mktemp("run"), 1, [trajectory(messages=[message])])
    page = path.read_text(encoding="utf-8")
    fences = [token for token in MarkdownIt().parse(page) if token.type == "fence"]
    assert len(fences) == 2
    assert fences[0].content.startswith("a\n")
    assert fences[0].content.endswith("\na\n")
    assert fences[0].content.count("\n") == content.count("\n") + 3
    assert not any(token.type in ("html_block", "html_inline") for token in MarkdownIt().parse(page))
    assert not set(page) & set("\x1b\r\u202e\u2028")
    assert json.loads(path.with_suffix(".jsonl").read_text())["messages"] == [message]


@given(error=st.text(min_size=1))
def test_an_error_stays_one_line_of_text(tmp_path_factory: pytest.TempPathFactory, error: str) -> None:
    failed = trajectory()
    failed.error = "e" + error + "e"
    page = write_samples(tmp_path_factory.mktemp("run"), 1, [failed]).read_text(encoding="utf-8")
    kinds = {child.type for token in MarkdownIt().parse(page) for child in token.children or []}
    assert kinds <= {"text", "text_special", "softbreak", "strong_open", "strong_close"}


@given(rewards=st.lists(st.floats(0, 1), max_size=20), count=st.integers(1, 6))
def test_picks_span_worst_to_best(rewards: list[float], count: int) -> None:
    picked = [each.reward for each in pick_samples(group_of(rewards), count)]
    assert len(picked) == min(count, len(rewards))
    assert picked == sorted(picked)
    if len(picked) > 1:
        assert (picked[0], picked[-1]) == (min(rewards), max(rewards))


def test_picks_are_distinct_and_even() -> None:
    picked = pick_samples(group_of([float(reward) for reward in range(9)]), 3)
    assert [each.reward for each in picked] == [0.0, 4.0, 8.0]
    assert [each.reward for each in pick_samples(group_of([0.0, 1.0, 2.0]), 1)] == [1.0]
