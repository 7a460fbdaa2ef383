"""From a configuration to the objects of a run: tasks, policy, engine, collector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from spear_fast.config.schema import RunConfig
from spear_fast.data.chat import Chat, load_tokenizer
from spear_fast.dist import Ranks
from spear_fast.envs.base import Closable, TaskSet
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import ConfigError
from spear_fast.memory.here import plan_here
from spear_fast.memory.plan import MemoryPlan
from spear_fast.memory.shapes import shape_of_file
from spear_fast.rollout.collector import Collector
from spear_fast.rollout.demos import Messages, demonstration_text
from spear_fast.rollout.engine import Engine
from spear_fast.rollout.episode import EpisodeLimits
from spear_fast.rollout.history import HistoryRule
from spear_fast.rollout.partial import PartialCollector
from spear_fast.seeds import derive_seed
from spear_fast.sync.push import push_weights
from spear_fast.update.attention import choose_attention
from spear_fast.update.liger import use_liger
from spear_fast.update.model import PackedModel, build_model, load_model, probe_isolation
from spear_fast.update.sharding import shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLEEP_LEVELS: dict[str, Literal[0, 1, 2]] = {"resident": 0, "sleep1": 1, "sleep2": 2, "offload": 2}
"""How deep vLLM sleeps while the policy is trained, by mode of the memory plan."""


@dataclass
class Policy:
    """The trained model with its way of reading and writing messages."""

    model: PackedModel
    chat: Chat

    def save(self, folder: Path, ranks: Ranks, dtype: torch.dtype | None = None) -> None:
        """Write model and tokenizer as a Hugging Face folder; all ranks gather, the main one writes.

        `dtype` None writes the master weights as they are.
        """
        self.model.save_full(folder, dtype)
        if ranks.is_main:
            self.chat.tokenizer.save_pretrained(folder)
        # Others may want to read it at once.
        ranks.barrier()


def make_tasks(config: RunConfig) -> TaskSet:
    """Return the task set of a run."""
    return make_task_set(config.task.name, config.task.params, derive_seed(config.seed, "tasks"))


def close_tasks(tasks: TaskSet) -> None:
    """Free what a task set holds for all its environments, if it holds something."""
    if isinstance(tasks, Closable):
        tasks.close()


def load_policy(path: str | Path, config: RunConfig, tasks: TaskSet) -> Policy:
    """Load model and tokenizer from a folder.

    Raises:
        ConfigError: The folder holds no causal model.
        TaskError: The folder holds no usable tokenizer.
    """
    # Sharding makes float32 masters itself, block by block; until then the file's own type takes the least memory.
    model = load_model(str(path), None if config.needs_sharding else torch.float32)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.rollout.max_tokens > longest:
        raise ConfigError(
            f"rollout.max_tokens={config.rollout.max_tokens} exceeds the {longest} positions of the model in {path}; "
            "lower the former"
        )
    ends = model.generation_config.eos_token_id if model.generation_config else None
    chat = Chat(load_tokenizer(path), _schemas(tasks), [ends] if isinstance(ends, int) else ends or [])
    return _policy(model, chat)


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
        dtype=torch.float32,
    )
    return _policy(model, chat)


def make_trainable(policy: Policy, config: RunConfig, ranks: Ranks) -> None:
    """Give a policy its adapters if it shall have some, and put it on this rank's device, or its part of it."""
    if config.model.lora.rank:
        from spear_fast.update.lora import add_adapters

        add_adapters(policy.model.model, **config.model.lora.model_dump(), seed=derive_seed(config.seed, "lora"))
    spread(policy, config, ranks)


def spread(policy: Policy, config: RunConfig, ranks: Ranks) -> None:
    """Put a policy on this rank's device, or its part of it, fused and compiled as the configuration says."""
    dtype = getattr(torch, config.model.dtype)
    use_liger(policy.model.model, config.model.liger, ranks.device)
    if ranks.mesh is None:
        policy.model.model.to(ranks.device)  # type: ignore[arg-type]
    model = policy.model.model.config.get_text_config()
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    policy.model.attention = choose_attention(config.model.attention, ranks.device, dtype, head_dim)
    shard(policy.model, ranks, config.parallel, dtype, compile_blocks=config.model.compile)
    probe_isolation(policy.model)


