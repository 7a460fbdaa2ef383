"""Policy losses with verl's signature, settings and metrics, computed by `spear_kernels.policy_loss`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from spear_fast.errors import ConfigError, MissingDependencyError
from spear_kernels import PolicyLossConfig, covariance_select, policy_loss

PolicyLoss = Callable[..., tuple[torch.Tensor, dict[str, float]]]

_CLIPPING = {"actor/pg_clipfrac": "clip_fraction", "actor/ppo_kl": "approx_kl_k1"}
_DUAL = {"actor/pg_clipfrac_lower": "dual_clip_fraction"}
_CLIP_COV = {"actor/pg_clipfrac": "selected_fraction", "actor/ppo_kl": "approx_kl_k1"}


@dataclass(frozen=True)
class VerlLoss:
    """How one of verl's losses is put to `policy_loss`."""

    kind: str
    """`PolicyLossConfig.kind`."""
    metrics: Mapping[str, str]
    """verl's names of metrics and ours."""
    has_dual_clip: bool = False
    """Whether clip_ratio_c applies."""
    default_aggregation: str = "token-mean"


LOSSES = {
    "spear_vanilla": VerlLoss("ppo", _CLIPPING | _DUAL, has_dual_clip=True),
    "spear_clip_cov": VerlLoss("clip_cov", _CLIP_COV),
    "spear_clip_cov_dual": VerlLoss("clip_cov", _CLIP_COV | _DUAL, has_dual_clip=True),
    "spear_kl_cov": VerlLoss("kl_cov", {"actor/ppo_kl": "logp_gap_mean_abs"}),
    "spear_gspo": VerlLoss("gspo", _CLIPPING | _DUAL, default_aggregation="seq-mean-token-mean"),
    "spear_cispo": VerlLoss("cispo", _CLIPPING | _DUAL),
}
"""Names for `actor.policy_loss.loss_mode`. Each is verl's loss of that name, except "spear_clip_cov_dual": Clip-Cov
with the dual clip that verl's clip_cov lacks, the loss of Dr.BoT."""

_BATCH_INFO = frozenset(("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor"))
_CONFIG_NAMES = (
    "clip_low is clip_ratio_low, clip_high is clip_ratio_high, dual_clip is clip_ratio_c, cov_* are "
    "policy_loss.clip_cov_* or kl_cov_ratio, kl_cov_coef is ppo_kl_coef, norm_length is loss_scale_factor"
)


def register() -> tuple[str, ...]:
    """Add LOSSES to verl's registry, again if need be, and return their names.

    Raises:
        MissingDependencyError: verl is not installed.
    """
    try:
        from verl.trainer.ppo.core_algos import register_policy_loss  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "verl":
            raise
        raise MissingDependencyError("verl", "verl", "spear_fast.integrations.verl") from error
    for name in LOSSES:
        register_policy_loss(name)(verl_policy_loss(name))
    return tuple(LOSSES)


