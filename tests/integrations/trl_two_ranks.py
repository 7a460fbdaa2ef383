"""Runs of SPEARTrainer in both replay modes on scripted rollouts; test_trl_ranks starts them on two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from spear_fast.integrations.trl import SPEARConfig, SPEARTrainer
from tests.integrations.trl_toys import prompts, scripted_rollouts, settings, tiny_model, tiny_tokenizer, word_reward

ROWS = 8
OPTIONS = {"max_steps": 4, "logging_strategy": "steps", "logging_steps": 1, "replay_buffer_size": 3,
           "replay_ripe_factor": 0.4, "replay_warmup_steps": 2, "mask_truncated_completions": False,
           "filter_unreadable": False, "learning_rate": 1e-3, "replay_cov_lower": -50.0,
           "cov_lower": -50.0, "cov_ratio": 0.1}  # fmt: skip


def own_rollouts(rows: list[Any], trainer: Any) -> dict[str, Any]:
    """This rank's part of the rollouts that one process would see."""
    start = trainer.accelerator.process_index * len(rows)
    output = scripted_rollouts([None] * ROWS, trainer)
    return {key: value and value[start : start + len(rows)] for key, value in output.items()}


def train(mode: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Weights and log of a run on `ranks` processes, each with its share of the rows of a micro-batch."""
    args = SPEARConfig(**settings(folder, per_device_train_batch_size=4 // ranks, replay_mode=mode, **OPTIONS))
    trainer = SPEARTrainer(
        tiny_model(),
        word_reward,
        args,
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        rollout_func=own_rollouts,
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {"weights": model.state_dict(), "log": trainer.state.log_history}


if __name__ == "__main__":
    runs = {mode: train(mode, Path(sys.argv[1]), 2) for mode in ("separate_step", "joint")}
    if os.environ["RANK"] == "0":
        torch.save(runs, Path(sys.argv[1]) / "runs.pt")
    torch.distributed.destroy_process_group()
