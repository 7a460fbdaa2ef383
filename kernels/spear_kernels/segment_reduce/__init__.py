"""Sums, ranks, means and spreads per sequence on packed rows."""

from spear_kernels.segment_reduce.op import segment_index, segment_rank, segment_sum
from spear_kernels.segment_reduce.reference import (
    segment_rank_reference,
    segment_stats_reference,
    segment_sum_reference,
)
from spear_kernels.segment_reduce.stats import STD_EPSILON, SegmentStats, segment_stats

__all__ = [
    "STD_EPSILON",
    "SegmentStats",
    "segment_index",
    "segment_rank",
    "segment_rank_reference",
    "segment_stats",
    "segment_stats_reference",
    "segment_sum",
    "segment_sum_reference",
]