def verl_policy_loss(name: str) -> PolicyLoss:
    """The loss LOSSES[name] as a function that verl can call; its parameters are those of verl's own losses.

    old_log_prob, log_prob, advantages [B, T] float; response_mask [B, T], where all that is not 0 is an action token;
    loss_agg_mode one of verl's; config verl's actor configuration, read as verl's loss reads it: clip_ratio,
    clip_ratio_low, clip_ratio_high, clip_ratio_c (None: no dual clip), policy_loss.clip_cov_ratio, clip_cov_lb,
    clip_cov_ub, kl_cov_ratio, ppo_kl_coef, and global_batch_info. rollout_is_weights, broadcast to [B, T], multiply
    token losses and no denominator. Returns the loss, 0-d, and metrics as numbers, read from the device at once.

    Where it differs from verl 0.9.1, each by the formulas of this project:
    - log-ratios are clamped to +-20 nats in every kind; verl's clip_cov and kl_cov do not clamp. `actor/ppo_kl` is the
      mean before the clamp; verl's vanilla and cispo report it after.
    - where the mean log-ratio of a sequence is above 10, gspo keeps the gradient of its negative advantages, which
      verl's clamp ends.
    - the covariance is computed in float64, and KL-Cov breaks ties by position. Clip-Cov draws its tokens on the device
      from a seed that it takes from torch's CPU generator; verl takes a permutation from there. The numbers of tokens
      and of candidates are the same.
    - a batch without action tokens gives 0 where verl gives 0 / 0, and values in masked places never count.
    - verl adds 1e-8 to lengths that it divides by.

    The choice of Clip-Cov and KL-Cov is made among the micro-batch of the call, as in verl: its losses see no more.

    Raises:
        ConfigError: a setting is missing, unknown or out of range.
    """
    spec = LOSSES[name]

    def loss_function(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = spec.default_aggregation,
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        if config is None or log_prob.ndim != 2:
            given = f"config={type(config).__name__}, log_prob of shape {tuple(log_prob.shape)}"
            raise ConfigError(f"{given}: {name} needs verl's actor configuration and log-probs [B, T]")
        batch_info = _batch_info(config)
        cfg = _loss_config(name, spec, config, _aggregation(loss_agg_mode, batch_info, log_prob.shape[-1]))
        logp, old_logp, row_advantages, mask = (
            _flat(tensor, log_prob) for tensor in (log_prob, old_log_prob, advantages, response_mask.bool())
        )
        weight = None if rollout_is_weights is None else _flat(rollout_is_weights, log_prob)
        seq_ids, positions = _places(log_prob)
        tokens = logp, old_logp, row_advantages, mask, cfg, seq_ids
        selected = covariance_select(*tokens, _seed(cfg), positions=positions) if cfg.uses_covariance else None
        result = policy_loss(*tokens, row_weight=weight, selected=selected, **_denominator(loss_agg_mode, batch_info))
        values = torch.stack([result.metrics[ours] for ours in spec.metrics.values()]).tolist()
        return result.loss * batch_info.get("dp_size", 1), dict(zip(spec.metrics, values, strict=True))

    loss_function.__name__ = loss_function.__qualname__ = name
    return loss_function


def _flat(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`tensor` broadcast to [B, T], as [B * T]; masked places stay: to leave them out, the host would have to wait."""
    return tensor.expand(like.shape).reshape(-1)


def _places(log_prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each token, int64 [B * T] each."""
    num_seqs, length = log_prob.shape
    rows = torch.arange(num_seqs, device=log_prob.device).repeat_interleave(length)
    return rows, torch.arange(length, device=log_prob.device).repeat(num_seqs)


def _seed(cfg: PolicyLossConfig) -> int:
    """A new seed for each draw; KL-Cov draws nothing and leaves the generator alone."""
    return int(torch.randint(2**62, (), device="cpu")) if cfg.kind == "clip_cov" else 0


def _batch_info(config: Any) -> dict[str, Any]:
    """What verl tells of the mini-batch over all ranks, without what it left None."""
    info = dict(getattr(config, "global_batch_info", None) or {})
    if unknown := info.keys() - _BATCH_INFO:
        raise ConfigError(
            f"global_batch_info has {', '.join(sorted(unknown))}, which this version does not know; it was written for "
            "verl 0.9: use a loss of verl's own, or that verl"
        )
    return {key: value for key, value in info.items() if value is not None}


def _aggregation(mode: str, batch_info: Mapping[str, Any], length: int) -> dict[str, Any]:
    """`PolicyLossConfig` fields for verl's loss_agg_mode."""
    needed = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    if batch_info.get("dp_size", 1) > 1 and mode != "token-sum" and needed not in batch_info:
        raise ConfigError(f"global_batch_info.{needed} is needed by loss_agg_mode={mode!r} on more than one rank")
    if mode == "seq-mean-token-sum-norm":
        return {"aggregation": mode, "norm_length": batch_info.get("loss_scale_factor", length)}
    return {"aggregation": "token-mean" if mode == "token-sum" else mode}


def _denominator(mode: str, batch_info: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `policy_loss`: what the loss is divided by; None counts the rows of the call."""
    if mode == "token-sum":
        return {"num_tokens": 1}
    if mode == "token-mean":
        return {"num_tokens": batch_info.get("batch_num_tokens")}
    return {"num_seqs": batch_info.get("global_batch_size")}


def _loss_config(name: str, spec: VerlLoss, config: Any, aggregation: Mapping[str, Any]) -> PolicyLossConfig:
    """The checked settings of a loss, with verl's defaults for those that are None."""
    low, high = (_or(getattr(config, key), config.clip_ratio) for key in ("clip_ratio_low", "clip_ratio_high"))
    fields: dict[str, Any] = {"clip_low": low, "clip_high": high, **aggregation}
    if spec.has_dual_clip:
        fields["dual_clip"] = config.get("clip_ratio_c", 3.0)
    if spec.kind in ("clip_cov", "kl_cov"):
        fields |= _covariance_fields(name, spec.kind, config.policy_loss)
    try:
        return PolicyLossConfig(spec.kind, **fields)
    except ValueError as error:
        raise ConfigError(f"loss_mode {name}: {error} ({_CONFIG_NAMES})") from error


def _covariance_fields(name: str, kind: str, settings: Any) -> dict[str, float]:
    ratio = _or(getattr(settings, f"{kind}_ratio"), 0.0002)
    if not ratio > 0:
        raise ConfigError(f"policy_loss.{kind}_ratio={ratio} must be > 0 for loss_mode {name}")
    if kind == "kl_cov":
        return {"cov_ratio": ratio, "kl_cov_coef": _or(settings.ppo_kl_coef, 1.0)}
    return {
        "cov_ratio": ratio,
        "cov_lower": _or(settings.clip_cov_lb, 1.0),
        "cov_upper": _or(settings.clip_cov_ub, 5.0),
    }


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
