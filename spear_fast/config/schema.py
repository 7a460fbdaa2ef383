"""Every setting of a run, with its type, default, unit and meaning. The one place where options are declared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .machine import EngineConfig, MemoryConfig, ParallelConfig
from .section import (
    Beta,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    UnitInterval,
)


def _check_bounds(section: str, lower: float, upper: float) -> None:
    if lower >= upper:
        raise ValueError(
            f"{section}.cov_lower={lower} must be below {section}.cov_upper={upper}; nothing would lie between them"
        )


class TaskConfig(Section):
    """Which problems to solve."""

    name: str
    """A registered task set, e.g. "calculator", "treasure" or "prompts"."""
    params: dict[str, Any] = Field(default={})
    """Settings of the task set itself; each set declares and checks its own."""


class ModelInit(Section):
    """Shape of a Qwen2-architecture model built at random, when `model.path` is not given."""

    hidden_size: Positive = 160
    """Width H."""
    num_layers: Positive = 4
    """Transformer blocks."""
    num_heads: Positive = 4
    """Query heads; must divide hidden_size."""
    num_kv_heads: Positive = 2
    """Key/value heads; must divide num_heads."""
    intermediate_size: Positive = 448
    """Width of the feed-forward block."""
    max_positions: Positive = 1024
    """Longest sequence, in tokens."""
    vocab_size: Positive = 512
    """Upper limit for the tokenizer trained on demonstrations."""
    init_std: PositiveFloat = 0.06
    """Standard deviation of the initial weights. Small models learn to copy far sooner than with 0.02."""
    tie_embeddings: bool = True
    """Share the embedding and the head."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelInit:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if (self.hidden_size // self.num_heads) % 2:
            raise ValueError("hidden_size / num_heads must be even (rotary embedding)")
        return self


class LoraConfig(Section):
    """Low-rank adapters through peft, instead of training all weights."""

    rank: NonNegative = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: PositiveFloat = 32.0
    """Scale of the adapters: they add alpha / rank * B A."""
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), strict=False
    )
    """Names of the linear layers that get adapters."""


