"""Log-probability and entropy from hidden states and the head, without holding the logits."""

from spear_kernels.linear_logprob.head import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES
from spear_kernels.linear_logprob.op import linear_logprob
from spear_kernels.linear_logprob.reference import linear_logprob_reference

__all__ = ["CPU_CHUNK_BYTES", "DEVICE_CHUNK_BYTES", "linear_logprob", "linear_logprob_reference"]
