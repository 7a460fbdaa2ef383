"""The code of docs/environments.md runs as it stands: each task set is played and won, and lost where it should be."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spear_fast.config.load import load_config
from spear_fast.envs.base import Demonstrator
from spear_fast.envs.registry import BUILT_IN
from spear_fast.rollout.demos import demonstrate
from tests.environments_page import BLOCKS, CONFIGS, ELSEWHERE, PAGE, ROOT, call, play, task_set, write_files

Messages = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _in_a_folder_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def open_safe(messages: Messages) -> str:
    if messages[-1]["role"] == "tool":
        return "Done."
    return call("try_code", code=re.findall(r"says (\d+)", messages[-1]["content"])[0][::-1])


def count_word(messages: Messages) -> str:
    if messages[-1]["role"] == "tool":
        return f"It has {messages[-1]['content']} letters."
    return call("count_letters", word=re.findall(r"'(\w+)'", messages[-1]["content"])[0])


def look_up(messages: Messages) -> str:
    if messages[-1]["role"] == "tool":
        return f"<answer>{messages[-1]['content']}</answer>"
    return call("look_up", name=messages[-1]["content"].split()[-1].rstrip("?"))


PLAYERS = {"safe": open_safe, "words": count_word, "phones": look_up}


@pytest.mark.parametrize("name", PLAYERS)
def test_tools_of_the_page_solve_its_tasks(name: str) -> None:
    tasks = task_set(name)
    for split in ("train", "eval"):
        played = play(tasks, PLAYERS[name], split)
        assert (played.error, played.success, played.num_valid_tool_calls) == (None, True, 1)
        assert not play(tasks, lambda _: "I do not know.", split).success


@pytest.mark.parametrize("name", ["guess", "corridor"])
def test_experts_of_the_page_solve_its_tasks(name: str) -> None:
    tasks = task_set(name)
    assert isinstance(tasks.make(), Demonstrator)
    assert len(demonstrate(tasks, 8, max_turns=10, seed=0)) == 8
    lost = play(tasks, lambda _: "<action>guess 100</action>")
    assert (lost.error, lost.success, lost.turns[0].action_valid) == (None, False, False)


def test_every_block_is_a_file_or_a_run_and_every_run_is_played() -> None:
    assert all(mark for mark, *_ in BLOCKS)
    assert set(CONFIGS) == {*PLAYERS, "guess", "corridor", *ELSEWHERE}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_the_page_are_valid(name: str, tmp_path: Path) -> None:
    text = next(text for mark, block, _, text in BLOCKS if (mark, block) == ("run", name))
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert (
        load_config(tmp_path / "run.yaml", base={"name": "run", "steps": 1, "model": {"path": "a/model"}}).task.name
        == CONFIGS[name]["task"]["name"]
    )


def test_the_table_names_every_built_in_task_set() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert named >= set(BUILT_IN)


def test_versions_are_the_pinned_ones() -> None:
    sentence = re.search(r"Tested with (.*?); (.*?)\.\n", PAGE)
    assert sentence
    for text, pins in zip(sentence.groups(), ("constraints-cpu.txt", "constraints-adapters.txt"), strict=True):
        pinned = (ROOT / pins).read_text(encoding="utf-8").splitlines()
        named = re.findall(r"([\w-]+) (\d[\d.]*\d)", text)
        assert named and not [f"{name}=={version}" for name, version in named if f"{name}=={version}" not in pinned]
