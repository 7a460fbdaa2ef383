"""GiGPO: the advantage of a step over the other steps taken from the same state."""

from spear_kernels.step_advantage.op import step_advantages
from spear_kernels.step_advantage.reference import step_advantages_reference

__all__ = ["step_advantages", "step_advantages_reference"]