class ModelConfig(Section):
    """The policy."""

    path: str | None = None
    """Folder of a Hugging Face causal model with its tokenizer; None builds a random model from `init`."""
    init: ModelInit = ModelInit()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the forward and backward pass; master weights and optimizer state are float32."""
    attention: Literal["auto", "flash", "flex", "sdpa"] = "auto"
    """Packed attention: flash-attn's varlen, FlexAttention or SDPA; "auto" takes the first that works here."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's RMSNorm, RoPE and SwiGLU; "auto" uses them on CUDA when liger-kernel is installed."""
    compile: bool = False
    """Compile each block with torch.compile."""
    lora: LoraConfig = LoraConfig()


class ColdStartConfig(Section):
    """Supervised start on demonstrations of the task (the paper cold-starts too), within `spear-fast train` or before
    it by `spear-fast sft`."""

    steps: NonNegative = 0
    """Optimizer steps; 0 skips the cold start."""
    num_demos: Positive = 2048
    """Demonstrations that the task's expert gives, on tasks that are not held out."""
    demos_file: str | None = None
    """Demonstrations to use instead of the expert's: JSONL, a line being {"messages": [...]}; all of them are used."""
    batch_size: Positive = 64
    """Demonstrations per optimizer step."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate; linear warm-up, then cosine to zero."""
    warmup_steps: NonNegative = 10
    """Optimizer steps."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """Share of the demonstrations that `spear-fast sft` keeps for the held-out loss, chosen by a hash of their text; 0
    keeps none. The cold start within `spear-fast train` learns from all."""
    eval_file: str | None = None
    """Demonstrations for the held-out loss of `spear-fast sft`, instead of a share; format of demos_file."""
    eval_success: bool = True
    """Let `spear-fast sft` end with the success on held-out tasks, as `eval` says."""


class RolloutConfig(Section):
    """How trajectories are sampled."""

    mode: Literal["sync", "partial"] = "sync"
    """"sync" waits for every trajectory of a step; "partial" starts more groups than a step needs, pauses the
    stragglers when enough are done, and goes on with them in the next step."""
    oversample: Annotated[float, Field(ge=1.0)] = 1.5
    """With "partial": groups in flight, as a multiple of prompts_per_step."""
    max_stale_steps: Positive = 2
    """With "partial": a paused group that is this many steps old is waited for."""
    prompts_per_step: Positive = 16
    """Prompts P per training step."""
    group_size: Positive = 8
    """Trajectories G per prompt."""
    max_turns: Positive = 4
    """Messages the policy may write in one trajectory."""
    max_turn_tokens: Positive = 64
    """Longest message, in tokens."""
    max_tokens: Positive = 512
    """Longest row, prompt and observations included, in tokens: a whole trajectory with history "full", the present
    message and what is shown before it with "windowed"."""
    history: Literal["full", "windowed"] = "full"
    """"full" shows the policy the whole conversation, as one row (or several, where the chat template rewrites earlier
    messages); "windowed" shows the opening messages and the last exchanges, and each message is a row of its own."""
    window: Positive = 2
    """With "windowed": exchanges shown, each a message of the policy and the answer to it."""
    drop_thoughts: bool = True
    """With "windowed": leave <think>...</think> out of earlier messages."""
    refill_attempts: NonNegative = 1
    """How often a training trajectory that failed (environment, tool timeout, engine) is played again."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of training; log-probs are taken at it."""
    max_concurrent: Positive = 256
    """Trajectories in flight on one rank, and requests that its engine runs at once."""
    tool_timeout_s: PositiveFloat = 30.0
    """Longest run of one tool call, in seconds."""
    tool_timeouts_s: dict[str, PositiveFloat] = Field(default={})
    """The same for single tools, by name."""
    tool_retries: NonNegative = 0
    """Repeats of an async tool's call that timed out, before the trajectory ends as tool_timeout."""
    tool_concurrency: dict[str, Positive] = Field(default={})
    """Calls of single tools that run at once on one rank, by name; without, sync tools share 64 threads."""
    env_timeout_s: PositiveFloat = 60.0
    """Longest reset or step of an environment, in seconds."""
    max_observation_chars: Annotated[int, Field(ge=2)] = 4096
    """Longer tool results and observations are cut in the middle."""
    deterministic: bool = False
    """Let the engine advance only when no tool is running, so that a run repeats bit for bit. Costs overlap."""

    @property
    def most_rows(self) -> int:
        """Rows of a trajectory at most, where the chat template rewrites nothing."""
        return self.max_turns if self.history == "windowed" else 1

    @property
    def most_sampled_tokens(self) -> int:
        """Sampled tokens of a row at most."""
        return min(self.max_turns // self.most_rows * self.max_turn_tokens, self.max_tokens)


class AdvantageConfig(Section):
    """On-policy advantages (algorithm: GRPO, Dr.GRPO, GiGPO)."""

    estimator: Literal["grpo", "gigpo"] = "grpo"
    """"grpo" compares whole trajectories of a prompt; "gigpo" adds a comparison of steps from equal states."""
    std_norm: bool = True
    """Divide by the standard deviation of the group's rewards; Dr.BoT does not."""
    step_weight: NonNegativeFloat = 1.0
    """GiGPO: weight w of the step advantage."""
    gamma: UnitInterval = 0.95
    """GiGPO: discount of step returns."""
    step_std_norm: bool = True
    """GiGPO: divide step advantages by the standard deviation of the step group."""


class IntrinsicConfig(Section):
    """Intrinsic reward for tool use, R = R_outcome + mu(step) * R_tool."""

    mode: Literal["cosine", "constant", "none"] = "none"
    """How mu runs: cosine decay to 0, always 1, or always 0."""
    variant: Literal["graded", "graded-negative"] = "graded"
    """"graded" gives min(1, per_call * calls); "graded-negative" gives successes 1 if they called and failures the
    graded reward."""
    count: Literal["tool_calls", "turns"] = "tool_calls"
    """What is counted; step-wise text games count turns."""
    per_call: NonNegativeFloat = 0.1
    """Reward per call before the cap of 1."""
    decay_steps: Positive = 200
    """T_decay of the cosine, in training steps."""


class FilterConfig(Section):
    """Dr.BoT filters: responses whose tokens leave the loss, and groups that teach little."""

    overlong: bool = False
    """Drop trajectories cut by a token limit."""
    incomplete: bool = False
    """Drop trajectories with neither a tool call nor an answer."""
    repetitive: bool = False
    """Drop trajectories in which some n-gram of token ids occurs `max_repeats` times or more."""
    unreadable: bool = False
    """Drop trajectories whose sampled tokens do not decode."""
    ngram: Positive = 20
    """Length n of the n-gram, in tokens."""
    max_repeats: Positive = 10
    """Occurrences that make a response repetitive."""
    keep_groups: Share = 1.0
    """Share of groups kept, those with the highest standard deviation of reward."""


class LossConfig(Section):
    """Token loss and its aggregation."""

    kind: Literal["ppo", "clip_cov", "kl_cov", "gspo", "cispo", "reinforce"] = "ppo"
    """Token loss."""
    clip_low: NonNegativeFloat = 0.2
    """eps_low: the ratio is clipped below at 1 - eps_low."""
    clip_high: NonNegativeFloat = 0.2
    """eps_high: the ratio is clipped above at 1 + eps_high."""
    dual_clip: float | None = Field(default=None, gt=1.0)
    """Dual-clip constant c for negative advantages; None switches it off."""
    cov_ratio: UnitInterval = 0.02
    """Share of action tokens chosen by Clip-Cov or KL-Cov."""
    cov_lower: float = 1.0
    """Clip-Cov: lower covariance bound of candidates."""
    cov_upper: float = 40.0
    """Clip-Cov: upper covariance bound of candidates."""
    kl_cov_coef: NonNegativeFloat = 1.0
    """KL-Cov: weight of |log ratio| on the chosen tokens."""
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = (
        "token-mean"
    )
    """How token losses become one number; "...-norm" divides token sums by the constant `norm_length`."""
    norm_length: Positive | None = None
    """Constant of "seq-mean-token-sum-norm", in tokens; None takes rollout.max_tokens."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to the cold-started policy."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL; k3 is verl's "low_var_kl"."""
    stats: Literal["minibatch", "microbatch"] = "minibatch"
    """Where covariance statistics and draws are made; "microbatch" reproduces the authors' code."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> LossConfig:
        _check_bounds("algo.loss", self.cov_lower, self.cov_upper)
        return self


class ReplayConfig(Section):
    """Replay buffer and self-imitation (SIL)."""

    enabled: bool = False
    """Store good trajectories and imitate them later."""
    buffer_size: Positive = 2048
    """Rows drawn at most for one replay; a row is a trajectory, but for the histories that make several of one."""
    baseline_size: Positive = 10240
    """Capacity of the FIFO D_R of group mean rewards."""
    tolerate_steps: Positive = 5
    """Age in policy versions beyond which a stored row is dropped."""
    ripe_factor: PositiveFloat = 1.5
    """Replay happens when more than ripe_factor * buffer_size eligible rows are stored."""
    require_tool_call: bool = True
    """Store only trajectories with a valid tool call; without tools, those with a valid action."""
    recalibrate: Literal["p50", "decay", "none"] = "p50"
    """"p50": A~ = R - median(D_R); "decay": A~ = A * decay_weight; "none": A~ = A."""
    decay_weight: Share = 0.9
    """w of "decay"."""
    mode: Literal["separate_step", "joint"] = "separate_step"
    """Own optimizer steps after the on-policy ones, or one objective J + gamma * J_SIL."""
    coef: PositiveFloat = 1.0
    """Weight of the SIL loss before its warm-up gamma."""
    warmup_steps: NonNegative = 300
    """T_warm of the cosine warm-up gamma, in training steps."""
    cov_ratio: UnitInterval = 0.02
    """Clip-Cov share on replayed tokens."""
    cov_lower: float = 1.0
    """Clip-Cov lower bound on replayed tokens."""
    cov_upper: float = 40.0
    """Clip-Cov upper bound on replayed tokens."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> ReplayConfig:
        _check_bounds("algo.replay", self.cov_lower, self.cov_upper)
        return self


class AlgoConfig(Section):
    """The learning algorithm; `preset` fills the sections, explicit keys override it."""

    preset: Literal["grpo", "drbot", "gigpo", "spear", "spear_gigpo"] | None = None
    """A named algorithm; None starts from the defaults below."""
    advantage: AdvantageConfig = AdvantageConfig()
    intrinsic: IntrinsicConfig = IntrinsicConfig()
    filters: FilterConfig = FilterConfig()
    loss: LossConfig = LossConfig()
    replay: ReplayConfig = ReplayConfig()


class UpdateConfig(Section):
    """Optimizer and batching."""

    lr: PositiveFloat = 1e-6
    """Learning rate after warm-up; constant."""
    warmup_steps: NonNegative = 0
    """Linear warm-up, in optimizer steps."""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), strict=False)
    """Decay of AdamW's moments."""
    weight_decay: NonNegativeFloat = 0.0
    """Of matrices; norms and biases never decay."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    mini_batch_size: Positive | None = None
    """Rows per optimizer step: trajectories or, with windowed history, their messages. None puts a whole training step
    into one."""
    epochs: Positive = 1
    """Passes over the trajectories of a training step."""
    token_budget: Positive = 8192
    """Packed tokens per micro-batch."""
    share_prompts: bool = True
    """Compute the common prompt of a group's trajectories once per micro-batch instead of once per trajectory."""
    old_logp: Literal["auto", "sampler", "recompute"] = "auto"
    """Old log-probs: the sampler's own, or a forward pass of the trainer before the update. "auto" recomputes only
    when update.epochs or update.tis_clip makes it needed."""
    max_logp_gap: PositiveFloat = 0.1
    """Largest mean |trainer - sampler| log-prob difference in nats; above it the run stops."""
    tis_clip: float | None = Field(default=None, gt=0.0)
    """With "recompute": weight tokens by min(exp(trainer - sampler), tis_clip); None switches it off."""
    head_chunk_mib: Positive | None = None
    """Memory for the logits that exist at once, in MiB; None takes 1024 on a GPU and 64 on the CPU."""

    @property
    def recompute_old_logp(self) -> bool:
        """Whether a forward pass before the update replaces the sampler's log-probs."""
        if self.old_logp != "auto":
            return self.old_logp == "recompute"
        return self.epochs > 1 or self.tis_clip is not None

    @property
    def head_chunk_bytes(self) -> int | None:
        """`head_chunk_mib` in bytes."""
        return None if self.head_chunk_mib is None else self.head_chunk_mib << 20


