"""Loading a configuration: which source wins, what survives a round trip, what an error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_fast.config.fields import all_fields
from spear_fast.config.load import dump_config, load_config
from spear_fast.config.nearest import nearest_key
from spear_fast.config.presets import PRESETS
from spear_fast.config.schema import RunConfig
from spear_fast.errors import ConfigError

BASE: dict[str, Any] = {"name": "run", "steps": 3, "task": {"name": "calculator"}, "cold_start": {"steps": 5}}
MINIMAL = "name: run\nsteps: 3\ntask: {name: calculator}\ncold_start: {steps: 5}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(path: Path | None, *overrides: str, base: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, base=base)
    return str(caught.value)


def test_a_later_source_wins(tmp_path: Path) -> None:
    """Preset below base, base below file, file below overrides; untouched keys keep the lower value."""
    path = write(tmp_path, MINIMAL + "algo: {preset: spear, loss: {clip_high: 0.5}}\nupdate: {lr: 1e-4}\n")
    base = {"algo": {"loss": {"clip_high": 0.4, "clip_low": 0.1}, "replay": {"coef": 2.0}}, "seed": 8}
    config = load_config(path, ["algo.replay.coef=3.0", "seed=9", "seed=10"], base=base)
    assert config.algo.loss.dual_clip == PRESETS["spear"]["loss"]["dual_clip"]
    assert config.algo.loss.clip_low == 0.1
    assert config.algo.loss.clip_high == 0.5
    assert config.algo.replay.coef == 3.0
    assert (config.seed, config.update.lr) == (10, 1e-4)
    assert config.algo.loss.cov_upper == RunConfig.model_validate(BASE).algo.loss.cov_upper


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_the_algorithm_and_nothing_else(preset: str) -> None:
    config = load_config(None, [f"algo.preset={preset}"], base=BASE)
    plain = load_config(None, base=BASE)
    for section, changes in PRESETS[preset].items():
        for name, value in changes.items():
            assert getattr(getattr(config.algo, section), name) == value
    assert config.model_dump(exclude={"algo"}) == plain.model_dump(exclude={"algo"})


def test_an_overridden_preset_replaces_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "algo: {preset: spear, loss: {clip_low: 0.1}}\n")
    config = load_config(path, ["algo.preset=grpo"])
    assert config.algo.preset == "grpo"
    assert not config.algo.replay.enabled
    assert config.algo.loss.kind == "ppo"
    assert config.algo.loss.clip_low == 0.1


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "with space"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: got .*, expected text that matches"):
        load_config(None, base={**BASE, "name": name})


def test_task_params_are_free(tmp_path: Path) -> None:
    path = write(tmp_path, "name: r\nsteps: 1\ncold_start: {steps: 1}\ntask: {name: c, params: {a: {b: 1, c: x}}}\n")
    config = load_config(path, ["task.params.max_terms=4", "task.params.a.b=[2]"])
    assert config.task.params == {"a": {"b": [2], "c": "x"}, "max_terms": 4}


@given(
    preset=st.sampled_from([None, *PRESETS]),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
    lr=st.floats(1e-12, 1e12),
    params=st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False) | st.none() | st.lists(st.integers())),
)
def test_a_dumped_configuration_loads_identically(
    tmp_path_factory: pytest.TempPathFactory, preset: str | None, name: str, lr: float, params: dict[str, Any]
) -> None:
    chosen = {
        "name": name,
        "task": {"name": "calculator", "params": params},
        "algo": {"preset": preset},
        "update": {"lr": lr},
    }
    config = load_config(None, base={**BASE, **chosen})
    path = write(tmp_path_factory.mktemp("run"), dump_config(config))
    again = load_config(path)
    assert again == config
    assert again.algo.preset == preset
    assert dump_config(again) == dump_config(config)


def test_a_dumped_configuration_holds_every_option(tmp_path: Path) -> None:
    text = dump_config(load_config(None, base=BASE))
    for field in all_fields():
        assert field.key.rpartition(".")[2] + ":" in text


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "update: {lr: fast}\nalgo: {loss: {clip_hi: 0.3}}\n")
    message = message_of(path, "seed=-1", "log.progress=false", "model.init.num_heads=3", "algo.preset=spaer")
    assert "run.yaml: 6 problems" in message
    for line in (
        "update.lr: got 'fast', expected number > 0",
        "unknown key 'algo.loss.clip_hi'; the nearest valid key is 'algo.loss.clip_high'",
        "seed: got -1, expected integer >= 0",
        'log.progress: got false, expected one of "auto", "rich", "plain", "off"',
        "model.init: num_heads=3 must divide hidden_size=160",
        "algo.preset: got 'spaer', expected one of",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo.repaly.enabled=false", "'algo.repaly.enabled'; the nearest valid key is 'algo.replay.enabled'"),
        ("lr=1e-4", "'lr'; the nearest valid key is 'update.lr'"),
        ("replay.enabled=true", "'replay.enabled'; the nearest valid key is 'algo.replay.enabled'"),
        ("--seed=3", "'--seed'; the nearest valid key is 'seed'"),
        ("eval.foo=1", "the nearest valid key is 'eval."),
        ("seed=3.0", "seed: got 3.0, expected integer >= 0"),
        ("seed=true", "seed: got true, expected integer >= 0"),
        ("update.lr=true", "update.lr: got true, expected number > 0"),
        ("update.lr=", "update.lr: got null, expected number > 0"),
        ("update.betas=[0.9]", "update.betas.1 is missing; set it, it must be list of 2: number >= 0 and < 1"),
        ("algo.loss.dual_clip=0.5", "algo.loss.dual_clip: got 0.5, expected number > 1 or null"),
        ("algo=grpo", "algo: got 'grpo', expected a section with keys such as preset"),
        ("rollout=", "rollout: got null, expected a section"),
        ("update.token_budget=100", "update.token_budget=100 is smaller than rollout.max_tokens=512"),
        ("name=[" + "x, " * 50 + "]", "name: got ['x', 'x',"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(override: str, message: str) -> None:
    found = message_of(None, override, base=BASE)
    assert message in found
    assert all(len(line) < 200 for line in found.splitlines())


def test_partial_rollouts_cannot_be_deterministic() -> None:
    found = message_of(None, "rollout.mode=partial", "rollout.deterministic=true", base=BASE)
    assert "rollout.deterministic=true needs rollout.mode=sync" in found


def test_missing_settings_are_named(tmp_path: Path) -> None:
    message = message_of(write(tmp_path, "seed: 3\n"))
    assert "name is missing; set it, it must be string" in message
    assert "task is missing; set it, it must be a section with keys such as name, params" in message


def test_every_unreadable_override_is_named() -> None:
    message = message_of(None, "seed", "=3", "a..b=1", "x=[1", "steps=4", base=BASE)
    assert [line.split()[1].rstrip(",") for line in message.splitlines()] == ["'seed'", "'=3'", "'a..b=1'", "'x=[1'"]
    assert "write for example algo.replay.enabled=false" in message


def test_unusable_files_are_explained(tmp_path: Path) -> None:
    assert "does not exist" in message_of(tmp_path / "absent.yaml")
    assert "is a folder" in message_of(tmp_path)
    assert "is empty" in message_of(write(tmp_path, "# only a comment\n"))
    assert "holds a list" in message_of(write(tmp_path, "- a\n- b\n"))
    assert "run.yaml, line 2" in message_of(write(tmp_path, "seed: 1\nseed: 2\n"))
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    assert "binary.yaml cannot be read" in message_of(path)


@given(field=st.sampled_from(all_fields()), data=st.data())
def test_one_slip_in_a_key_finds_it_again(field: Any, data: st.DataObject) -> None:
    """Leaving out any one letter of a long enough name points back to the key, or to a sibling that is as near."""
    name = field.key.rpartition(".")[2]
    place = data.draw(st.integers(0, len(name) - 1))
    cut = name[:place] + name[place + 1 :]
    valid = [each.key for each in all_fields()]
    unknown = field.key[: len(field.key) - len(name)] + cut
    if len(name) >= 5 and unknown not in valid:
        assert nearest_key(unknown, valid) == field.key
