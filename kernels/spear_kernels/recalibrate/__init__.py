"""SPEAR: advantages of stored samples at the time they are replayed."""

from spear_kernels.recalibrate.op import Recalibrated, median, recalibrate, recalibrated_advantages, scaled_advantages
from spear_kernels.recalibrate.reference import recalibrated_advantages_reference

__all__ = [
    "Recalibrated",
    "median",
    "recalibrate",
    "recalibrated_advantages",
    "recalibrated_advantages_reference",
    "scaled_advantages",
]
