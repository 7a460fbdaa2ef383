"""A tiny policy and random rows, shared by the tests of the update."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from spear_fast.config.schema import ModelInit
from spear_fast.types import Row
from spear_fast.update.model import PackedModel, build_model

VOCAB_SIZE = 64


def make_policy(tie: bool = True, seed: int = 0) -> PackedModel:
    """Two layers, width 32, float32; weights enlarged so that attention and log-probs are far from uniform."""
    shape = ModelInit(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, tie_embeddings=tie
    )
    model = build_model(shape, vocab_size=VOCAB_SIZE, eos_id=1, seed=seed, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return PackedModel(model)


def make_rows(lengths: list[int], seed: int = 0, first_uid: int = 100) -> list[Row]:
    """Rows with two action spans each where there is room, and mixed advantages; old log-probs are set by tests."""
    generator = np.random.default_rng(seed)
    rows = []
    for index, length in enumerate(lengths):
        mask = np.zeros(length, dtype=bool)
        mask[length // 3 : length // 2] = True
        mask[max(1, length - length // 4 - 1) :] = True
        advantages = np.where(mask, generator.normal(0, 2), 0).astype(np.float32)
        rows.append(
            Row(
                uid=first_uid + 7 * index,
                group_id=index // 2,
                version=0,
                tokens=generator.integers(0, VOCAB_SIZE, length).astype(np.int32),
                action_mask=mask & (np.arange(length) > 0),
                old_logp=np.zeros(length, dtype=np.float32),
                advantages=advantages,
            )
        )
    return rows


@pytest.fixture
def policy() -> PackedModel:
    return make_policy()


@pytest.fixture
def new_policy() -> Callable[..., PackedModel]:
    return make_policy


@pytest.fixture
def new_rows() -> Callable[..., list[Row]]:
    return make_rows
