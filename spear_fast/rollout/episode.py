"""One trajectory: the coroutine that lets policy, tools and environment talk, and records every token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from spear_fast.envs.base import Environment, Finishable, Info, TaskSet
from spear_fast.errors import EngineError, TaskError
from spear_fast.rollout.engine import Completion, GenerationRequest
from spear_fast.rollout.history import FULL, History, HistoryRule
from spear_fast.rollout.history import Chat as HistoryChat
from spear_fast.rollout.timeouts import within
from spear_fast.rollout.tool_calls import parse_tool_calls
from spear_fast.rollout.tool_runner import ToolRunner, ToolTimeoutError
from spear_fast.seeds import derive_seed
from spear_fast.types import Status, Trajectory, Turn

if TYPE_CHECKING:
    from spear_fast.envs.base import Tool


class Chat(HistoryChat, Protocol):
    """What an episode needs of data/chat.py."""

    stop_ids: tuple[int, ...]
    end_of_turn: int

    def decode(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Text of sampled tokens, and whether it was readable."""
        ...


class Sampler(Protocol):
    """What an episode needs of an engine."""

    async def generate(self, request: GenerationRequest) -> Completion:
        """Sample one completion; see `Engine.generate`."""
        ...


@dataclass(frozen=True)
class EpisodeLimits:
    """Limits of one trajectory; tokens, seconds and characters as in `RolloutConfig`."""

    max_turns: int
    max_turn_tokens: int
    max_tokens: int
    temperature: float
    tool_timeout_s: float
    tool_retries: int
    env_timeout_s: float
    max_observation_chars: int
    tool_timeouts_s: Mapping[str, float] = field(default_factory=dict)
    tool_concurrency: Mapping[str, int] = field(default_factory=dict)
    history: HistoryRule = FULL
    """`max_tokens` bounds one row under it."""
    top_p: float = 1.0

    def tool_runner(self) -> ToolRunner:
        """Return what runs the tool calls of all trajectories that are under these limits."""
        return ToolRunner(
            timeout_s=self.tool_timeout_s,
            retries=self.tool_retries,
            timeouts_s=self.tool_timeouts_s,
            concurrency=self.tool_concurrency,
        )


