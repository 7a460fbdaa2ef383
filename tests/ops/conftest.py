"""Every operator test runs with uninitialised memory poisoned by NaN, and with a cheaper interpreter of Triton."""

from __future__ import annotations

import pytest

from spear_kernels.testing import poisoned_memory
from tests.triton_interpreter import patch_once_per_launch

patch_once_per_launch()


@pytest.fixture(autouse=True)
def _poison():
    with poisoned_memory():
        yield
