"""What a configuration amounts to, in words and counts: the table of a dry run."""

from __future__ import annotations

from math import ceil

from .schema import AlgoConfig, ModelConfig, ModelInit, RunConfig


def describe(config: RunConfig) -> list[tuple[str, str]]:
    """Return (label, value) pairs to print, from the run's folder to its algorithm; counts are upper limits."""
    return [
        ("run", f"{config.name}, seed {config.seed}, {config.steps} training steps on device {config.device}"),
        ("outputs", f"{config.out}/{config.name}/"),
        ("task", _task(config)),
        ("model", _model(config.model)),
        ("cold start", _cold_start(config)),
        *_step_counts(config),
        *_algorithm(config.algo),
        ("evaluation", _evaluation(config)),
        ("checkpoints", _checkpoints(config)),
    ]


def describe_sft(config: RunConfig) -> list[tuple[str, str]]:
    """Return (label, value) pairs to print for `spear-fast sft`."""
    cold_start = config.cold_start
    held_out = cold_start.eval_file or f"{cold_start.eval_fraction:.0%} of the demonstrations"
    success = f"; success on {config.eval.num_tasks} held-out tasks" if cold_start.eval_success else ""
    kept = [pair for pair in describe(config) if pair[0] in ("outputs", "task", "model", "checkpoints")]
    return [
        ("supervised run", f"{config.name}, seed {config.seed}, on device {config.device}"),
        ("training", f"{_cold_start(config)}, learning rate {cold_start.lr:g}"),
        ("held out", held_out + success),
        *kept,
    ]


def num_parameters(init: ModelInit) -> int:
    """Return the weights of a Qwen2 model of this shape when the tokenizer uses its whole vocabulary."""
    width = init.hidden_size
    kv_width = width // init.num_heads * init.num_kv_heads
    queries_and_output = 2 * width * width + width
    keys_and_values = 2 * (width * kv_width + kv_width)
    feed_forward = 3 * width * init.intermediate_size
    norms = 2 * width
    embeddings = init.vocab_size * width * (1 if init.tie_embeddings else 2)
    return init.num_layers * (queries_and_output + keys_and_values + feed_forward + norms) + width + embeddings


def _task(config: RunConfig) -> str:
    params = ", ".join(f"{key}={value}" for key, value in config.task.params.items())
    return f"{config.task.name} ({params})" if params else config.task.name


def _model(model: ModelConfig) -> str:
    if model.path is not None:
        return f"{model.path}, {model.dtype}"
    init = model.init
    return (
        f"random Qwen2, {init.num_layers} layers of width {init.hidden_size}, "
        f"at most {num_parameters(init) / 1e6:.2f} M parameters, {model.dtype}"
    )


def _cold_start(config: RunConfig) -> str:
    cold_start = config.cold_start
    if cold_start.steps == 0:
        return "none"
    source = f"those in {cold_start.demos_file}" if cold_start.demos_file else f"{cold_start.num_demos} demonstrations"
    return f"{cold_start.steps} steps of {cold_start.batch_size} out of {source}"


def _step_counts(config: RunConfig) -> list[tuple[str, str]]:
    rollout, update = config.rollout, config.update
    trajectories = rollout.prompts_per_step * rollout.group_size
    rows = trajectories * rollout.most_rows
    kept = ceil(rollout.prompts_per_step * config.algo.filters.keep_groups) * rollout.group_size * rollout.most_rows
    optimizer_steps = ceil(kept / (update.mini_batch_size or kept)) * update.epochs
    return [
        (
            "trajectories per step",
            f"{trajectories:,} ({rollout.prompts_per_step} prompts x {rollout.group_size}), "
            f"{min(rollout.max_concurrent, trajectories)} at once, at most {rollout.max_turns} turns each",
        ),
        (
            "tokens per step",
            f"at most {rows * rollout.max_tokens:,}, of them {rows * rollout.most_sampled_tokens:,} sampled"
            + (f", in {rows:,} rows of one message each" if rollout.history == "windowed" else ""),
        ),
        (
            "optimizer steps per step",
            f"at most {optimizer_steps} on-policy, micro-batches of {update.token_budget:,} tokens, "
            f"learning rate {update.lr:g}",
        ),
    ]


def _algorithm(algo: AlgoConfig) -> list[tuple[str, str]]:
    advantage, loss, filters, intrinsic, replay = algo.advantage, algo.loss, algo.filters, algo.intrinsic, algo.replay
    active = [name for name in ("overlong", "incomplete", "repetitive", "unreadable") if getattr(filters, name)]
    normalised = "divided by the group's std" if advantage.std_norm else "not divided by the group's std"
    step_text = (
        f", step weight {advantage.step_weight:g}, discount {advantage.gamma:g}"
        if advantage.estimator == "gigpo"
        else ""
    )
    mu = {"cosine": f"cosine decay over {intrinsic.decay_steps} steps", "constant": "1", "none": "0"}[intrinsic.mode]
    dual = "" if loss.dual_clip is None else f", dual clip {loss.dual_clip:g}"
    replay_text = (
        f"{replay.mode}, {replay.recalibrate} baseline, up to {replay.buffer_size:,} rows "
        f"at most {replay.tolerate_steps} versions old, gamma warm-up over {replay.warmup_steps} steps"
    )
    return [
        ("preset", algo.preset or "none"),
        ("advantage", f"{advantage.estimator}, {normalised}{step_text}"),
        ("loss", f"{loss.kind}, clip -{loss.clip_low:g}/+{loss.clip_high:g}{dual}, {loss.aggregation}"),
        ("filters", f"{', '.join(active) or 'none'}; {filters.keep_groups:.0%} of the groups kept"),
        ("intrinsic reward", f"{intrinsic.variant}, mu: {mu}" if intrinsic.mode != "none" else "none"),
        ("self-imitation", replay_text if replay.enabled else "off"),
    ]


def _evaluation(config: RunConfig) -> str:
    evaluation = config.eval
    when = f"every {evaluation.every} steps" if evaluation.every else "before the first and after the last step"
    return f"{evaluation.num_tasks} held-out tasks x {evaluation.samples}, {when}"


def _checkpoints(config: RunConfig) -> str:
    checkpoint = config.checkpoint
    when = f"every {checkpoint.every} steps" if checkpoint.every else "after the last step"
    return f"{when}, newest {checkpoint.keep} kept"
