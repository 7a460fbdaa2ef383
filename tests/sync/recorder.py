"""An engine that keeps the weights it is given and can go wrong in the ways that a sync must notice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spear_fast.errors import EngineError
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.weights_digest import digest


class Recorder(ScriptedEngine):
    """Holds weights in `dtype`.

    `fails_after` makes `load_weights` raise after so many parameters, `skips` leaves values of a name as they were,
    `untold` leaves names out of the digests.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, fails_after: int | None = None) -> None:
        super().__init__(lambda _: [])
        self.dtype = dtype
        self.fails_after = fails_after
        self.skips: set[str] = set()
        self.untold: set[str] = set()
        self.values: dict[str, Tensor] = {}

    def load_weights(self, named: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy; see the class for what goes wrong."""
        for number, (name, tensor) in enumerate(named):
            if number == self.fails_after:
                raise EngineError("broken engine")
            if name not in self.skips:
                self.values[name] = tensor.to(self.dtype, copy=True)
        self.weights_version = version

    def pause(self) -> None:
        """Nothing runs."""

    def resume(self) -> None:
        """Nothing was paused."""

    def weights_digest(self) -> dict[str, int]:
        """Digest of what is held."""
        return {name: digest(tensor) for name, tensor in self.values.items() if name not in self.untold}
