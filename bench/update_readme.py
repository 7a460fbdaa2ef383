"""Writes the measured parts of the project's pages from the files under bench/results/.

python bench/update_readme.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench import page_parts, sandbox  # noqa: E402

RESULTS = ROOT / "bench/results"
PAGES = ("README.md", "kernels/README.md", "docs/performance.md", "docs/sandbox.md")
STUDIES = ("babyai", "calculator", "treasure")
"""Task families whose studies the README shows."""
NOT_GPUS = ("cpu", "compile")
"""Folders of results that are not named after a GPU."""


def main() -> None:
    """Rewrite the pages in place."""
    for page in PAGES:
        (ROOT / page).write_text(updated(page), encoding="utf-8")


def updated(page: str) -> str:
    """Return one of PAGES with every marked part replaced by what the result files say."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, part in _parts(page).items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = marked.subn(lambda found, part=part: found[1] + part() + found[2], text)
        if count != 1:
            sys.exit(f"{page} needs exactly one part <!-- {name} --> ... <!-- end -->, it has {count}")
    return text


def _parts(page: str) -> dict[str, Callable[[], str]]:
    names = (*page_parts.DETAILS, "kernels", "quickstart", "quickstart_vllm", "sandbox")
    cpu = {name: partial(_json, f"cpu/{name}.json") for name in names}
    if page == "kernels/README.md":
        return {
            "kernels-cpu": lambda: page_parts.kernel_times(cpu["kernels"]()),
            "kernel-resources": lambda: page_parts.kernel_resources(_json("compile/kernels.json")),
        }
    if page == "docs/sandbox.md":
        table = page_parts.with_provenance("sandbox", sandbox.markdown)
        return {"sandbox-cpu": lambda: table(cpu["sandbox"]())}
    if page == "docs/performance.md":
        details = page_parts.DETAILS.items()
        parts = {f"{name}-cpu": lambda name=name, table=table: table(cpu[name]()) for name, table in details}
        return {**parts, "gpu": lambda: page_parts.gpu_part(_gpu_folders())}
    return {
        "quickstart-results": lambda: page_parts.quickstart_table(cpu["quickstart"](), cpu["quickstart_vllm"]()),
        "quickstart-output": lambda: page_parts.fenced(_text("cpu/quickstart.txt")),
        "study": lambda: page_parts.study(*(_json(f"cpu/study_{family}.json") for family in STUDIES)),
        "gpu-state": lambda: page_parts.gpu_state(_gpu_folders()),
        "step-summary": lambda: page_parts.step_summary(cpu["step"](), cpu["trainer_only"]()),
        "kernels-summary": lambda: page_parts.kernel_summary(cpu["kernels"]()),
        "test-output": lambda: page_parts.fenced(_text("cpu/tests.txt")),
    }


def _gpu_folders() -> list[Path]:
    return sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name not in NOT_GPUS)


def _json(name: str) -> dict[str, Any]:
    return json.loads(_text(name))


def _text(name: str) -> str:
    return (RESULTS / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
