"""A model, tokenizer, prompts and hand-made batches small enough that a run of TRL takes a second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before trl is imported: it reports its use otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.integrations.trl import SPEARConfig, SPEARTrainer

VOCAB = 290
PROMPTS = ["abc", "hello there", "x y z", "q"]
NO_TOOLS = {"intrinsic_mode": "none", "replay_mode": "off"}
RUN = {"max_steps": 5, "logging_strategy": "steps", "logging_steps": 1, "replay_buffer_size": 2,
       "replay_ripe_factor": 1.0, "replay_warmup_steps": 2, "keep_groups": 1.0}  # fmt: skip
"""Options of a run that replays from its second or third round on."""


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["abc hello"], VOCAB)


def tiny_model(seed: int = 0, **options: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        **{"max_position_embeddings": 128, **options},
    )
    return Qwen2ForCausalLM(config)


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * 8})


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of GRPOConfig for a quiet run on the CPU."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 8,
        "per_device_eval_batch_size": 4,
        **options,
    }


def batch(seed: int, rows: int = 4, prompt: int = 5, completion: int = 7, *, tools: bool = False) -> dict[str, Any]:
    """What TRL's `_compute_loss` is given: left-padded prompts [B, P], right-padded completions [B, C]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def lengths(most: int) -> torch.Tensor:
        return torch.randint(2, most + 1, (rows, 1), generator=generator)

    place, words = torch.arange(completion), torch.randint(3, VOCAB, (rows, prompt + completion), generator=generator)
    mask = (place < lengths(completion)).long()
    inputs = {
        "prompt_ids": words[:, :prompt],
        "prompt_mask": (torch.arange(prompt) >= prompt - lengths(prompt)).long(),
        "completion_ids": words[:, prompt:],
        "completion_mask": mask,
        "advantages": random(rows),
        "old_per_token_logps": -5.7 + 0.3 * random(rows, completion),
        "ref_per_token_logps": -5.7 + 0.3 * random(rows, completion),
    }
    if tools:
        inputs["tool_mask"] = torch.where((place == 1) | (place == 2), 0, 1).repeat(rows, 1)
    inputs["num_items_in_batch"] = (mask * inputs.get("tool_mask", 1)).sum() * 2
    return inputs


def scripted_rollouts(rows: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions of 6 tokens that depend on the step alone; row i called i % 3 tools; prompts grow."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    calls = [index % 3 for index in range(len(rows))]
    return {
        "prompt_ids": [[5, 6, 7, 8, 9][: 1 + index % 3 + index // 4 * 2] for index in range(len(rows))],
        "completion_ids": torch.randint(3, 290, (len(rows), 6), generator=generator).tolist(),
        "logprobs": None,
        "env_mask": [[1, 1, 0, 0, 1, 1] if count else [1] * 6 for count in calls],
        "num_tool_calls": calls,
    }


def word_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 5) for ids in completion_ids]


def spear(folder: Path, model: Any = None, tools: bool = True, **options: Any) -> SPEARTrainer:
    """A SPEARTrainer on scripted rollouts (with `tools`) or its own completions, ready for `_compute_loss`."""
    peft = options.pop("peft_config", None)
    defaults = {"mask_truncated_completions": False, "filter_unreadable": False, "learning_rate": 1e-2}
    args = SPEARConfig(**settings(folder, **{**defaults, **options}))
    made = SPEARTrainer(
        tiny_model() if model is None else model,
        word_reward,
        args,
        train_dataset=prompts(),
        processing_class=tiny_tokenizer(),
        rollout_func=scripted_rollouts if tools else None,
        peft_config=peft,
    )
    made.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    made.model.train()
    return made


def named(inputs: dict[str, Any], first: int) -> dict[str, Any]:
    """`batch` with the uids that SPEARTrainer adds, from `first` on."""
    return inputs | {"spear_uid": torch.arange(first, first + len(inputs["advantages"]))}


def history(trainer: SPEARTrainer, name: str) -> list[float]:
    """The logged values of one metric, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
