"""Which implementation of an operator runs: resolved in one place, never by silent fallback."""

from __future__ import annotations

BACKENDS = ("auto", "torch", "triton")


def resolve_backend(backend: str) -> str:
    """Return the backend that "auto", "torch" or "triton" means here.

    Raises:
        ValueError: unknown name, or "triton", which this version does not provide.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        raise ValueError("backend='triton' is not available in this version; use backend='torch' or 'auto'")
    return "torch"
