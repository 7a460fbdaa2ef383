"""Settings of the whole test run: Triton's kernels run in its interpreter, unless TRITON_INTERPRET=0 asks for a GPU."""

from __future__ import annotations

import os

# Triton reads it when it is first imported, which any test may do, through transformers for one.
os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

# A deadline would be an assertion about time, which a busy machine breaks.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
