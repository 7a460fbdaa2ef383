"""Workloads of the rollout benchmark as data, and the conversations that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spear_fast.seeds import derive_seed


@dataclass(frozen=True)
class Workload:
    """Conversations that are sent at once; lengths are fixed, as nothing stops a message but its limit."""

    name: str
    conversations: int
    prompt_tokens: int
    sample_tokens: int
    """Of each message; with `long_tail` their median."""
    long_tail: int | None = None
    """Longest message of a log-normal distribution; None makes all equal."""
    group: int = 1
    """Conversations with the same prompt."""
    turns: int = 1
    observe_tokens: int = 0
    """What a tool adds between two messages."""


@dataclass(frozen=True)
class Turn:
    """One sampled message of fixed length, and what is put behind it before the next."""

    max_tokens: int
    observed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """A prompt and the turns that follow; `seed` gives each message's draws."""

    uid: int
    prompt: tuple[int, ...]
    turns: tuple[Turn, ...]
    seed: int

    @property
    def sampled(self) -> int:
        """Tokens that are sampled in all turns."""
        return sum(turn.max_tokens for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Length at the end."""
        return len(self.prompt) + self.sampled + sum(len(turn.observed) for turn in self.turns)

    def only_first_token(self) -> Conversation:
        """The same prompt with one token to sample."""
        return Conversation(self.uid, self.prompt, (Turn(1),), self.seed)


@dataclass(frozen=True)
class Suite:
    """A model, its type, and the workloads that engines get."""

    size: str
    dtype: str
    in_flight: int
    """Conversations that run at once; further ones wait."""
    workloads: tuple[Workload, ...]
    kv_cache_gib: int
    """Of vLLM, ours and used directly."""
    repeats: int
    collector_episodes: int


SUITES = {
    "cpu": Suite(
        "10m",
        "float32",
        32,
        (
            Workload("equal lengths, batch 4", 4, 48, 32),
            Workload("equal lengths, batch 32", 32, 48, 32),
            Workload("long tail", 48, 48, 12, long_tail=96),
            Workload("shared prompt", 32, 256, 16, group=8),
            Workload("multi-turn", 32, 96, 8, turns=3, observe_tokens=24),
        ),
        kv_cache_gib=1,
        repeats=3,
        collector_episodes=512,
    ),
    "cuda": Suite(
        "1.5b",
        "bfloat16",
        256,
        (
            Workload("equal lengths, batch 1", 1, 512, 256),
            Workload("equal lengths, batch 32", 32, 512, 256),
            Workload("equal lengths, batch 256", 256, 512, 256),
            Workload("long tail", 512, 512, 200, long_tail=2048),
            Workload("shared prompt", 256, 1024, 256, group=16),
            Workload("multi-turn", 128, 512, 128, turns=6, observe_tokens=128),
        ),
        kv_cache_gib=16,
        repeats=3,
        collector_episodes=2048,
    ),
    "tiny": Suite(
        "1m",
        "float32",
        4,
        (
            Workload("equal lengths", 3, 5, 4),
            Workload("long tail", 5, 5, 3, long_tail=9),
            Workload("shared prompt", 4, 9, 3, group=2),
            Workload("multi-turn", 3, 5, 3, turns=2, observe_tokens=4),
        ),
        kv_cache_gib=1,
        repeats=2,
        collector_episodes=4,
    ),
}
_LOG_SPREAD = 0.8


def conversations(workload: Workload, vocab_size: int, seed: int) -> list[Conversation]:
    """The conversations of a workload: other seeds give other tokens, of the same lengths."""
    lengths = _lengths(workload)
    rng = np.random.default_rng(derive_seed(seed, "tokens", workload.name))
    prompts = rng.integers(0, vocab_size, (-(-workload.conversations // workload.group), workload.prompt_tokens))
    observed = rng.integers(0, vocab_size, (workload.conversations, workload.turns, workload.observe_tokens))
    made = []
    for index in range(workload.conversations):
        turns = tuple(
            # Nothing is read behind the last message.
            Turn(int(lengths[index, turn]), tuple(observed[index, turn].tolist()) if turn + 1 < workload.turns else ())
            for turn in range(workload.turns)
        )
        # A uid of its own for each seed: an engine may know an earlier conversation of the same uid.
        uid = seed * workload.conversations + index
        prompt = tuple(prompts[index // workload.group].tolist())
        made.append(Conversation(uid, prompt, turns, derive_seed(seed, "draws", workload.name, index)))
    return made


def _lengths(workload: Workload) -> np.ndarray:
    """Tokens of each message, int64 [conversations, turns]."""
    shape = (workload.conversations, workload.turns)
    if workload.long_tail is None:
        return np.full(shape, workload.sample_tokens, dtype=np.int64)
    rng = np.random.default_rng(derive_seed(0, "lengths", workload.name))
    drawn = workload.sample_tokens * np.exp(_LOG_SPREAD * rng.standard_normal(shape))
    return np.clip(drawn, 1, workload.long_tail).astype(np.int64)


def longest(workloads: tuple[Workload, ...], vocab_size: int) -> int:
    """Tokens of the longest conversation of all."""
    return max(one.num_tokens for workload in workloads for one in conversations(workload, vocab_size, 0))
