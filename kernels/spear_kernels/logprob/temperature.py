"""A sampling temperature that is one number or one value per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Temperature:
    """Checked temperature; `value` is a float, or [N] in the computing type."""

    value: float | torch.Tensor

    @staticmethod
    def of(value: float | torch.Tensor, num_rows: int, dtype: torch.dtype) -> Temperature:
        """Check a number > 0 or a tensor of shape [] or [num_rows]; raise ValueError otherwise.

        Values inside a tensor are not looked at, which would make the host wait for the device.
        """
        if not isinstance(value, torch.Tensor):
            if not value > 0:
                raise ValueError(f"temperature={value} must be positive; greedy decoding has no log-probabilities")
            return Temperature(float(value))
        if value.numel() != 1 and tuple(value.shape) != (num_rows,):
            raise ValueError(f"temperature has shape {tuple(value.shape)}, expected a scalar or ({num_rows},)")
        return Temperature(value.detach().to(dtype).reshape(-1).expand(num_rows))

    def rows(self, rows: slice | torch.Tensor) -> Temperature:
        """The temperature of some rows."""
        return Temperature(self.value[rows]) if isinstance(self.value, torch.Tensor) else self

    def where(self, mask: torch.Tensor) -> Temperature:
        """The temperature with 1 where mask [N] is False."""
        return Temperature(torch.where(mask, self.value, 1)) if isinstance(self.value, torch.Tensor) else self

    def scale_(self, z: torch.Tensor) -> torch.Tensor:
        """Divide logits z [n, V] in place."""
        if isinstance(self.value, torch.Tensor):
            return z.div_(self.value[:, None])
        return z if self.value == 1.0 else z.div_(self.value)

    def scale(self, values: torch.Tensor) -> torch.Tensor:
        """Divide a vector [n]."""
        return values / self.value
