"""What a model does to its logits behind the head: a factor and a soft-cap, found by watching it do so."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch

FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names under which configurations hold what logits are multiplied or divided by: Granite and HyperCLOVA X differ."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE = (-60.0, -7.0, -0.5, 0.0, 0.25, 3.0, 40.0)
"""Logits that are told apart by any factor and soft-cap; exact in bfloat16."""


class LogitScale(NamedTuple):
    """logits -> c tanh(factor logits / c), or factor logits without a soft-cap c."""

    factor: float = 1.0
    softcap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The final logits."""
        scaled = logits * self.factor
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def probe_logits(batch_size: int, device: torch.device) -> torch.Tensor:
    """What to put in place of the logits so that `found` can tell the rest, float32 [B, 1, 7]."""
    return torch.tensor(PROBE, device=device).expand(batch_size, 1, -1)


def found(config: Any, returned: torch.Tensor) -> LogitScale:
    """The numbers of `config` that explain what the model `returned` for `probe_logits`; waits for the device.

    Raises:
        ValueError: none do.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {name: getattr(text, name, None) for name in (*FACTORS, *SOFTCAPS)}
    values = {name: float(value) for name, value in values.items() if isinstance(value, int | float) and value}
    factors = [1.0, *(factor for name in FACTORS if name in values for factor in (values[name], 1 / values[name]))]
    softcaps = [None, *(values[name] for name in SOFTCAPS if name in values)]
    expected = torch.tensor(PROBE, dtype=torch.float64)
    actual = returned.detach().reshape(-1)[: len(PROBE)].cpu().double()
    # A model in bfloat16 may round what it returns.
    tolerance = 8 * torch.finfo(returned.dtype).eps
    for scale in (LogitScale(*pair) for pair in product(factors, softcaps)):
        if returned.shape[-1] == len(PROBE) and torch.allclose(scale.apply(expected), actual, tolerance, tolerance):
            return scale
    raise ValueError(
        f"the model turns the logits {list(PROBE)} of its head into {returned.reshape(-1)[:16].tolist()}, which no "
        f"factor and soft-cap of its configuration ({values or 'it names none'}) explains; "
        "pass logit_scale and softcap to replace_lm_head"
    )
