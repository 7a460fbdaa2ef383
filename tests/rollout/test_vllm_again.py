"""Engines of one process, one after the other, around a trainer that ends and takes all process groups along."""

from __future__ import annotations

import torch.distributed as dist

from spear_fast.config.machine import ParallelConfig
from spear_fast.dist import start_ranks
from tests.rollout.test_vllm_engine import make_model, start


def test_an_engine_starts_after_a_trainer_destroyed_all_process_groups(tmp_path):
    for _ in range(2):
        ranks = start_ranks("cpu", ParallelConfig(), shard=True)
        engine = start(tmp_path, make_model())
        engine.close()
        assert dist.is_initialized(), "an engine that ends must leave the trainer's groups alone"
        ranks.close()
    assert not dist.is_initialized()
