"""verl's own functions and models on our losses and head: tests/verl, run in the environment that verl needs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from spear_fast.errors import MissingDependencyError
from tests.integrations.verl_environment import ROOT, ensure, plan

AT_LEAST = 127
"""Tests that tests/verl had when this was written: a run that collects fewer has lost some."""


def test_everything_in_tests_verl_passes_there(request: pytest.FixtureRequest) -> None:
    """Under pytest-cov the other process writes its share of the coverage, which pytest-cov collects at the end."""
    covered = request.config.pluginmanager.hasplugin("_cov")
    runner = ["-m", "coverage", "run", "--parallel-mode", "-m", "pytest"] if covered else ["-m", "pytest"]
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir", "tests/verl", "tests/verl"]
    foreign = ("PYTEST_", "PYTHONPATH", "COV_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment["HF_HUB_OFFLINE"] = "1"
    command = [str(ensure()), *runner, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    summary = re.search(r"^(\d+) passed.*$", output, re.MULTILINE)
    assert summary is not None and int(summary[1]) >= AT_LEAST, output
    assert "skipped" not in summary[0], output


def test_without_verl_as_here_the_import_names_the_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r"spear-fast\[verl\]"):
        importlib.import_module("spear_fast.integrations.verl")


def test_pins_that_are_right_here_are_linked_and_others_installed(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text(f"# comment\npytest=={pytest.__version__}\nnumpy==0.0.1\nno-such-distribution==1.0\n")
    linked, missing = plan(pins)
    names = {found.name for found in linked}
    assert {"torch", "sympy", "pytest"} <= names and not names & {"numpy", "transformers"}
    assert missing == ["numpy==0.0.1", "no-such-distribution==1.0"]


def test_the_environment_is_made_once_and_again_when_its_pins_change(tmp_path: Path) -> None:
    pins, folder = tmp_path / "pins.txt", tmp_path / "environment"

    def sees(name: str) -> bool:
        code = f"import importlib.util; print(importlib.util.find_spec({name!r}) is not None)"
        return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout == "True\n"

    pins.write_text("")
    python = ensure(folder, pins)
    assert sees("torch") and not sees("pytest")
    stamp = folder / "stamp"
    stamp.touch()
    assert ensure(folder, pins) == python and stamp.exists()
    pins.write_text(f"pytest=={pytest.__version__}\n")
    ensure(folder, pins)
    assert sees("pytest") and not stamp.exists()


def test_what_cannot_be_installed_ends_in_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    pins, folder = tmp_path / "pins.txt", tmp_path / "environment"
    pins.write_text("numpy==0.0.1\n")
    with pytest.raises(RuntimeError, match=r"numpy==0\.0\.1[\s\S]*PIP_FIND_LINKS=FOLDER"):
        ensure(folder, pins)
    assert not (folder / "made-of").exists()
