"""Compiled blocks, recomputed in the backward pass: the same numbers, one compilation for all blocks and batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from spear_fast.batching import collate
from spear_fast.config.machine import ParallelConfig
from spear_fast.dist import Ranks
from spear_fast.errors import ConfigError
from spear_fast.update.sharding import decoder_blocks, shard

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_blocks_are_compiled_once_and_compute_the_same(new_policy, new_rows, monkeypatch):
    # The real back-end takes a C++ compiler half a minute; what is captured, and how often, does not depend on it.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = new_policy(), new_policy()
    torch._dynamo.reset()
    captured = torch._dynamo.utils.counters
    captured.clear()
    try:
        settings = ParallelConfig(activation_checkpointing=True)
        shard(compiled, ALONE, settings, torch.float32, compile_blocks=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for lengths in ([9, 5, 30], [12, 22], [7, 7, 8]):
                rows = new_rows(lengths)
                batch = collate(rows, range(len(rows)), "cpu")
                hidden, expected = compiled.hidden_states(batch), plain.hidden_states(batch)
                torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
                for states in (hidden, expected):
                    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        assert captured["stats"]["unique_graphs"] > 0
        # The attention of a block and what follows it are captured apart.
        assert captured["frames"]["ok"] <= 4
        for name, parameter in plain.model.named_parameters():
            torch.testing.assert_close(compiled.model.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-3)
    finally:
        torch._dynamo.reset()


def test_a_model_without_named_blocks_is_refused(policy):
    assert len(decoder_blocks(policy.model)) == 2
    policy.model._no_split_modules = None
    with pytest.raises(ConfigError, match="does not say what its blocks are"):
        shard(policy, ALONE, ParallelConfig(), torch.float32)
