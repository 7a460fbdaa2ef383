"""The nouns every room speaks: task, turn, trajectory, group, training row, micro-batch.

Dimension legend used in names and comments across the project:
`L` tokens of one sequence, `T` packed tokens, `N` packed action tokens, `R` rows (sequences), `G` samples of one
prompt, `P` prompts, `V` vocabulary, `H` hidden width. Log-probabilities are natural logs at the sampling temperature.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


_UID_BITS = 44


def row_uid(uid: int, part: int) -> int:
    """Return the uid of row `part` (0, 1, ...) of trajectory `uid`; the first row has that of its trajectory."""
    return uid | part << _UID_BITS


def split_row_uid(uid: int) -> tuple[int, int]:
    """Return the trajectory's uid and the part of which `row_uid` made `uid`."""
    return uid & (1 << _UID_BITS) - 1, uid >> _UID_BITS


class Status(str, Enum):
    """How a trajectory ended. Only OK and TRUNCATED ones reach the advantage."""

    OK = "ok"
    """The environment ended the episode, or the policy used up its turns."""
    TRUNCATED = "truncated"
    """A token limit cut the sampled text."""
    ENV_ERROR = "env_error"
    """The environment raised or timed out."""
    TOOL_TIMEOUT = "tool_timeout"
    """A tool did not answer within its timeout, retries included."""
    ENGINE_ABORT = "engine_abort"
    """The engine gave up on a request."""

    @property
    def usable(self) -> bool:
        """Whether the trajectory may enter rewards, advantages and the loss."""
        return self in (Status.OK, Status.TRUNCATED)


@dataclass(frozen=True)
class Task:
    """One problem of a task set: `Task("calculator", "train", 17, seed=...)` is the 18th training problem."""

    name: str
    split: str
    index: int
    seed: int


@dataclass
class Turn:
    """One sampled message: tokens[start:end] of its trajectory, and what the environment made of it.

    Example: a call of the calculator sampled as tokens 40..57 is `Turn(start=40, end=58, anchor="...", reward=0.0)`.
    """

    start: int
    end: int
    anchor: str | None = None
    """The state the policy saw before acting; equal anchors of one group form a GiGPO step group."""
    reward: float = 0.0
    action_valid: bool = True


@dataclass
class Trajectory:
    """One episode, token by token.

    Example of two turns, `P` prompt, `A` sampled, `O` observation (tool result, template):
        tokens       P P P A A A O O O A A
        action_mask  0 0 0 1 1 1 0 0 0 1 1
        logps        0 0 0 x x x 0 0 0 x x     (log-prob of the sampled token, nats)
        turns        [Turn(3, 6), Turn(9, 11)]

    It is one row, in which every token was sampled after all those before it, or several rows one behind the other
    (see rollout/history.py): with `row_starts` [0, 6] above, `O O O` is the whole prompt of the second message.
    """

    task: Task
    group_id: int
    sample: int
    """Index within its group, 0..G-1."""
    uid: int
    """Unique in the run; keys the counter-based draws."""
    version: int
    """Oldest policy version that sampled in it."""
    tokens: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    row_starts: list[int] = field(default_factory=lambda: [0])
    """Where rows begin, ascending, the first at 0; no turn crosses one of them."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The readable transcript, in OpenAI's message shape."""
    task_type: str | None = None
    """The environment's label for breakdowns of success."""
    status: Status = Status.OK
    error: str | None = None
    num_tool_calls: int = 0
    num_valid_tool_calls: int = 0
    answered: bool = False
    """Whether some message was a final answer or, in games, an understood command."""
    readable: bool = True
    """False when sampled tokens do not decode to valid UTF-8."""
    success: bool = False
    outcome_reward: float = 0.0
    """Sum of the environment's rewards."""
    intrinsic_reward: float = 0.0
    """R_tool before weighting, filled by rewards/."""
    reward: float = 0.0
    """R = outcome + mu * intrinsic, filled by rewards/."""
    filtered: str | None = None
    """Why the Dr.BoT filters zero its mask, or None."""
    advantages: np.ndarray | None = None
    """float32 [L] as `tokens`, filled by advantages/; zero outside action tokens."""

    @property
    def num_action_tokens(self) -> int:
        """Sampled tokens."""
        return sum(self.action_mask)

    @property
    def row_spans(self) -> list[tuple[int, int]]:
        """Begin and end of each row in `tokens`."""
        return list(zip(self.row_starts, [*self.row_starts[1:], len(self.tokens)], strict=True))

    def row_turns(self, part: int) -> list[Turn]:
        """Return the turns in row `part`."""
        return [turn for turn in self.turns if bisect_right(self.row_starts, turn.start) == part + 1]


