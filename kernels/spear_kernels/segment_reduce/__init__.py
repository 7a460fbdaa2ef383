"""Sums and ranks per sequence on packed rows."""

from spear_kernels.segment_reduce.op import segment_index, segment_rank, segment_sum
from spear_kernels.segment_reduce.reference import segment_rank_reference, segment_sum_reference

__all__ = ["segment_index", "segment_rank", "segment_rank_reference", "segment_sum", "segment_sum_reference"]
