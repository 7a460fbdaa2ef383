"""Spans of packed rows, and values of spans put on their rows."""

from spear_kernels.spans.op import span_index, spread
from spear_kernels.spans.reference import span_index_reference, spread_reference

__all__ = ["span_index", "span_index_reference", "spread", "spread_reference"]
