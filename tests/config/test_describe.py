"""The dry-run table: counts follow from the settings."""

from __future__ import annotations

from typing import Any

import pytest

from spear_fast.config.describe import describe, num_parameters
from spear_fast.config.load import load_config
from spear_fast.config.presets import PRESETS
from spear_fast.config.schema import ModelInit

BASE: dict[str, Any] = {"name": "run", "steps": 3, "task": {"name": "calculator"}, "cold_start": {"steps": 5}}


def table(*overrides: str) -> dict[str, str]:
    rows = describe(load_config(None, overrides, base=BASE))
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_counts_per_step() -> None:
    rows = table(
        "rollout.prompts_per_step=10",
        "rollout.group_size=4",
        "rollout.max_tokens=500",
        "rollout.max_turns=3",
        "rollout.max_turn_tokens=64",
        "update.mini_batch_size=16",
        "update.epochs=2",
        "algo.filters.keep_groups=0.75",
    )
    assert rows["trajectories per step"].startswith("40 (10 prompts x 4), 40 at once, at most 3 turns")
    assert rows["tokens per step"] == "at most 20,000, of them 7,680 sampled"
    # 8 of 10 groups are kept: 32 trajectories, 2 mini-batches of 16, 2 epochs.
    assert rows["optimizer steps per step"].startswith("at most 4 on-policy")


def test_sampled_tokens_never_exceed_the_trajectory() -> None:
    rows = table("rollout.max_turns=100", "rollout.group_size=2", "rollout.prompts_per_step=1")
    assert rows["tokens per step"] == "at most 1,024, of them 1,024 sampled"


def test_outputs_and_sources_are_named() -> None:
    rows = table("out=results", "task.params.max_terms=4")
    assert rows["outputs"] == "results/run/"
    assert rows["task"] == "calculator (max_terms=4)"
    assert table("model.path=some/model", "cold_start.steps=0")["model"] == "some/model, float32"
    assert table("model.path=some/model", "cold_start.steps=0")["cold start"] == "none"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_algorithm_is_summarised(preset: str) -> None:
    rows = table(f"algo.preset={preset}", "eval.every=5", "checkpoint.every=0")
    algorithm = PRESETS[preset]
    assert rows["preset"] == preset
    assert rows["advantage"].startswith(algorithm["advantage"]["estimator"])
    assert ("discount" in rows["advantage"]) == (algorithm["advantage"]["estimator"] == "gigpo")
    assert rows["loss"].startswith(algorithm["loss"]["kind"])
    assert (rows["self-imitation"] != "off") == algorithm["replay"]["enabled"]
    assert (rows["intrinsic reward"] != "none") == (algorithm["intrinsic"]["mode"] != "none")


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_like_the_model(tied: bool) -> None:
    """Against transformers' own Qwen2 of an odd shape."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    init = ModelInit(
        hidden_size=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        intermediate_size=20,
        vocab_size=31,
        tie_embeddings=tied,
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=20,
            vocab_size=31,
            tie_word_embeddings=tied,
        )
    )
    assert num_parameters(init) == sum(parameter.numel() for parameter in model.parameters())
