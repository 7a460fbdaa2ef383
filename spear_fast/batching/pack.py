"""Rows to packed micro-batches: no padding, a token budget for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..types import MicroBatch, Row
from .layout import lay_out
from .repeats import find_repeats


def pack(rows: Sequence[Row], token_budget: int) -> list[list[int]]:
    """Return the row indices of each micro-batch, by first-fit-decreasing on the number of tokens.

    The tokens of a micro-batch sum to at most `token_budget`; a longer row sits alone. Every row occurs once, equal
    lengths go in the order of `rows`, and indices ascend within a micro-batch. Raises ValueError for a budget below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget={token_budget} must be at least 1 token")
    lengths = np.array([row.num_tokens for row in rows], dtype=np.int64)
    free = np.empty(len(rows), dtype=np.int64)
    batches: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable"):
        fitting = np.flatnonzero(free[: len(batches)] >= lengths[index])
        if len(fitting):
            batch = int(fitting[0])
        else:
            batch = len(batches)
            free[batch] = token_budget
            batches.append([])
        batches[batch].append(int(index))
        free[batch] -= lengths[index]
    return [sorted(batch) for batch in batches]


def collate(
    rows: Sequence[Row], index: Sequence[int], device: torch.device | str, *, share_prompts: bool = False
) -> MicroBatch:
    """Return the micro-batch of `rows[i] for i in index` on `device`; `row_index` holds `index`.

    Types and shapes are those of `MicroBatch`. With `share_prompts`, rows with equal tokens before their first action
    token have these tokens in common: [prompt][rest of one row][rest of the next]... `ref_logp` is set if the rows
    have it, `weight` if any row has one (the others count as 1). Raises ValueError for an empty index, for a row whose
    token 0 is an action token (nothing predicts it), and for rows of which only some have `ref_logp`.
    """
    chosen = [rows[i] for i in index]
    if not chosen:
        raise ValueError("index is empty; a micro-batch needs at least one row")
    _check_first_tokens(chosen)
    ref_logps = _ref_logps(chosen)
    lengths = np.array([row.num_tokens for row in chosen], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.concatenate([row.action_mask for row in chosen])
    actions = np.flatnonzero(mask)
    row_of_action = np.repeat(np.arange(len(chosen)), lengths)[actions]
    actions_before = np.concatenate([[0], np.cumsum(mask)])[starts[row_of_action]]
    tokens = np.concatenate([row.tokens for row in chosen])
    layout = lay_out(chosen, share_prompts=share_prompts)
    predictors = layout.place[actions - 1]
    position = np.arange(len(tokens)) - np.repeat(starts[:-1], lengths)

    def action_values(arrays: list[np.ndarray], place: torch.device | str = device) -> torch.Tensor:
        return _tensor(np.concatenate(arrays)[actions], np.float32, place)

    return MicroBatch(
        input_ids=_tensor(tokens[layout.token], np.int64, device),
        position_ids=_tensor(position[layout.token], np.int64, device),
        segments=layout.segments,
        predictors=_tensor(predictors, np.int64, device),
        targets=_tensor(tokens[actions], np.int64, device),
        old_logp=action_values([row.old_logp for row in chosen]),
        advantages=action_values([row.advantages for row in chosen], "cpu"),
        seq_ids=_tensor(np.array([row.uid for row in chosen])[row_of_action], np.int64, device),
        positions=_tensor(np.arange(len(actions)) - actions_before, np.int64, device),
        row_index=_tensor(np.asarray(index), np.int64, device),
        ref_logp=action_values(ref_logps) if ref_logps else None,
        weight=action_values(_weights(chosen)) if any(row.weight is not None for row in chosen) else None,
        versions=_tensor(np.array([row.version for row in chosen])[row_of_action], np.int64, device),
        repeats=find_repeats(predictors, device) if layout.segments.shared else (),
    )


def _tensor(array: np.ndarray, dtype: type[np.generic], device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device, non_blocking=True)


def _check_first_tokens(rows: list[Row]) -> None:
    for row in rows:
        if row.num_tokens and row.action_mask[0]:
            raise ValueError(
                f"row uid={row.uid} marks token 0 as an action, but no token precedes and predicts it; "
                "start the sequence with a prompt token"
            )


def _ref_logps(rows: list[Row]) -> list[np.ndarray]:
    """Return the reference log-probs of all rows, or nothing if no row has them."""
    ref_logps = [row.ref_logp for row in rows if row.ref_logp is not None]
    if len(ref_logps) not in (0, len(rows)):
        raise ValueError(f"{len(ref_logps)} of {len(rows)} rows have ref_logp; compute it for all rows or for none")
    return ref_logps


def _weights(rows: list[Row]) -> list[np.ndarray]:
    return [np.ones(row.num_tokens, dtype=np.float32) if row.weight is None else row.weight for row in rows]
