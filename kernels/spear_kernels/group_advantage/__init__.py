"""GRPO: the advantage of a sample over the others of its prompt."""

from spear_kernels.group_advantage.op import group_advantages
from spear_kernels.group_advantage.reference import group_advantages_reference

__all__ = ["group_advantages", "group_advantages_reference"]
