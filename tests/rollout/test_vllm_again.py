"""Engines of one process, one after the other, around a trainer that ends and takes all process groups along."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import Qwen2Config

from spear_fast.config.machine import ParallelConfig
from spear_fast.dist import start_ranks
from spear_fast.rollout.vllm_factory import make_vllm_engine


def test_an_engine_starts_after_a_trainer_destroyed_all_process_groups(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2Config(vocab_size=64, architectures=["Qwen2ForCausalLM"], **shape, **heads).save_pretrained(tmp_path)
    for _ in range(2):
        ranks = start_ranks("cpu", ParallelConfig(), shard=True)
        engine = make_vllm_engine(
            str(tmp_path),
            placement="inproc",
            dtype="float32",
            max_model_tokens=64,
            max_concurrent=4,
            vocab_size=64,
            kv_cache_bytes=None,
            max_batched_tokens=64,
            enforce_eager=True,
            prefix_caching=True,
            sleep_level=0,
            deterministic=False,
            device=torch.device("cpu"),
            seed=0,
        )
        engine.close()
        assert dist.is_initialized(), "an engine that ends must leave the trainer's groups alone"
        ranks.close()
    assert not dist.is_initialized()
