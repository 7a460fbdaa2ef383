"""Dr.BoT filters: responses whose tokens leave the loss, and groups that teach little."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch

from spear_kernels.repetition import max_ngram_counts
from spear_kernels.segment_reduce import segment_stats
from spear_kernels.spans import span_index

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
    loops = are_repetitive(usable, ngram, max_repeats) if repetitive else [False] * len(usable)
    counts = dict.fromkeys(REASONS, 0)
    for trajectory, loop in zip(usable, loops, strict=True):
        trajectory.filtered = _reason(trajectory, enabled, loop)
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
    spreads = _reward_spreads(groups)
    # Rounded, since the order of a group's rewards alone moves its spread by an ulp, which must not break ties.
    kept = np.sort(np.argsort(-spreads.round(9), kind="stable")[:num_kept])
    stats = {"filter/groups_kept_frac": num_kept / len(groups), "filter/reward_std_mean": float(spreads.mean())}
    return [groups[index] for index in kept], stats


def are_repetitive(trajectories: list[Trajectory], ngram: int, max_repeats: int) -> list[bool]:
    """Return for each whether some `ngram` sampled token ids in a row occur `max_repeats` times or more.

    Runs do not straddle messages; equal runs of different messages of a trajectory are counted together.
    """
    messages = [
        (sequence, trajectory.tokens[turn.start : turn.end])
        for sequence, trajectory in enumerate(trajectories)
        for turn in trajectory.turns
    ]
    token_ids = np.fromiter(chain.from_iterable(tokens for _, tokens in messages), dtype=np.int64)
    lengths = torch.tensor([len(tokens) for _, tokens in messages], dtype=torch.int64)
    ends = lengths.cumsum(0)
    message_ids = span_index(ends - lengths, ends, len(token_ids))
    sequences = torch.tensor([sequence for sequence, _ in messages], dtype=torch.int64)
    counts = max_ngram_counts(
        torch.from_numpy(token_ids),
        sequences[message_ids],
        ngram,
        num_seqs=len(trajectories),
        message_ids=message_ids,
        enough=max_repeats,
    )
    return (counts >= max_repeats).tolist()


def _reason(trajectory: Trajectory, enabled: dict[str, bool], is_repetitive: bool) -> str | None:
    if enabled["overlong"] and trajectory.status is Status.TRUNCATED:
        return "overlong"
    if enabled["incomplete"] and trajectory.num_tool_calls == 0 and not trajectory.answered:
        return "incomplete"
    if is_repetitive:
        return "repetitive"
    if enabled["unreadable"] and not trajectory.readable:
        return "unreadable"
    return None


def _reward_spreads(groups: list[Group]) -> np.ndarray:
    """Return the sample standard deviation of each group's rewards, float64 [P]; 0 for fewer than two."""
    rewards = [trajectory.reward for group in groups for trajectory in group.trajectories]
    group_of = np.repeat(np.arange(len(groups)), [len(group.trajectories) for group in groups])
    stats = segment_stats(torch.tensor(rewards, dtype=torch.float64), torch.from_numpy(group_of))
    return stats.std[: len(groups)].numpy()
