"""Settings of a policy loss, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

KINDS = ("ppo", "clip_cov", "kl_cov", "gspo", "cispo", "reinforce")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_KINDS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PolicyLossConfig:
    """Which loss, its bounds, its extra terms and how tokens are averaged.

    Example, Dr.BoT's loss: PolicyLossConfig("clip_cov", clip_high=0.28, dual_clip=10.0,
    aggregation="seq-mean-token-sum-norm", norm_length=4096).

    Raises:
        ValueError: unknown name or a number out of range; the message names the field and what it accepts.
    """

    kind: str = "ppo"
    """One of KINDS."""
    clip_low: float = 0.2
    """eps_low: the ratio is clipped below at 1 - eps_low."""
    clip_high: float = 0.2
    """eps_high: the ratio is clipped above at 1 + eps_high."""
    dual_clip: float | None = None
    """Bound c > 1: for negative advantages the loss stays below -A * c; None switches it off."""
    cov_ratio: float = 0.02
    """Share of action tokens that Clip-Cov or KL-Cov chooses."""
    cov_lower: float = 1.0
    """Clip-Cov: candidates have a covariance above this."""
    cov_upper: float = 40.0
    """Clip-Cov: candidates have a covariance below this."""
    kl_cov_coef: float = 1.0
    """KL-Cov: weight of |logp - old_logp| on the chosen tokens."""
    aggregation: str = "token-mean"
    """One of AGGREGATIONS."""
    norm_length: float | None = None
    """Constant that "seq-mean-token-sum-norm" divides token sums by, in tokens."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, which is subtracted from the loss."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy."""
    kl_kind: str = "k3"
    """Estimator of that KL, one of KL_KINDS."""
    tis_cap: float | None = None
    """Bound of the surrogate's importance weight pi_old / pi_sampler, which needs sampler_logp; None: no weight."""

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("aggregation", AGGREGATIONS), ("kl_kind", KL_KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        for name in ("clip_low", "clip_high", "kl_cov_coef", "kl_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be > 1, or None to switch it off")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ValueError(f"tis_cap={self.tis_cap} must be > 0, or None to switch it off")
        if not 0 <= self.cov_ratio <= 1:
            raise ValueError(f"cov_ratio={self.cov_ratio} must be between 0 and 1")
        if not self.cov_lower < self.cov_upper:
            raise ValueError(f"cov_lower={self.cov_lower} must be below cov_upper={self.cov_upper}")
        if self.norm_length is not None and not self.norm_length > 0:
            raise ValueError(f"norm_length={self.norm_length} must be > 0 tokens")
        if self.aggregation == "seq-mean-token-sum-norm" and self.norm_length is None:
            raise ValueError("aggregation='seq-mean-token-sum-norm' needs norm_length, in tokens")

    @property
    def uses_covariance(self) -> bool:
        """Whether the loss acts on tokens chosen by covariance."""
        return self.kind in ("clip_cov", "kl_cov")

    @property
    def per_sequence(self) -> bool:
        """Whether the loss needs to know which tokens form a sequence."""
        return self.kind == "gspo" or self.aggregation != "token-mean"

    def numbers(self) -> list[float]:
        """The fields NUMBERS in order, for operator schemas that know lists of numbers only; None becomes -1."""
        values = [getattr(self, name) for name in NUMBERS]
        return [_NONE if value is None else float(value) for value in values]


NUMBERS = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "cov_ratio",
    "cov_lower",
    "cov_upper",
    "kl_cov_coef",
    "norm_length",
    "entropy_coef",
    "kl_coef",
    "tis_cap",
)
"""Numeric fields of PolicyLossConfig."""
_OPTIONAL = ("dual_clip", "norm_length", "tis_cap")
_NONE = -1.0  # No optional number may be negative.


@lru_cache(maxsize=256)
def config_of(kind: str, aggregation: str, kl_kind: str, numbers: tuple[float, ...]) -> PolicyLossConfig:
    """The configuration with these names and `PolicyLossConfig.numbers`."""
    fields: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
    optional = {name: None if fields[name] == _NONE else fields[name] for name in _OPTIONAL}
    return PolicyLossConfig(kind, aggregation=aggregation, kl_kind=kl_kind, **{**fields, **optional})
