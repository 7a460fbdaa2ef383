"""The environment `.venv-verl`, where verl runs: made from constraints-verl.txt and the torch of this environment.

`python tests/integrations/verl_environment.py` makes it by hand and prints the path of its interpreter.

Distributions that are right here already, torch with all it requires and those of the pinned version, are not installed
again: links to them lie in a folder at the end of the new environment's path. Nothing else of this environment is seen.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "constraints-verl.txt"
FOLDER = ROOT / ".venv-verl"


def ensure(folder: Path = FOLDER, pins: Path = PINS) -> Path:
    """The interpreter of the environment in `folder`, made if it is missing or was made of something else.

    Processes that ask at once wait for the first. Raises RuntimeError with pip's output and the remedy.
    """
    with _locked(pins):
        python, made_of = folder / "bin" / "python", folder / "made-of"
        linked, missing = plan(pins)
        recipe = _recipe(linked, missing)
        if not made_of.exists() or made_of.read_text() != recipe:
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, pins, linked, missing)
            made_of.write_text(recipe)
        return python


def plan(pins: Path) -> tuple[list[Distribution], list[str]]:
    """Distributions of this environment to link, and the pins `name==version` to install."""
    linked = {found.metadata["Name"]: found for found in _with_requirements("torch")}
    missing = []
    for line in pins.read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            found = _installed(name)
            if found is not None and found.version == version:
                linked[found.metadata["Name"]] = found
            else:
                missing.append(line)
    return list(linked.values()), missing


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _with_requirements(root: str) -> Iterator[Distribution]:
    """A distribution and all that it requires here, extras left out."""
    waiting, seen = [root], set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        found = None if name in seen else _installed(name)
        seen.add(name)
        if found is not None:
            yield found
            needs = [Requirement(text) for text in found.requires or ()]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def _recipe(linked: list[Distribution], missing: list[str]) -> str:
    """A digest of all that decides what the environment holds."""
    parts = [sys.version, *missing, *(f"{found.name} {found.version} {found.locate_file('')}" for found in linked)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _make(folder: Path, pins: Path, linked: list[Distribution], missing: list[str]) -> None:
    python = str(folder / "bin" / "python")
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], pins)
    if missing:
        pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--no-input"]
        _run([*pip, "install", "--quiet", "--no-compile", "--no-deps", "-c", str(pins), *missing], pins)
    links = folder / "linked"
    links.mkdir()
    for found in linked:
        _link(found, links)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    Path(site_packages, "linked.pth").write_text(f"{links}\n")


def _link(found: Distribution, links: Path) -> None:
    """Links to the top-level files and folders of a distribution; namespaces that several share are linked once."""
    if not found.files:
        raise RuntimeError(f"{found.name} {found.version} has no list of its files: install it again with pip")
    for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
        link = links / top
        if not link.exists():
            link.symlink_to(Path(str(found.locate_file(top))))


def _run(command: list[str], pins: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"an environment cannot be made:\n{' '.join(command)}\n{done.stdout}{done.stderr}\n"
            f"It takes the packages of {pins.name} from PyPI, once. Without a network, put their files into a folder "
            "on another machine (pip download --no-deps -d FOLDER -r "
            f"{pins.name}) and set PIP_FIND_LINKS=FOLDER and PIP_NO_INDEX=1"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(ensure())
