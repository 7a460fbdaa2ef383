"""Every test counts only the threads that it left behind itself: those of a test before it may still hang."""

from __future__ import annotations

import pytest

from spear_fast.envs import threads


@pytest.fixture(autouse=True)
def own_threads_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_left", threads._Left())
