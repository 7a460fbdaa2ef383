"""From a configuration to the objects of a run: tasks, policy, engine, collector."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from spear_fast.config.schema import RunConfig
from spear_fast.data.chat import Chat, load_tokenizer
from spear_fast.envs.base import TaskSet
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import ConfigError
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.demos import Messages, demonstration_text
from spear_fast.rollout.engine import Engine
from spear_fast.rollout.episode import EpisodeLimits
from spear_fast.rollout.partial import PartialCollector
from spear_fast.seeds import derive_seed
from spear_fast.update.model import PackedModel, build_model, load_model, probe_isolation


@dataclass
class Policy:
    """The trained model with its way of reading and writing messages."""

    model: PackedModel
    chat: Chat

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face folder."""
        self.model.model.save_pretrained(folder)
        self.chat.tokenizer.save_pretrained(folder)


def pick_device(config: RunConfig) -> torch.device:
    """Return the device to train on.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            "device='cuda', but torch sees no CUDA device; set device=cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def make_tasks(config: RunConfig) -> TaskSet:
    """Return the task set of a run."""
    return make_task_set(config.task.name, config.task.params, derive_seed(config.seed, "tasks"))


def load_policy(path: str | Path, config: RunConfig, tasks: TaskSet) -> Policy:
    """Load model and tokenizer from a folder.

    Raises:
        ConfigError: The folder holds no causal model.
        TaskError: The folder holds no usable tokenizer.
    """
    model = load_model(str(path), getattr(torch, config.model.dtype))
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.rollout.max_tokens > longest:
        raise ConfigError(
            f"rollout.max_tokens={config.rollout.max_tokens} exceeds the {longest} positions of the model in {path}; "
            "lower the former"
        )
    ends = model.generation_config.eos_token_id if model.generation_config else None
    chat = Chat(load_tokenizer(path), _schemas(tasks), [ends] if isinstance(ends, int) else ends or [])
    return _policy(model, chat, config)


def build_policy(config: RunConfig, tasks: TaskSet, demos: list[Messages]) -> Policy:
    """Build a random model of `model.init`'s shape, and train its tokenizer on the demonstrations."""
    from spear_fast.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(map(demonstration_text, demos), config.model.init.vocab_size)
    chat = Chat(tokenizer, _schemas(tasks))
    model = build_model(
        config.model.init,
        vocab_size=len(tokenizer),
        eos_id=chat.end_of_turn,
        seed=derive_seed(config.seed, "model"),
        dtype=getattr(torch, config.model.dtype),
    )
    return _policy(model, chat, config)


def make_engine(config: RunConfig, policy: Policy) -> Engine:
    """Return the rollout engine, holding a copy of the policy's weights.

    Raises:
        ConfigError: `engine.name` names none.
    """
    if config.engine.name != "hf":
        raise ConfigError(f"engine.name={config.engine.name!r} is unknown; use hf")
    from spear_fast.rollout.hf_engine import HFEngine

    return HFEngine(
        copy.deepcopy(policy.model.model),
        max_slots=config.rollout.max_concurrent,
        max_model_tokens=config.rollout.max_tokens,
        deterministic=config.rollout.deterministic,
    )


def make_collector(config: RunConfig, tasks: TaskSet, policy: Policy, engine: Engine) -> Collector:
    """Return what rolls out trajectories of `tasks` with `engine`."""
    rollout = config.rollout
    limits = EpisodeLimits(
        max_turns=rollout.max_turns,
        max_turn_tokens=rollout.max_turn_tokens,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        tool_timeout_s=rollout.tool_timeout_s,
        tool_retries=rollout.tool_retries,
        tool_timeouts_s=rollout.tool_timeouts_s,
        env_timeout_s=rollout.env_timeout_s,
        max_observation_chars=rollout.max_observation_chars,
    )
    if rollout.mode == "sync":
        return Collector(tasks, engine, policy.chat, limits, max_concurrent=rollout.max_concurrent, seed=config.seed)
    return PartialCollector(
        tasks,
        engine,
        policy.chat,
        limits,
        max_concurrent=rollout.max_concurrent,
        seed=config.seed,
        oversample=rollout.oversample,
        max_stale_steps=rollout.max_stale_steps,
    )


def _policy(model: torch.nn.Module, chat: Chat, config: RunConfig) -> Policy:
    packed = PackedModel(model.to(pick_device(config)))  # type: ignore[arg-type]
    probe_isolation(packed)
    return Policy(packed, chat)


def _schemas(tasks: TaskSet) -> list[dict[str, object]]:
    return [tool_schema(tool) for tool in tasks.tools]