def plan_run(config: RunConfig, folder: Path, ranks: Ranks) -> MemoryPlan:
    """Return how trainer and engine share this rank's memory.

    Raises:
        ConfigError: They do not fit.
    """
    return plan_here(shape_of_file(folder / "config.json"), config, ranks.size, ranks.device)


def make_engine(config: RunConfig, folder: Path, policy: Policy, ranks: Ranks, plan: MemoryPlan) -> Engine:
    """Return this rank's rollout engine for the model in `folder`; its weights come with the first push.

    Raises:
        ConfigError, EngineError, MissingDependencyError: It cannot run this model here.
    """
    engine, rollout = config.engine, config.rollout
    dtype = getattr(torch, config.engine_dtype)
    if engine.name == "hf":
        from spear_fast.rollout.hf_engine import HFEngine

        return HFEngine(
            load_model(str(folder), dtype).to(ranks.device),  # type: ignore[arg-type]
            max_slots=rollout.max_concurrent,
            max_model_tokens=rollout.max_tokens,
            vocab_size=policy.model.vocab_size,
            deterministic=rollout.deterministic,
        )
    from spear_fast.rollout.vllm_factory import make_vllm_engine

    return make_vllm_engine(
        str(folder),
        placement=engine.placement,
        dtype=config.engine_dtype,
        max_model_tokens=rollout.max_tokens,
        max_concurrent=rollout.max_concurrent,
        vocab_size=policy.model.vocab_size or policy.model.head[0].shape[0],
        kv_cache_bytes=plan.kv_cache_bytes,
        max_batched_tokens=engine.max_batched_tokens,
        enforce_eager=engine.enforce_eager,
        prefix_caching=engine.prefix_caching,
        sleep_level=SLEEP_LEVELS[plan.mode],
        deterministic=rollout.deterministic,
        device=ranks.device,
        seed=derive_seed(config.seed, "engine", ranks.rank),
        bucket_bytes=engine.bucket_mib << 20,
    )


def push_policy(config: RunConfig, policy: Policy, engine: Engine, version: int, *, verify: bool) -> dict[str, float]:
    """Bring the policy's weights into the engine as `version`; see `sync.push.push_weights`."""
    return push_weights(
        policy.model.export_parameters(),
        engine,
        version,
        dtype=getattr(torch, config.engine_dtype),
        bucket_bytes=config.engine.bucket_mib << 20,
        verify=verify,
    )


def history_rule(config: RunConfig) -> HistoryRule:
    """Return how much of the conversation the policy sees."""
    rollout = config.rollout
    return HistoryRule(rollout.history, rollout.window, rollout.drop_thoughts)


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
        tool_concurrency=rollout.tool_concurrency,
        env_timeout_s=rollout.env_timeout_s,
        max_observation_chars=rollout.max_observation_chars,
        history=history_rule(config),
    )
    if rollout.mode == "sync":
        return Collector(
            tasks,
            engine,
            policy.chat,
            limits,
            max_concurrent=rollout.max_concurrent,
            seed=config.seed,
            refill_attempts=rollout.refill_attempts,
        )
    return PartialCollector(
        tasks,
        engine,
        policy.chat,
        limits,
        max_concurrent=rollout.max_concurrent,
        seed=config.seed,
        refill_attempts=rollout.refill_attempts,
        oversample=rollout.oversample,
        max_stale_steps=rollout.max_stale_steps,
    )


def _policy(model: PreTrainedModel, chat: Chat) -> Policy:
    packed = PackedModel(model)
    if chat.vocab_size < packed.head[0].shape[0]:
        packed.vocab_size = chat.vocab_size
    return Policy(packed, chat)


def _schemas(tasks: TaskSet) -> list[dict[str, object]]:
    return [tool_schema(tool) for tool in tasks.tools]