@dataclass
class Group:
    """The G trajectories of one prompt."""

    group_id: int
    task: Task
    trajectories: list[Trajectory]


@dataclass
class Row:
    """One sequence as the loss sees it, without padding.

    `old_logp` and `advantages` are aligned with `tokens` and mean something where `action_mask` is True.
    Example: tokens [5, 6, 7], action_mask [F, F, T], old_logp [0, 0, -0.3], advantages [0, 0, 1.2].
    """

    uid: int
    """Unique in the run; see `row_uid`."""
    group_id: int
    version: int
    """Oldest policy version that sampled in its trajectory, in training steps."""
    tokens: np.ndarray  # int32 [L]
    action_mask: np.ndarray  # bool [L]
    old_logp: np.ndarray  # float32 [L]
    advantages: np.ndarray  # float32 [L]
    reward: float = 0.0
    ref_logp: np.ndarray | None = None  # float32 [L]
    weight: np.ndarray | None = None  # float32 [L], importance weight of each token; None means 1

    @property
    def num_tokens(self) -> int:
        """Length L of the sequence."""
        return len(self.tokens)

    @property
    def num_action_tokens(self) -> int:
        """Tokens that enter the loss."""
        return int(self.action_mask.sum())


@dataclass(frozen=True)
class Segments:
    """The pieces of a pack, in order: whole sequences, prompts that several share, and what follows those in each.

    Example: a prompt of 3 tokens and two rests: length [3, 2, 4], prefix [-1, 0, 0], start [0, 3, 5], before [0, 3, 3].
    """

    length: np.ndarray  # int64 [S], tokens
    prefix: np.ndarray  # int64 [S], segment whose tokens come before those of this one, or -1; it has none itself

    @classmethod
    def of(cls, lengths: Sequence[int], prefix: Sequence[int] | None = None) -> Segments:
        """Segments of these lengths, each at least 1; without `prefix`, whole sequences."""
        none = np.full(len(lengths), -1, dtype=np.int64)
        return cls(np.asarray(lengths, dtype=np.int64), none if prefix is None else np.asarray(prefix, dtype=np.int64))

    @property
    def start(self) -> np.ndarray:
        """Place of the first token of each, int64 [S]."""
        return np.cumsum(self.length) - self.length

    @property
    def before(self) -> np.ndarray:
        """Tokens of the segment before each, int64 [S]."""
        return np.where(self.prefix < 0, 0, self.length[self.prefix])

    @property
    def shared(self) -> bool:
        """Whether any has another before it."""
        return bool((self.prefix >= 0).any())


@dataclass
class MicroBatch:
    """Packed sequences for one forward pass, and the action tokens the loss reads from it.

    The hidden state at `predictors[n]` predicts `targets[n]`, so row n of every [N] tensor belongs to one action token;
    these come sequence by sequence, in the order of `row_index`.

    Example: rows P Q a b, P Q c (prompt P Q), packed whole and with the prompt shared:
        input_ids      P Q a b P Q c        P Q a b c
        position_ids   0 1 2 3 0 1 2        0 1 2 3 2
        segments       4 3                  2 2 1, the first before the others
        predictors     1 2 5                1 2 1       (of a, b, c)
        repeats        ()                   row 1 at places 0 and 2
    """

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], place in the sequence
    segments: Segments
    predictors: torch.Tensor  # int64 [N], index into T
    targets: torch.Tensor  # int64 [N]
    old_logp: torch.Tensor  # float32 [N]
    advantages: torch.Tensor  # float32 [N], always on the CPU: the loss plans by it which rows need a gradient
    seq_ids: torch.Tensor  # int64 [N], the row's uid
    positions: torch.Tensor  # int64 [N], rank of the token among its row's action tokens
    row_index: torch.Tensor  # int64 [R], place of each sequence in the list that was packed
    versions: torch.Tensor  # int64 [N], oldest policy version that sampled in the token's sequence
    ref_logp: torch.Tensor | None = None  # float32 [N]
    weight: torch.Tensor | None = None  # float32 [N]
    repeats: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Rows of [T] that `predictors` holds several times; see `batching.repeats`."""
