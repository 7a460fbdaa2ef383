"""Why a row of a result file has no times: the status and reason that an exception stands for."""

from __future__ import annotations

from spear_fast.errors import MissingDependencyError

_REASON_CHARS = 500


class NeedsCuda(Exception):
    """A row was not tried, since it cannot run on the CPU; the text says what stands in the way."""


def failed_row(error: BaseException) -> dict[str, str]:
    """`status` ("not installed", "needs CUDA" or "failed") and `reason` of a row that ended in `error`."""
    if isinstance(error, ImportError | MissingDependencyError):
        return {"status": "not installed", "reason": str(error) or type(error).__name__}
    if isinstance(error, NeedsCuda):
        return {"status": "needs CUDA", "reason": str(error)}
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}".strip()[:_REASON_CHARS]}
