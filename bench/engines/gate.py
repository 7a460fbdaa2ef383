"""What a contender of the rollout benchmark must get right before its speed counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from bench.engines.contenders import Message
from bench.engines.load import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_GAP = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Mean nats between a contender's log-probs and those of one plain forward pass over the whole conversation."""
SCORED = 16
"""Conversations that are scored again, at least if there are as many, and fewer than twice as many."""

Item = TypeVar("Item")


def scored(items: Sequence[Item]) -> Sequence[Item]:
    """Those of the conversations, or of their answers, that are scored again, spread over all of them."""
    return items[:: max(1, len(items) // SCORED)]


def complaint(conversations: Sequence[Conversation], messages: Sequence[Sequence[Message]]) -> str | None:
    """Return what is wrong with the shape of an answer: messages that are missing, too short or too long."""
    for one, answers in zip(conversations, messages, strict=True):
        wanted, got = [turn.max_tokens for turn in one.turns], [len(answer.tokens) for answer in answers]
        if wanted != got:
            return f"conversation {one.uid} has messages of {got} tokens instead of {wanted}"
    return None


@torch.no_grad()
def gap(model: PreTrainedModel, messages: Sequence[Sequence[Message]]) -> dict[str, float]:
    """Mean and largest difference of log-probs, in nats, from transformers' own forward pass without a cache.

    Raises ValueError if a message brings no log-probs.
    """
    differences = []
    for answers in messages:
        last = answers[-1]
        ids = torch.tensor([[*last.prompt, *last.tokens]], device=model.device)
        logits: Any = model(input_ids=ids, use_cache=False).logits[0]
        for answer in answers:
            if answer.logps is None or len(answer.logps) != len(answer.tokens):
                raise ValueError("a message without log-probs cannot be checked; ask for them")
            start = len(answer.prompt)
            expected = torch.log_softmax(logits[start - 1 : start - 1 + len(answer.tokens)].float(), -1)
            expected = expected.gather(1, ids[0, start : start + len(answer.tokens), None])[:, 0]
            differences.append((torch.tensor(answer.logps) - expected.cpu()).abs())
    together = torch.cat(differences)
    return {"gap_mean_nats": together.mean().item(), "gap_max_nats": together.max().item()}


def too_far(found: dict[str, float], dtype: str) -> bool:
    """Whether log-probs differ by more than the type explains; nan does."""
    return not found["gap_mean_nats"] <= MOST_GAP[dtype]
