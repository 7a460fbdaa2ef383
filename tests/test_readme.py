"""The README's numbers are those of the result files, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.update_readme import PAGES as MEASURED
from bench.update_readme import updated

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("page", MEASURED)
def test_measured_parts_are_those_of_the_result_files(page):
    assert updated(page) == (ROOT / page).read_text(encoding="utf-8"), "run python bench/update_readme.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:spear_fast|kernels|bench|configs|docs|tests)/[\w/.-]+\.\w+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing
