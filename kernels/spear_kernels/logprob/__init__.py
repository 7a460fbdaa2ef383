"""Log-probability and entropy from logits."""

from spear_kernels.logprob.op import logprob
from spear_kernels.logprob.reference import logprob_reference

__all__ = ["logprob", "logprob_reference"]
