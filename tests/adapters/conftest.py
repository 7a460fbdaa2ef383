"""Settings of the tests against the real openenv-core and verifiers, which have an environment of their own.

tests/integrations/test_adapters_elsewhere.py makes that environment and runs this folder there. Where the packages are
missing, as in the main environment, nothing here is collected: what would be skipped is run by that test.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

collect_ignore_glob = []
if importlib.util.find_spec("verifiers") is None or importlib.util.find_spec("openenv") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _in_a_folder_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from tests.environments_page import write_files

    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
