"""The key `base` of a YAML file: which file wins, where paths start, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from spear_fast.config.load import dump_config, load_config
from spear_fast.errors import ConfigError

TASK = "task: {name: calculator, params: {max_terms: 3, max_digits: 2}}\ncold_start: {steps: 5}\nseed: 1\nsteps: 3\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_merged_onto_its_bases_in_their_order(tmp_path: Path) -> None:
    """Paths start at the file that names them; the last base wins over the first, the file over both."""
    write(tmp_path / "parts" / "task.yaml", TASK)
    write(tmp_path / "parts" / "spear.yaml", "base: task.yaml\nalgo: {preset: spear}\nseed: 2\n")
    write(tmp_path / "model.yaml", "seed: 3\nmodel: {init: {num_layers: 2}}\nupdate: {lr: 1e-4}\n")
    run = write(
        tmp_path / "run.yaml",
        "base: [parts/spear.yaml, model.yaml]\nname: run\nupdate: {lr: 2e-4}\ntask: {params: {max_terms: 4}}\n",
    )
    config = load_config(run, ["steps=7"])
    assert (config.seed, config.steps, config.update.lr) == (3, 7, 2e-4)
    assert config.task.params == {"max_terms": 4, "max_digits": 2}
    assert config.algo.replay.enabled and config.model.init.num_layers == 2
    assert "base:" not in dump_config(config)


def test_one_base_may_be_reached_twice(tmp_path: Path) -> None:
    write(tmp_path / "task.yaml", TASK)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.yaml", f"base: task.yaml\nname: {name}\n")
    run = write(tmp_path / "run.yaml", "base: [a.yaml, b.yaml]\n")
    assert load_config(run).name == "b"


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("base: run.yaml\n", r"based on itself \(run.yaml -> run.yaml\)"),
        ("base: other.yaml\n", r"based on itself \(run.yaml -> other.yaml -> run.yaml\).*a base of .*run.yaml"),
        ("base: absent.yaml\n", r"absent.yaml does not exist.*a base of .*run.yaml"),
        ("base: 3\n", "base=3 must be the path"),
        ("base: [other.yaml, 3]\n", "must be the path of a YAML file, or a list"),
        ("base:\n", "base=None must be"),
    ],
)
def test_wrong_bases_are_refused(text: str, needle: str, tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "base: run.yaml\n")
    with pytest.raises(ConfigError, match=needle):
        load_config(write(tmp_path / "run.yaml", text))


def test_an_unknown_key_of_a_base_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "task.yaml", TASK + "update: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=r"update.lrr"):
        load_config(write(tmp_path / "run.yaml", "base: task.yaml\nname: run\n"))
