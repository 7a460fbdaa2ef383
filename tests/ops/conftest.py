"""Every operator test runs with uninitialised memory poisoned by NaN."""

from __future__ import annotations

import pytest

from spear_kernels.testing import poisoned_memory


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield
