"""`spear-fast tasks` as a user meets it: the list, one task set, files of demonstrations and games."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from spear_fast.cli import main
from spear_fast.envs import listing
from spear_fast.envs.registry import available
from tests.toys import GuessEnv, GuessTasks

HERE = "tests.test_cli_tasks"
ROOT = Path(__file__).parents[1]


class Wrong(GuessEnv):
    def expert(self) -> str:
        return self._target if self._target != "3" else "x"


class WrongTasks(GuessTasks):
    """Guesses of an expert that fails at the fourth."""

    def make(self) -> GuessEnv:
        return Wrong()


class Written(GuessTasks):
    """Guesses with games."""

    class Params(BaseModel):
        engine: str = "fast"

    @classmethod
    def write_games(cls, params: Any, *, count: int, seed: int, out: Path) -> list[str]:
        return [f"engine {params.engine}, {count} games, seed {seed}, {out}"]


class MuteTasks(GuessTasks):
    """Guesses without an expert."""

    def make(self) -> Any:
        class Mute:
            tools = ()
            reset, step, close = GuessEnv.reset, GuessEnv.step, GuessEnv.close

        return Mute()


def test_the_list_has_every_built_in_task_set_and_loads_none_of_them():
    code = (
        "import sys; from spear_fast.cli import main; main(['tasks']); from spear_fast.envs.registry import BUILT_IN; "
        "heavy = {'torch', *(location.partition(':')[0] for location in BUILT_IN.values())}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in available():
        summary = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert len(summary.removeprefix(name).strip()) > 10


def test_a_task_set_that_is_not_installed_is_listed_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(listing.USES, "treasure", ("babyai", ("no_such_package",)))
    listing.listings.cache_clear()
    try:
        assert main(["tasks"]) == 0
        assert "not installed: no_such_package; pip install 'spear-fast[babyai]'" in capsys.readouterr().out
    finally:
        listing.listings.cache_clear()


def test_extras_of_the_table_exist(monkeypatch):
    import runpy

    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    extras = runpy.run_path(str(ROOT / "setup.py"))["EXTRAS"]
    assert {extra for extra, _ in listing.USES.values()} <= extras.keys()


def test_a_task_set_is_shown_with_parameters_sizes_and_opening(capsys):
    assert main(["tasks", "treasure", "num_rooms=5", "num_demo=7"]) == 0
    shown = capsys.readouterr().out
    assert "num_rooms (integer >= 3 and <= 16, default 4)\n      Rooms of a map" in shown
    assert "Tasks: train 4096, eval 128, demo 7" in shown
    assert "[user] You are in the" in shown and "[the expert] <think>I need the key." in shown


def test_what_cannot_be_opened_is_described_all_the_same(capsys):
    assert main(["tasks", "prompts"]) == 0
    shown = capsys.readouterr().out
    assert "train_file (string, required)" in shown
    assert "Nothing of it can be shown as it is: task 'prompts':\n  - task.params.train_file is missing" in shown
    assert main(["tasks", f"{HERE}:MuteTasks"]) == 0
    assert "[user] digit?\nThis task set has no expert." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tresure"], "the nearest is 'treasure'"),
        (["treasure", "num_room=5"], "task.params.num_rooms"),
        (["treasure", "num_rooms=big"], "task.params.num_rooms='big'"),
        (["treasure", "--demos", "4"], "--out is where"),
        (["treasure", "--out", "x"], "--out is where"),
        (["--demos", "4", "--out", "x"], "need the name of a task set"),
        (["treasure", "--demos", "0", "--out", "x"], "--demos 0"),
        (["treasure", "--demos", "1", "--games", "1", "--out", "x"], "give one of them"),
        (["treasure", "--games", "1", "--out", "x"], "task set 'treasure' has no games to write"),
        (["treasure", "--demos", "3", "--out", "x", "num_demo=2"], "split 'demo' of 'treasure' has only 2 tasks"),
        (["treasure", "--demos", "3", "--out", "x", "--max-turns", "1"], "the expert of 'treasure' failed"),
        (["treasure", "--demos", "3", "--out", "x", "--seed", "-1"], "--seed -1"),
        ([f"{HERE}:MuteTasks", "--demos", "1", "--out", "x"], "has no expert()"),
        ([f"{HERE}:WrongTasks", "--demos", "9", "--out", "x"], "failed on demo task 3"),
    ],
)
def test_wrong_arguments_are_named_and_leave_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tasks", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_demonstrations_follow_the_seed(tmp_path, capsys):
    def made(seed: int) -> list[dict[str, Any]]:
        out = tmp_path / "demos.jsonl"
        assert main(["tasks", "treasure", "--demos", "3", "--seed", str(seed), "--out", str(out), "num_eval=1"]) == 0
        assert f"3 demonstrations: {out}" in capsys.readouterr().out
        return [json.loads(line) for line in out.read_text().splitlines()]

    assert made(1) == made(1)
    assert made(1)[0]["messages"] != made(2)[0]["messages"]
    assert "tools" not in made(1)[0]


def test_games_are_left_to_the_task_set(tmp_path, capsys):
    arguments = ["--games", "4", "--seed", "2", "--out", str(tmp_path / "games"), "engine=slow"]
    assert main(["tasks", f"{HERE}:Written", *arguments]) == 0
    assert capsys.readouterr().out == f"engine slow, 4 games, seed 2, {tmp_path / 'games'}\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_the_command_quietly(unbuffered):
    reads, writes = os.pipe()
    os.close(reads)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "spear_fast.cli", "tasks", "treasure"]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(monkeypatch):
    def broken(_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("spear_fast.cli.tasks", broken)
    with pytest.raises(BrokenPipeError), open(os.devnull, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        main(["tasks"])
