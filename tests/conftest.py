"""Settings of the whole test run."""

from __future__ import annotations

from hypothesis import settings

# A deadline would be an assertion about time, which a busy machine breaks.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
