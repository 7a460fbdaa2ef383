"""Discounted returns-to-go of all trajectories at once."""

from spear_kernels.discounted_return.op import discounted_returns
from spear_kernels.discounted_return.reference import discounted_returns_reference

__all__ = ["discounted_returns", "discounted_returns_reference"]
