"""Every operator test runs with uninitialised memory poisoned by NaN, and Triton kernels in the interpreter."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported.

import pytest

from spear_kernels.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield
