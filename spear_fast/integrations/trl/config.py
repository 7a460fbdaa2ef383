"""Settings of SPEARTrainer: GRPOConfig with SPEAR's options beside TRL's, and which combinations make sense."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig  # pyright: ignore[reportPrivateImportUsage]

from spear_fast.errors import ConfigError
from spear_fast.losses.terms import on_policy_terms, replay_terms
from spear_kernels import PolicyLossConfig

POLICY_LOSSES = ("clip_cov", "kl_cov", "ppo", "gspo", "cispo", "reinforce", "trl")
AGGREGATIONS = {"grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm", "dapo": "token-mean"}
"""TRL's `loss_type`, as far as it names how token losses are averaged, in the words of the loss kernels."""
_CHOICES = {
    "policy_loss": POLICY_LOSSES,
    "cov_stats": ("minibatch", "microbatch"),
    "intrinsic_mode": ("cosine", "constant", "none"),
    "intrinsic_variant": ("graded", "graded-negative"),
    "intrinsic_count": ("tool_calls", "turns"),
    "replay_mode": ("separate_step", "joint", "off"),
    "replay_recalibrate": ("p50", "decay", "none"),
}
_POSITIVE = ("intrinsic_decay_steps", "repetition_ngram", "repetition_max_repeats", "replay_buffer_size",
             "replay_baseline_size", "replay_tolerate_steps", "replay_ripe_factor", "replay_coef")  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class SPEARConfig(GRPOConfig):
    """GRPOConfig with SPEAR's options (arXiv 2509.22601) and Dr.BoT's defaults for TRL's own.

    TRL's `loss_type` names the aggregation ("grpo", "dr_grpo" or "dapo"), `policy_loss` the loss of a token. Averages
    over sequences ("grpo", "dr_grpo") count those with an action token; TRL divides by all rows, filtered ones too.
    Dr.BoT's filter of incomplete trajectories is absent: TRL does not say whether an answer was given. A round is
    one generation batch and the updates on it; with TRL's defaults it is one optimizer step. Schedules, ages and the
    replay count rounds. Bad combinations raise ConfigError, which names the field, the value and the remedy.
    """

    epsilon_high: float | None = _option(0.28, "Upper clip range eps_high (clip-higher); None takes `epsilon`.")
    scale_rewards: str = _option("none", "Division of advantages: 'group', 'batch' or 'none' (Dr.BoT).")
    loss_type: str = _option(
        "dr_grpo",
        "Aggregation: 'grpo' and 'dr_grpo' (averages over sequences with an action token; TRL's are over all rows) or "
        "'dapo'; any of TRL's, averaged as TRL does, with policy_loss='trl'.",
    )
    mask_truncated_completions: bool = _option(
        True, "Drop completions cut at the token limit (Dr.BoT's overlong filter)."
    )

    policy_loss: str = _option(
        "clip_cov", f"Loss of a token, one of {', '.join(POLICY_LOSSES)}; 'trl' leaves the on-policy loss to TRL."
    )
    dual_clip: float | None = _option(10.0, "Bound c of the dual clip for negative advantages; None: off.")
    cov_ratio: float = _option(0.02, "Share of action tokens that Clip-Cov drops or KL-Cov penalises.")
    cov_lower: float = _option(1.0, "Clip-Cov: candidates have a covariance above this.")
    cov_upper: float = _option(40.0, "Clip-Cov: candidates have a covariance below this.")
    kl_cov_coef: float = _option(1.0, "KL-Cov: weight of |logp - old_logp| on the chosen tokens.")
    cov_stats: str = _option(
        "minibatch",
        "Where covariances and draws are made: over the optimizer step and all ranks ('minibatch'; one more forward "
        "pass if it has several micro-batches or ranks) or for each micro-batch ('microbatch').",
    )

    intrinsic_mode: str = _option(
        "cosine", "Weight mu of the tool-call reward: 'cosine' decay, 'constant' 1, or 'none'."
    )
    intrinsic_decay_steps: int = _option(200, "T_decay of the cosine, in rounds.")
    intrinsic_variant: str = _option(
        "graded", "'graded': min(1, per_call * calls); 'graded-negative': 1 for a success that called, else graded."
    )
    intrinsic_count: str = _option("tool_calls", "What is counted: 'tool_calls', or 'turns' for step-wise text games.")
    intrinsic_per_call: float = _option(0.1, "Reward per call before the cap of 1.")

    keep_groups: float = _option(0.75, "Share of groups kept, those with the highest standard deviation of reward.")
    filter_repetitive: bool = _option(True, "Drop completions in which some n-gram of token ids occurs too often.")
    filter_unreadable: bool = _option(True, "Drop completions that do not decode to valid UTF-8.")
    repetition_ngram: int = _option(20, "Length n of that n-gram, in tokens.")
    repetition_max_repeats: int = _option(10, "Occurrences that make a completion repetitive.")

    replay_mode: str = _option(
        "separate_step",
        "Self-imitation: 'separate_step' (own optimizer steps after the round's), 'joint' (one objective), or 'off'.",
    )
    replay_buffer_size: int = _option(2048, "Trajectories drawn at most for one replay.")
    replay_baseline_size: int = _option(10240, "Capacity of the FIFO of group mean rewards.")
    replay_tolerate_steps: int = _option(5, "Age in rounds beyond which a stored trajectory is dropped.")
    replay_ripe_factor: float = _option(1.5, "Replay needs more than ripe_factor * buffer_size eligible trajectories.")
    replay_require_tool_call: bool = _option(True, "Store only trajectories with a valid tool call.")
    replay_recalibrate: str = _option(
        "p50", "A~ of a stored trajectory: 'p50' R - median, 'decay' A * weight, 'none' A."
    )
    replay_decay_weight: float = _option(0.9, "Weight of 'decay'.")
    replay_coef: float = _option(1.0, "Weight of the self-imitation loss before its warm-up gamma.")
    replay_warmup_steps: int = _option(300, "T_warm of the cosine warm-up gamma, in rounds.")
    replay_cov_ratio: float = _option(0.02, "Clip-Cov share on replayed tokens.")
    replay_cov_lower: float = _option(1.0, "Clip-Cov lower bound on replayed tokens.")
    replay_cov_upper: float = _option(40.0, "Clip-Cov upper bound on replayed tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_values(self)
        _check_trl_options(self)
        try:
            on_policy, replayed = self.loss_terms()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        assert on_policy.aggregation == replayed.aggregation

    def loss_terms(self) -> tuple[PolicyLossConfig, PolicyLossConfig]:
        """The token loss of fresh rows and that of replayed rows; with policy_loss="trl" fresh rows take TRL's.

        Replay then uses the clipped surrogate with Clip-Cov, averaged over tokens where TRL's loss_type names no
        aggregation of ours.
        """
        kind: Any = "clip_cov" if self.policy_loss == "trl" else self.policy_loss
        on_policy = on_policy_terms(
            kind=kind,
            clip_low=self.epsilon,
            clip_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
            dual_clip=self.dual_clip,
            cov_ratio=self.cov_ratio,
            cov_lower=self.cov_lower,
            cov_upper=self.cov_upper,
            kl_cov_coef=self.kl_cov_coef,
            aggregation=AGGREGATIONS.get(self.loss_type, "token-mean"),  # pyright: ignore[reportArgumentType]
            norm_length=None,
            max_tokens=self.max_completion_length or 1,
            entropy_coef=0.0,
            kl_coef=self.beta,
            kl_kind="k3",
        )
        replayed = replay_terms(
            on_policy,
            cov_ratio=self.replay_cov_ratio,
            cov_lower=self.replay_cov_lower,
            cov_upper=self.replay_cov_upper,
        )
        return on_policy, replayed


def _check_values(config: SPEARConfig) -> None:
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)!r} is unknown; choose one of {', '.join(allowed)}")
    for name in _POSITIVE:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}={getattr(config, name)} must be above 0")
    for name in ("keep_groups", "replay_decay_weight"):
        if not 0 < getattr(config, name) <= 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be above 0 and at most 1")
    for name in ("intrinsic_per_call", "replay_warmup_steps"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 0")


def _check_trl_options(config: SPEARConfig) -> None:
    """Refuse options of TRL that SPEAR's losses would have to leave out in silence."""
    accumulation, per_round = config.gradient_accumulation_steps, config.steps_per_generation
    if per_round is None or per_round % accumulation:
        raise ConfigError(
            f"steps_per_generation={per_round} must be a multiple of gradient_accumulation_steps={accumulation}, so "
            "that an optimizer step sees one generation; set it to one"
        )
    if config.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError(
            f"multi_objective_aggregation={config.multi_objective_aggregation!r} leaves no total reward to replay; "
            "use 'sum_then_normalize'"
        )
    if config.loss_type == "dr_grpo" and config.max_completion_length is None:
        raise ConfigError(
            "max_completion_length=None leaves loss_type='dr_grpo' nothing to divide by; set it in tokens"
        )
    if config.policy_loss == "trl":
        return
    ours = f"has no meaning with policy_loss={config.policy_loss!r};"
    to_trl = "or set policy_loss='trl'"
    refused = {
        "loss_type": (config.loss_type not in AGGREGATIONS, f"use {', '.join(AGGREGATIONS)}"),
        "delta": (config.delta is not None, "use dual_clip"),
        "importance_sampling_level": (config.importance_sampling_level != "token", "use policy_loss='gspo'"),
        "top_entropy_quantile": (config.top_entropy_quantile < 1.0, "leave it 1.0"),
        "use_adaptive_entropy": (config.use_adaptive_entropy, "use a constant entropy_coef"),
        "off_policy_mask_threshold": (config.off_policy_mask_threshold is not None, "leave it None"),
        "use_bias_correction_kl": (config.beta != 0 and config.use_bias_correction_kl, "set it False"),
    }
    for name, (is_set, remedy) in refused.items():
        if is_set:
            raise ConfigError(f"{name}={getattr(config, name)!r} {ours} {remedy}, {to_trl}")
