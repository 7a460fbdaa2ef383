"""Trajectories a person can read: one Markdown and one JSONL file per saved step."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spear_fast.types import Group, Trajectory

SAMPLES_FOLDER = "samples"
"""Name of the folder in a run's folder."""


def pick_samples(groups: Sequence[Group], count: int) -> list[Trajectory]:
    """Return `count` trajectories at even distances in the order of reward, from the worst to the best.

    A fixed rule, so that what is shown is neither the best nor the luckiest. Fewer trajectories are returned whole.
    """
    ordered = sorted(
        (trajectory for group in groups for trajectory in group.trajectories),
        key=lambda trajectory: (trajectory.reward, trajectory.uid),
    )
    if len(ordered) <= count:
        return ordered
    if count == 1:
        return [ordered[len(ordered) // 2]]
    return [ordered[round(rank * (len(ordered) - 1) / (count - 1))] for rank in range(count)]


def write_samples(run_folder: Path, step: int, trajectories: Sequence[Trajectory]) -> Path:
    """Write samples/step_<step>.md and .jsonl under `run_folder` and return the path of the former.

    Sampled text is untrusted: in the Markdown it stands in fences that it cannot close, and control, format and
    direction characters are shown as escapes.
    """
    folder = run_folder / SAMPLES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step_{step:06d}"
    lines = [json.dumps(_record(step, trajectory), default=str) + "\n" for trajectory in trajectories]
    (folder / f"{stem}.jsonl").write_text("".join(lines), encoding="utf-8")
    page = [f"# Samples of step {step}", *(_page_of(trajectory) for trajectory in trajectories)]
    path = folder / f"{stem}.md"
    path.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return path


def _record(step: int, trajectory: Trajectory) -> dict[str, Any]:
    return {
        "step": step,
        "uid": trajectory.uid,
        "group_id": trajectory.group_id,
        "sample": trajectory.sample,
        "task": asdict(trajectory.task),
        "task_type": trajectory.task_type,
        "version": trajectory.version,
        "status": trajectory.status.value,
        "error": trajectory.error,
        "success": trajectory.success,
        "reward": trajectory.reward,
        "outcome_reward": trajectory.outcome_reward,
        "intrinsic_reward": trajectory.intrinsic_reward,
        "tool_calls": trajectory.num_tool_calls,
        "tokens": len(trajectory.tokens),
        "rows": len(trajectory.row_starts),
        "action_tokens": trajectory.num_action_tokens,
        "filtered": trajectory.filtered,
        "turn_advantages": _turn_advantages(trajectory),
        "messages": trajectory.messages,
    }


def _turn_advantages(trajectory: Trajectory) -> list[float] | None:
    """Mean advantage over the sampled tokens of each turn; None before advantages exist."""
    advantages = trajectory.advantages
    if advantages is None:
        return None
    return [float(advantages[turn.start : turn.end].mean()) for turn in trajectory.turns if turn.end > turn.start]


def _in_rows(trajectory: Trajectory) -> str:
    count = len(trajectory.row_starts)
    return f", in {count} rows" if count > 1 else ""


def _page_of(trajectory: Trajectory) -> str:
    task = trajectory.task
    advantages = _turn_advantages(trajectory)
    facts = [
        f"status {trajectory.status.value}" + ("" if trajectory.error is None else f": {_inline(trajectory.error)}"),
        "success" if trajectory.success else "no success",
        f"reward {trajectory.reward:.3f} (outcome {trajectory.outcome_reward:.3f}, "
        f"intrinsic {trajectory.intrinsic_reward:.3f})",
        f"{trajectory.num_tool_calls} tool calls, {trajectory.num_action_tokens} of {len(trajectory.tokens)} "
        f"tokens sampled{_in_rows(trajectory)}",
    ]
    if advantages is not None:
        facts.append("advantage per turn " + ", ".join(f"{value:+.3f}" for value in advantages))
    if trajectory.filtered is not None:
        facts.append(f"left out of the loss: {_inline(trajectory.filtered)}")
    title = f"## {_inline(task.name)} {_inline(task.split)} {task.index}, sample {trajectory.sample}"
    return "\n\n".join([title, "\n".join(f"- {fact}" for fact in facts), *map(_message, trajectory.messages)])


def _message(message: dict[str, Any]) -> str:
    content = message.get("content")
    parts = [f"**{_inline(str(message.get('role', 'unknown')))}**"]
    if content:
        parts.append(_fenced(content if isinstance(content, str) else json.dumps(content, default=str, indent=1)))
    extra = {key: value for key, value in message.items() if key not in ("role", "content")}
    if extra:
        parts.append(_fenced(json.dumps(extra, default=str, indent=1, ensure_ascii=False)))
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    """Text in a fence longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{_visible(text)}\n{fence}"


def _inline(text: str) -> str:
    """One line of text with every character escaped that Markdown or HTML may give a meaning."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~&$-])", r"\\\1", _visible(text).replace("\n", " "))


def _visible(text: str) -> str:
    """Show control, format, surrogate and unassigned characters and odd line separators as escapes."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
        else f"\\u{ord(character):04x}"
        for character in text
    )
