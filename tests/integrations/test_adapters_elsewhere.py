"""OpenEnv and verifiers behind their adapters: tests/adapters, run in an environment that has both."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from spear_fast.envs.registry import make_task_set
from spear_fast.errors import MissingDependencyError
from tests.integrations.verl_environment import ROOT, ensure

AT_LEAST = 25
"""Tests that tests/adapters had when this was written: a run that collects fewer has lost some."""


def test_everything_in_tests_adapters_passes_there(request: pytest.FixtureRequest) -> None:
    """Under pytest-cov the other process writes its share of the coverage, which pytest-cov collects at the end."""
    covered = request.config.pluginmanager.hasplugin("_cov")
    runner = ["-m", "coverage", "run", "--parallel-mode", "-m", "pytest"] if covered else ["-m", "pytest"]
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir", "tests/adapters", "tests/adapters"]
    foreign = ("PYTEST_", "PYTHONPATH", "COV_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    python = ensure(ROOT / ".venv-adapters", ROOT / "constraints-adapters.txt")
    command = [str(python), *runner, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    summary = re.search(r"^(\d+) passed.*$", output, re.MULTILINE)
    assert summary is not None and int(summary[1]) >= AT_LEAST, output
    assert "skipped" not in summary[0], output


@pytest.mark.parametrize(
    ("name", "params"), [("openenv", {"url": "http://127.0.0.1:9"}), ("verifiers", {"taskset": "a:B"})]
)
def test_without_the_packages_as_here_the_error_names_the_extra(name: str, params: dict[str, str]) -> None:
    with pytest.raises(MissingDependencyError, match=rf"spear-fast\[{name}\]"):
        make_task_set(name, params, 0)
