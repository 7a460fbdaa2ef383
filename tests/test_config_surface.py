"""The option surface is frozen in config_surface.txt: adding, changing or removing an option is a visible decision."""

from __future__ import annotations

from difflib import unified_diff
from pathlib import Path

from spear_fast.config.fields import all_fields

SURFACE = Path(__file__).with_name("config_surface.txt")
REGENERATE = "PYTHONPATH=. python tests/test_config_surface.py"


def surface() -> str:
    """One line for each option: key, type, default."""
    return "".join(f"{field.key}: {field.type} = {field.default}\n" for field in all_fields() if not field.is_section)


def test_the_surface_is_the_recorded_one() -> None:
    recorded = SURFACE.read_text(encoding="utf-8")
    difference = "".join(unified_diff(recorded.splitlines(True), surface().splitlines(True), "recorded", "schema"))
    assert not difference, f"the options changed; if that is meant, run `{REGENERATE}`\n{difference}"


def test_every_option_is_described() -> None:
    bare = [field.key for field in all_fields() if not field.description.strip()]
    assert not bare, f"write a sentence with its unit under each of these in spear_fast/config/schema.py: {bare}"


if __name__ == "__main__":
    SURFACE.write_text(surface(), encoding="utf-8")
