"""Which tokens Clip-Cov and KL-Cov act on."""

from spear_kernels.cov_select.metrics import covariance_metrics, summarize_covariance
from spear_kernels.cov_select.op import covariance, covariance_select, select_by_covariance
from spear_kernels.cov_select.reference import covariance_select_reference

__all__ = [
    "covariance",
    "covariance_metrics",
    "covariance_select",
    "covariance_select_reference",
    "select_by_covariance",
    "summarize_covariance",
]
