"""Expert demonstrations for the cold start: played through the same episodes, then rendered to training rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spear_fast.data.prompts import make_task
from spear_fast.envs.base import Demonstrator, Environment, TaskSet, Tool
from spear_fast.errors import TaskError
from spear_fast.rollout.episode import Episode, EpisodeLimits
from spear_fast.rollout.history import History, HistoryRule
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Row, Task, Trajectory, row_uid

if TYPE_CHECKING:
    from spear_fast.data.chat import Chat

Messages = list[dict[str, Any]]

_END = 256

LIMITS = EpisodeLimits(
    max_turns=1,
    max_turn_tokens=1 << 16,
    max_tokens=1 << 20,
    temperature=1.0,
    tool_timeout_s=30.0,
    tool_retries=0,
    env_timeout_s=60.0,
    max_observation_chars=1 << 20,
)
"""Of demonstrations, but for their turns: no expert comes near these numbers of tokens."""


class _Utf8Chat:
    """Tokens are bytes: enough to play an episode before any tokenizer exists."""

    stop_ids: tuple[int, ...] = (_END,)
    end_of_turn = _END

    def prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        return [_END]

    def continuation(self, messages: Sequence[dict[str, Any]], ended: bool) -> list[int]:
        return [_END]

    def rewrites(self, messages: Sequence[dict[str, Any]], num_new: int) -> bool:
        return False

    def decode(self, tokens: Sequence[int]) -> tuple[str, bool]:
        return bytes(token for token in tokens if token != _END).decode(), True


class _ExpertTasks:
    """A task set of one environment, whose expert answers the requests."""

    def __init__(self, tasks: TaskSet) -> None:
        self.name = tasks.name
        self.system_prompt = tasks.system_prompt
        self.tools: Sequence[Tool] = tasks.tools
        self._environment = tasks.make()

    def size(self, split: str) -> int:
        return 1

    def make(self) -> Environment:
        return self._environment

    @property
    def knows(self) -> bool:
        """Whether there is an expert; without one he says nothing."""
        return isinstance(self._environment, Demonstrator)

    def reply(self, _: object) -> list[int]:
        text = self._environment.expert() if isinstance(self._environment, Demonstrator) else ""
        return [*text.encode(), _END]


def demonstrate(
    tasks: TaskSet, count: int, *, max_turns: int, seed: int, limits: EpisodeLimits = LIMITS
) -> list[Messages]:
    """Let the expert solve `count` tasks of the demo split, or all of it if it has fewer; see `demonstrations`.

    Returns:
        One transcript per task, in OpenAI's message shape.
    """
    made = demonstrations(tasks, count, max_turns=max_turns, seed=seed, limits=limits)
    return [messages for _, messages in made]


def demonstrations(
    tasks: TaskSet, count: int, *, max_turns: int, seed: int, limits: EpisodeLimits = LIMITS
) -> Iterator[tuple[Task, Messages]]:
    """Yield the first `count` tasks of the demo split, or all of it if it has fewer, and how the expert solved each.

    Time limits and the longest observation are those of `limits`, so that what is taught can be what rollouts show.

    Raises:
        TaskError: The environment has no `expert`, or its expert failed.
    """
    if not isinstance(tasks.make(), Demonstrator):
        raise TaskError(
            f"task set {tasks.name!r} has no expert(), so there is nothing to cold-start from; set "
            "cold_start.demos_file to demonstrations from elsewhere, or cold_start.steps=0 and model.path to a model "
            "that can already act"
        )
    split, size = demo_split(tasks)
    limits = replace(limits, max_turns=max_turns)
    # One event loop for all: what an environment keeps between episodes may belong to its loop.
    with asyncio.Runner() as runner:
        for index in range(min(count, size)):
            task = make_task(tasks.name, split, index, seed)
            yield task, runner.run(_demonstrate_one(tasks, task, limits))


def demo_split(tasks: TaskSet) -> tuple[str, int]:
    """Return the split that demonstrations are made of, "demo" or, where there is none, "train", and its size."""
    try:
        size = tasks.size("demo")
    except TaskError:
        size = 0
    return ("demo", size) if size else ("train", tasks.size("train"))


def opening(tasks: TaskSet, seed: int) -> tuple[Task, Messages]:
    """Return the first task of the demo split, its opening messages and, where there is an expert, his first message.

    Raises:
        TaskError: The task cannot be started.
    """
    split, size = demo_split(tasks)
    if not size:
        raise TaskError(f"split {split!r} of task set {tasks.name!r} is empty")
    task, expert = make_task(tasks.name, split, 0, seed), _ExpertTasks(tasks)
    trajectory = Trajectory(task, group_id=0, sample=0, uid=0, version=0)
    limits = replace(LIMITS, max_turns=1)
    asyncio.run(Episode(trajectory, expert, ScriptedEngine(expert.reply), _Utf8Chat(), limits, seed=0).run())
    roles = [message["role"] for message in trajectory.messages]
    if "assistant" not in roles:
        raise TaskError(f"task set {tasks.name!r}: {split} task 0 cannot be started: {trajectory.error}")
    said = roles.index("assistant") + int(expert.knows)
    return task, trajectory.messages[:said]


async def _demonstrate_one(tasks: TaskSet, task: Task, limits: EpisodeLimits) -> Messages:
    expert = _ExpertTasks(tasks)
    trajectory = Trajectory(task, group_id=0, sample=0, uid=0, version=0)
    await Episode(trajectory, expert, ScriptedEngine(expert.reply), _Utf8Chat(), limits, seed=0).run()
    if not trajectory.success:
        raise TaskError(
            f"the expert of {tasks.name!r} failed on {task.split} task {task.index} within rollout.max_turns="
            f"{limits.max_turns} ({trajectory.error or trajectory.status.value}); raise rollout.max_turns or mend it"
        )
    return trajectory.messages


def demonstration_text(messages: Messages) -> str:
    """Return a transcript as plain text, for training a tokenizer."""
    return "\n".join(f"{message['role']}\n{message['content']}" for message in messages)


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message of a transcript is to be imitated: the assistant's are, but for those with `weight` 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def demonstration_rows(messages: Messages, chat: Chat, uid: int, history: HistoryRule) -> list[Row]:
    """Return a transcript as training rows: action tokens are those of the messages to learn, with advantage 1.

    The tokens are those that rollout would have produced under the same `history`: opening, message, what follows, ...
    Assistant's messages before the first one to learn belong to the opening, as those of a few-shot prompt do.
    Row k has uid `row_uid(uid, k)`; all have the group id `uid`. Rows with nothing to learn are left out.
    """
    first = next(index for index, message in enumerate(messages) if is_learned(message))
    feed = History(chat, history)
    rows = [_Draft(feed.open(messages[:first]))]
    num_new = 0
    for index, message in enumerate(messages[first:], start=first):
        if message["role"] != "assistant":
            num_new += 1
            continue
        if num_new:
            fed = feed.follow(messages[:index], num_new, ended=True)
            if fed.new_row:
                rows.append(_Draft(fed.tokens))
            else:
                rows[-1].append(fed.tokens, spoken=False)
        rows[-1].append(chat.message(message["content"]), spoken=is_learned(message))
        num_new = 0
    made = [row.finished(row_uid(uid, part), group_id=uid) for part, row in enumerate(rows)]
    return [row for row in made if row.action_mask.any()]


class _Draft:
    """A row being written."""

    def __init__(self, prompt: list[int]) -> None:
        self._tokens: list[int] = []
        self._mask: list[bool] = []
        self.append(prompt, spoken=False)

    def append(self, tokens: list[int], *, spoken: bool) -> None:
        self._tokens += tokens
        self._mask += [spoken] * len(tokens)

    def finished(self, uid: int, group_id: int) -> Row:
        action_mask = np.array(self._mask)
        return Row(
            uid=uid,
            group_id=group_id,
            version=0,
            tokens=np.array(self._tokens, dtype=np.int32),
            action_mask=action_mask,
            old_logp=np.zeros(len(self._tokens), dtype=np.float32),
            advantages=action_mask.astype(np.float32),
        )
