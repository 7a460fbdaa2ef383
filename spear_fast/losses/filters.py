"""Dr.BoT filters: responses whose tokens leave the loss, and groups that teach little."""

from __future__ import annotations

import numpy as np

from ..types import Group, Status, Trajectory

REASONS: tuple[str, ...] = ("overlong", "incomplete", "repetitive", "unreadable")


def mark_filtered(
    groups: list[Group],
    *,
    overlong: bool,
    incomplete: bool,
    repetitive: bool,
    unreadable: bool,
    ngram: int,
    max_repeats: int,
) -> dict[str, float]:
    """Set `Trajectory.filtered` to the first reason that applies, else None; return `filter/<reason>_frac`.

    Each of the four switches turns one filter on. "overlong": a token limit cut the text. "incomplete": neither a tool
    call nor an answer. "repetitive": some `ngram` token ids in a row occur `max_repeats` times or more among the
    sampled tokens. "unreadable": the sampled tokens do not decode. A filtered trajectory keeps its advantage and its
    place in the group's mean; it only gives no training row. Unusable trajectories are not looked at.
    Source: SPEAR (arXiv 2509.22601), Dr.BoT.
    """
    enabled = dict(zip(REASONS, (overlong, incomplete, repetitive, unreadable), strict=True))
    usable = [trajectory for group in groups for trajectory in group.trajectories if trajectory.status.usable]
    counts = dict.fromkeys(REASONS, 0)
    for trajectory in usable:
        trajectory.filtered = _reason(trajectory, enabled, ngram, max_repeats)
        if trajectory.filtered is not None:
            counts[trajectory.filtered] += 1
    return {f"filter/{reason}_frac": count / max(len(usable), 1) for reason, count in counts.items()}


def keep_top_groups(groups: list[Group], share: float) -> tuple[list[Group], dict[str, float]]:
    """Return the `share` of groups with the highest standard deviation of reward, in their order, and statistics.

    Keeps floor(share * P) groups, at least one; of equal ones (to nine decimals) the earlier. With a share of 1 all
    groups stay, also those without spread. Source: SPEAR (arXiv 2509.22601), Dr.BoT's group filter.
    """
    if not groups:
        return [], {}
    # The small term keeps a product such as 0.29 * 100 = 28.999999999999996 from losing a group.
    num_kept = max(1, int(share * len(groups) + 1e-9))
    spreads = np.array([_spread([trajectory.reward for trajectory in group.trajectories]) for group in groups])
    # Rounded, since the order of a group's rewards alone moves its spread by an ulp, which must not break ties.
    kept = np.sort(np.argsort(-spreads.round(9), kind="stable")[:num_kept])
    stats = {"filter/groups_kept_frac": num_kept / len(groups), "filter/reward_std_mean": float(spreads.mean())}
    return [groups[index] for index in kept], stats


def max_ngram_count(messages: list[np.ndarray], ngram: int, enough: int = 1) -> int:
    """Return how often the most frequent run of `ngram` token ids occurs in `messages`, a list of int arrays.

    Runs overlap and do not straddle messages; equal runs of different messages are counted together. Returns 0 if no
    run occurs `enough` times. Exact: runs are named by dense ids while their length doubles, not hashed.
    """
    tokens = np.concatenate([np.zeros(0, dtype=np.int64), *messages])
    message_of = np.repeat(np.arange(len(messages)), [len(message) for message in messages])
    names, length = tokens, 1
    alive = np.ones(len(tokens), dtype=bool)
    while True:
        names, counts = _frequent_names(names, alive, enough)
        if length == ngram or len(counts) == 0:
            return int(counts.max(initial=0))
        shift = min(length, ngram - length)
        length += shift
        num_runs = max(len(tokens) - length + 1, 0)
        head, tail = names[:num_runs], names[shift : shift + num_runs]
        alive = (head >= 0) & (tail >= 0) & (message_of[:num_runs] == message_of[len(tokens) - num_runs :])
        names = head * (len(counts) + 1) + tail


def _frequent_names(names: np.ndarray, alive: np.ndarray, enough: int) -> tuple[np.ndarray, np.ndarray]:
    """Rename runs to 0, 1, ...; return the names, -1 where not `alive` or seen fewer than `enough` times, and counts.

    A run is at most as frequent as its parts, so a rare one need not be extended: little is left after a few rounds.
    """
    _, inverse, counts = np.unique(names[alive], return_inverse=True, return_counts=True)
    frequent = counts >= enough
    renamed = np.full(len(names), -1, dtype=np.int64)
    renamed[alive] = np.where(frequent, np.cumsum(frequent) - 1, -1)[inverse]
    return renamed, counts[frequent]


def is_repetitive(trajectory: Trajectory, ngram: int, max_repeats: int) -> bool:
    """Return whether some `ngram` sampled token ids in a row occur `max_repeats` times or more within messages."""
    tokens = np.asarray(trajectory.tokens, dtype=np.int64)
    messages = [tokens[turn.start : turn.end] for turn in trajectory.turns]
    return max_ngram_count(messages, ngram, max_repeats) >= max_repeats


def _reason(trajectory: Trajectory, enabled: dict[str, bool], ngram: int, max_repeats: int) -> str | None:
    if enabled["overlong"] and trajectory.status is Status.TRUNCATED:
        return "overlong"
    if enabled["incomplete"] and trajectory.num_tool_calls == 0 and not trajectory.answered:
        return "incomplete"
    if enabled["repetitive"] and is_repetitive(trajectory, ngram, max_repeats):
        return "repetitive"
    if enabled["unreadable"] and not trajectory.readable:
        return "unreadable"
    return None


def _spread(rewards: list[float]) -> float:
    """Return the sample standard deviation, 0 for fewer than two."""
    return float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