class EvalConfig(Section):
    """Held-out evaluation."""

    every: NonNegative = 0
    """Training steps between evaluations; 0 evaluates only before the first and after the last step."""
    num_tasks: Positive = 128
    """Held-out tasks used, from the first."""
    samples: Positive = 1
    """Trajectories per task."""
    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: Share = 1.0
    """Tokens are drawn from the smallest set of the likeliest whose probabilities add up to this; 1 keeps all."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegative = 10
    """Training steps between checkpoints; 0 saves only the last."""
    keep: Positive = 2
    """Newest checkpoints kept."""


class LogConfig(Section):
    """What is shown and written."""

    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    """Live display, one line per step, or nothing; auto picks by terminal."""
    tensorboard: bool = True
    """Write TensorBoard events when the package is installed."""
    sample_every: NonNegative = 10
    """Training steps between saved sample trajectories; 0 saves none."""
    num_samples: Positive = 4
    """Trajectories saved each time."""


class RunConfig(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder name of the run under `out`: letters, digits, dot, dash and underscore."""
    out: str = "runs"
    """Folder of all runs."""
    seed: NonNegative = 0
    """Of every draw of the run."""
    steps: NonNegative
    """Training steps after the cold start."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy is trained and sampled; auto takes CUDA when there is one."""
    task: TaskConfig
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    rollout: RolloutConfig = RolloutConfig()
    algo: AlgoConfig = AlgoConfig()
    update: UpdateConfig = UpdateConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def engine_dtype(self) -> str:
        """Type of the engine's weights."""
        return self.model.dtype if self.engine.dtype == "auto" else self.engine.dtype

    @property
    def needs_sharding(self) -> bool:
        """Whether even a single rank trains through FSDP2, which keeps float32 masters beside bfloat16 passes."""
        return self.model.dtype == "bfloat16" or self.parallel.cpu_offload

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        problems = [sentence for broken, sentence in self._conditions() if broken]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _conditions(self) -> list[tuple[bool, str]]:
        """Every condition between sections: whether it is broken, and what to say then."""
        rollout, update, init = self.rollout, self.update, self.model.init
        built = self.model.path is None
        return [
            (
                rollout.max_tokens > update.token_budget,
                f"update.token_budget={update.token_budget} is smaller than rollout.max_tokens={rollout.max_tokens}: a "
                "single trajectory would not fit; raise the former or lower the latter",
            ),
            (
                built and rollout.max_tokens > init.max_positions,
                f"rollout.max_tokens={rollout.max_tokens} exceeds model.init.max_positions={init.max_positions}; raise "
                "the latter",
            ),
            (
                rollout.max_turn_tokens > rollout.max_tokens,
                f"rollout.max_turn_tokens={rollout.max_turn_tokens} exceeds rollout.max_tokens={rollout.max_tokens}; "
                "lower the former",
            ),
            (
                update.tis_clip is not None and update.old_logp == "sampler",
                "update.tis_clip needs update.old_logp=recompute: with the sampler's log-probs the ratio already holds "
                "the correction",
            ),
            (
                rollout.group_size == 1 and self.algo.advantage.estimator == "gigpo",
                "algo.advantage.estimator=gigpo needs rollout.group_size of 2 or more; raise it or use grpo",
            ),
            (
                rollout.mode == "partial" and rollout.deterministic,
                "rollout.deterministic=true needs rollout.mode=sync: which trajectories are paused depends on time",
            ),
            (
                self.engine.placement == "process" and self.engine.name != "vllm",
                f"engine.placement=process needs engine.name=vllm, not {self.engine.name}; set engine.placement=inproc",
            ),
            (
                built and self.cold_start.steps == 0,
                "a model built at random cannot act: set cold_start.steps to 1 or more, or model.path",
            ),
            (
                built and self.model.lora.rank > 0,
                f"model.lora.rank={self.model.lora.rank} trains adapters of a model that knows something, but without "
                "model.path one is built at random; set model.path, or model.lora.rank=0",
            ),
        ]
