"""Runs the README's test command and writes how its output ends, how long it took, and where.

python bench/run_tests.py --out bench/results/cpu/tests.txt
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common.machine import ROOT, describe_machine


def main() -> None:
    """Run the tests in the environment the README makes and keep the summary."""
    parser = argparse.ArgumentParser(description="Run the README's test command and keep the end of its output.")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu/tests.txt")
    args = parser.parse_args()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- test-command -->\s*```bash\n(.*?)```", readme, re.S)
    if found is None:
        sys.exit("README.md has no part <!-- test-command --> with a bash block")
    started = time.perf_counter()
    done = subprocess.run(["bash", "-c", found[1]], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    print(done.stdout, done.stderr, sep="\n")
    if done.returncode == 0:
        machine = describe_machine()
        cores = f"{machine['cores']} cores of {machine['processor']}"
        where = f"whole command {seconds:.0f} s, commit {machine['commit']}, {cores}"
        args.out.write_text(f"{summary(done.stdout)}{where}\n", encoding="utf-8")
    sys.exit(done.returncode)


def summary(output: str) -> str:
    """Return the total coverage and the count of tests."""
    lines = [line for line in output.splitlines() if line.startswith("TOTAL") or re.match(r"=*\s*\d+ passed", line)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