class Episode:
    """Runs one trajectory to its end. Whatever fails becomes the trajectory's status, never an exception."""

    def __init__(
        self,
        trajectory: Trajectory,
        tasks: TaskSet,
        engine: Sampler,
        chat: Chat,
        limits: EpisodeLimits,
        seed: int,
        tools: ToolRunner | None = None,
    ) -> None:
        """
        Args:
            trajectory: Empty but for its identity; filled in place.
            tasks: Makes the environment.
            engine: Samples the messages.
            chat: Renders and decodes them.
            limits: Limits of turns, tokens and time.
            seed: Of this trajectory's draws; turn k samples with `derive_seed(seed, k)`.
            tools: Runs the tool calls, those of other trajectories as well; None makes one for this trajectory.
        """
        self.trajectory = trajectory
        self._tasks = tasks
        self._engine = engine
        self._chat = chat
        self._limits = limits
        self._seed = seed
        self._history = History(chat, limits.history)
        self._tools = tools or limits.tool_runner()
        self._anchor: str | None = None

    def again(self, attempt: int) -> Episode:
        """Return the same episode at its beginning, with an empty trajectory and the draws of its repeat `attempt`."""
        old = self.trajectory
        fresh = Trajectory(old.task, old.group_id, old.sample, old.uid, version=0)
        seed = derive_seed(self._seed, "again", attempt)
        return Episode(fresh, self._tasks, self._engine, self._chat, self._limits, seed, self._tools)

    async def run(self) -> Trajectory:
        """Play the episode and return the filled trajectory."""
        trajectory = self.trajectory
        environment = None
        try:
            environment = self._tasks.make()
            await self._play(environment)
        except ToolTimeoutError as error:
            trajectory.status, trajectory.error = Status.TOOL_TIMEOUT, str(error)
        except EngineError as error:
            trajectory.status, trajectory.error = Status.ENGINE_ABORT, str(error)
        except Exception as error:
            trajectory.status, trajectory.error = Status.ENV_ERROR, f"{type(error).__name__}: {error}"
        finally:
            if environment is not None:
                await self._close(environment)
        return trajectory

    async def _play(self, environment: Environment) -> None:
        await self._reset(environment)
        if not await self._converse(environment) and isinstance(environment, Finishable):
            await self._finish(environment)

    async def _converse(self, environment: Environment) -> bool:
        """Let policy and environment talk until the environment ends the episode (True) or a limit does (False)."""
        for turn in range(self._limits.max_turns):
            completion = await self._speak(turn)
            if completion is None or completion.finish == "length":
                self.trajectory.status = Status.TRUNCATED
                return False
            if await self._respond(environment, is_last=turn == self._limits.max_turns - 1):
                return True
        return False

    async def _finish(self, environment: Finishable) -> None:
        last = self.trajectory.messages[-1]
        text = last["content"] if last["role"] == "assistant" else None
        reward, info = await within(environment.finish(text), self._limits.env_timeout_s)
        self._earn(reward)
        self._conclude(info, answered=False)

    async def _reset(self, environment: Environment) -> None:
        task = self.trajectory.task
        options = {"split": task.split, "index": task.index}
        text, info = await within(environment.reset(seed=task.seed, options=options), self._limits.env_timeout_s)
        self._anchor = info.get("anchor", text)
        messages = info.get("messages")
        if messages is None:
            system = [{"role": "system", "content": self._tasks.system_prompt}] if self._tasks.system_prompt else []
            messages = [*system, {"role": "user", "content": text}]
        self.trajectory.task_type = info.get("task_type")
        self.trajectory.messages.extend(messages)
        self._append(self._history.open(messages))

    async def _speak(self, turn: int) -> Completion | None:
        """Sample one message; None when no token fits any more."""
        trajectory, limits = self.trajectory, self._limits
        start, row_start = len(trajectory.tokens), trajectory.row_starts[-1]
        room = min(limits.max_turn_tokens, limits.max_tokens - (start - row_start))
        if room < 1:
            return None
        completion = await self._engine.generate(
            GenerationRequest(
                uid=trajectory.uid,
                prompt=trajectory.tokens[row_start:],
                max_tokens=room,
                temperature=limits.temperature,
                top_p=limits.top_p,
                stop_ids=self._chat.stop_ids,
                seed=derive_seed(self._seed, turn),
            )
        )
        if completion.finish == "abort":
            raise EngineError(f"the engine aborted request {trajectory.uid}")
        self._append(completion.tokens, completion.logps)
        trajectory.version = completion.version if turn == 0 else min(trajectory.version, completion.version)
        text, readable = self._chat.decode(completion.tokens)
        trajectory.readable &= readable
        trajectory.turns.append(Turn(start, len(trajectory.tokens), anchor=self._anchor))
        trajectory.messages.append({"role": "assistant", "content": text})
        return completion

    async def _respond(self, environment: Environment, is_last: bool) -> bool:
        """Answer the last message by tools or by the environment; return whether that ended the episode.

        After the last turn nothing is appended: no message could follow.
        """
        text = self.trajectory.messages[-1]["content"]
        if environment.tools and "<tool_call>" in text:
            replies = await self._call_tools(text, environment.tools)
            self._anchor = "\n".join(reply["content"] for reply in replies)
        else:
            observation, reward, terminated, truncated, info = await within(
                environment.step(text), self._limits.env_timeout_s
            )
            self._score(reward, terminated, info)
            if terminated or truncated:
                return True
            self._anchor = info.get("anchor", observation)
            replies = [{"role": "user", "content": self._shortened(observation)}]
        self.trajectory.messages.extend(replies)
        if not is_last:
            self._feed(len(replies))
        return False

    def _feed(self, num_new: int) -> None:
        """Append what the policy reads before its next message."""
        trajectory = self.trajectory
        ended = trajectory.tokens[-1] == self._chat.end_of_turn
        fed = self._history.follow(trajectory.messages, num_new, ended)
        if fed.new_row:
            trajectory.row_starts.append(len(trajectory.tokens))
        self._append(fed.tokens)

    async def _call_tools(self, text: str, tools: Sequence[Tool]) -> list[dict[str, Any]]:
        replies = []
        for result in await self._tools.run(parse_tool_calls(text), tools):
            self.trajectory.num_tool_calls += 1
            self.trajectory.num_valid_tool_calls += result.valid
            self.trajectory.turns[-1].action_valid &= result.valid
            replies.append({"role": "tool", "content": self._shortened(result.text)})
        return replies

    def _score(self, reward: float, terminated: bool, info: Info) -> None:
        self._earn(reward)
        self.trajectory.turns[-1].action_valid = bool(info.get("action_valid", True))
        self._conclude(info, answered=terminated)

    def _conclude(self, info: Info, answered: bool) -> None:
        """Take over what an environment tells of the episode; `answered` holds if it does not tell that."""
        self.trajectory.success = bool(info.get("won", False))
        self.trajectory.answered = self.trajectory.answered or bool(info.get("answered", answered))

    def _earn(self, reward: float) -> None:
        """Add a reward to the trajectory and to its last turn, if it has one."""
        trajectory = self.trajectory
        if not math.isfinite(reward):
            raise TaskError(f"the environment gave the reward {reward}; rewards must be finite")
        trajectory.outcome_reward += float(reward)
        if trajectory.turns:
            trajectory.turns[-1].reward += float(reward)

    def _append(self, tokens: Sequence[int], logps: Sequence[float] | None = None) -> None:
        trajectory = self.trajectory
        trajectory.tokens.extend(tokens)
        trajectory.action_mask.extend([logps is not None] * len(tokens))
        trajectory.logps.extend(logps if logps is not None else [0.0] * len(tokens))

    def _shortened(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be tokenised
        limit = self._limits.max_observation_chars
        if len(text) <= limit:
            return text
        half = limit // 2
        return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"

    async def _close(self, environment: Environment) -> None:
        try:
            await within(environment.close(), self._limits.env_timeout_s)
        except Exception as error:
            self.trajectory.error = self.trajectory.error or f"close failed: {type(error).__name__}: {error}"
