"""How raw logits become the logits of the softmax: soft-cap, temperature, and which columns are real tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

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
        num_rows: int,
        width: int,
        dtype: torch.dtype,
        shard: VocabShard,
    ) -> Scaling:
        """Check the public arguments for this shard's logits [num_rows, width]; vocab_size counts over all shards.

        Values inside a temperature tensor are not looked at, which would make the host wait for the device.

        Raises:
            ValueError: temperature or softcap <= 0, a temperature that is neither a number nor [num_rows], or a
                vocab_size below 1 or above the columns there are.
        """
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap={softcap} must be positive; None switches it off")
        if vocab_size is not None and (vocab_size < 1 or (shard.is_whole and vocab_size > width)):
            raise ValueError(f"vocab_size={vocab_size} must be between 1 and the {width} columns there are")
        cap, limit = 0.0 if softcap is None else float(softcap), shard.local_size(vocab_size, width)
        if not isinstance(temperature, torch.Tensor):
            if not temperature > 0:
                raise ValueError(
                    f"temperature={temperature} must be positive; greedy decoding has no log-probabilities"
                )
            return Scaling(None, float(temperature), cap, limit)
        if temperature.numel() != 1 and tuple(temperature.shape) != (num_rows,):
            raise ValueError(f"temperature has shape {tuple(temperature.shape)}, expected a scalar or ({num_rows},)")
        per_row = temperature.detach().to(dtype).reshape(-1).expand(num_rows).contiguous()
        return Scaling(per_row, 1.0, cap, limit)

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
