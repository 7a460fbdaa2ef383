"""Repetition: how often the most frequent run of tokens occurs in each sequence."""

from spear_kernels.repetition.op import max_ngram_counts
from spear_kernels.repetition.reference import max_ngram_counts_reference

__all__ = ["max_ngram_counts", "max_ngram_counts_reference"]
