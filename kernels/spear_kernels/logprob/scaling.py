"""How raw logits become the logits of the softmax: soft-cap, temperature, and which columns are real tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spear_kernels.checks import host_may_wait, to_device
from spear_kernels.vocab_parallel import VocabShard

Numbers = tuple[torch.Tensor | None, float, float, int]


@dataclass(frozen=True)
class Scaling:
    """z = c tanh(raw / c) / T on the first `vocab_size` columns; further columns are padding of probability 0."""

    temperature: torch.Tensor | None  # [N] in the computing type; None: `temperature_value` for every row
    temperature_value: float
    softcap: float
    """Bound c of Gemma 2's soft-cap; 0 switches it off."""
    vocab_size: int

    @staticmethod
    def of(
        temperature: float | torch.Tensor,
        softcap: float | None,
        vocab_size: int | None,
        rows: torch.Tensor,
        width: int,
        dtype: torch.dtype,
        shard: VocabShard,
    ) -> Scaling:
        """Check the public arguments for this shard's logits [N, width] of `rows` [N, ...]; vocab_size counts globally.

        Values inside a temperature tensor are not looked at here.

        Raises:
            ValueError: temperature or softcap <= 0 or infinite, a temperature that is neither a number nor [N] or wants
                a gradient, or a vocab_size below 1 or above the columns there are.
        """
        num_rows = rows.shape[0]
        if softcap is not None and not 0 < softcap < float("inf"):
            raise ValueError(f"softcap={softcap} must be a positive finite number; None switches it off")
        columns = shard.total(None, width)
        if columns == 0:
            raise ValueError("there are no columns; pass logits, or a weight, of at least one token")
        if vocab_size is not None and (
            isinstance(vocab_size, float) or vocab_size < 1 or (columns is not None and vocab_size > columns)
        ):
            known = "" if columns is None else f" of at most {columns}, the columns there are"
            raise ValueError(f"vocab_size={vocab_size} must be a positive whole number{known}")
        cap, limit = 0.0 if softcap is None else float(softcap), shard.local_size(vocab_size, width)
        if not isinstance(temperature, torch.Tensor):
            if not temperature > 0:
                raise ValueError(
                    f"temperature={temperature} must be positive; greedy decoding has no log-probabilities"
                )
            return Scaling(None, float(temperature), cap, limit)
        if temperature.numel() != 1 and tuple(temperature.shape) != (num_rows,):
            raise ValueError(f"temperature has shape {tuple(temperature.shape)}, expected a scalar or ({num_rows},)")
        if temperature.requires_grad:
            raise ValueError("temperature requires a gradient, but none is computed; pass temperature.detach()")
        per_row = to_device(temperature, rows.device).to(dtype).reshape(-1).expand(num_rows).contiguous()
        return Scaling(per_row, 1.0, cap, limit)

    def check(self, rows: torch.Tensor | None) -> None:
        """Raise ValueError if the temperature of one of `rows` (None: all) is not positive; only looks on the CPU."""
        if self.temperature is None or not host_may_wait(self.temperature):
            return
        values = self.temperature if rows is None else self.temperature[rows]
        if not bool((values > 0).all()):
            raise ValueError(f"temperature holds {values.min().item()}, but must be positive in rows that enter")

    @property
    def numbers(self) -> Numbers:
        """The fields in order, as operators and launchers take them."""
        return self.temperature, self.temperature_value, self.softcap, self.vocab_size

    def rows(self, rows: slice | torch.Tensor) -> Scaling:
        """The scaling of some rows."""
        return self if self.temperature is None else replace(self, temperature=self.temperature[rows])

    def where(self, mask: torch.Tensor) -> Scaling:
        """The scaling with temperature 1 where mask [N] is False."""
        if self.temperature is None:
            return self
        return replace(self, temperature=torch.where(mask, self.temperature, 1))

    def apply_(self, z: torch.Tensor) -> torch.Tensor:
        """Scale raw logits z [n, vocab_size] in place."""
        if self.softcap:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature is not None:
            return z.div_(self.temperature[:, None])
        return z if self.temperature_value == 1.0 else z.div_(self.temperature_value)

    def slope(self, z: torch.Tensor) -> torch.Tensor | None:
        """dz/draw without its factor 1/T, 1 - tanh(raw / c)^2 [n, vocab_size], from scaled z; None where it is 1."""
        if not self.softcap:
            return None
        temperature = self.temperature_value if self.temperature is None else self.temperature[:, None]
        return (z * (temperature / self.softcap)).square_().neg_().add_(1.0)

    def per_unit(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Coefficients [n] of scaled logits divided by T."""
        return coefficients / (self.temperature_value if self.temperature is None else self.temperature)
