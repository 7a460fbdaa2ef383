"""The recipes of the published runs: every one is there, has a plan, and holds the numbers of the paper's table."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from spear_fast.cli import main
from spear_fast.config.describe import describe
from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.envs.registry import make_task_set, task_set_class
from spear_fast.errors import SpearError
from spear_fast.memory.gpus import load_gpu
from spear_fast.memory.plan import plan_memory
from spear_fast.planning import shape_of_run

FOLDER = Path(__file__).parents[2] / "configs/paper"

# Settings of the published runs: arXiv 2509.22601 and the authors' scripts. Math / ALFWorld / WebShop.
TABLE = {
    "group_size": (16, 8, 8),
    "prompts_per_step": (128, 32, 32),
    "mini_batch_size": (64 * 16, 1024, 256),  # math: 64 prompts of 16
    "max_turns": (8, 50, 15),
    "max_turn_tokens": (16384, 512, 512),
    "max_tokens": (2048 + 16384, 2048 + 512, 4096 + 512),  # of a row, which is a message in the text games
    "history": ("full", "windowed", "windowed"),
    "norm_length": (16384, 512, 512),
    "lr": (1e-6, 1e-6, 1e-6),
    "buffer_size": (2048, 2048, 2048),
    "baseline_size": (10240, 10240, 10240),
    "tolerate_steps": (5, 5, 5),
    "warmup_steps": (300, 100, 200),
    "decay_steps": (200, 200, 200),
    "cov": ((0.02, 1.0, 40.0), (0.02, 2.0, 60.0), (0.02, 2.0, 60.0)),
    "temperature": (1.0, 0.4, 0.4),
    "top_p": (0.6, 1.0, 1.0),
    "samples": (32, 1, 1),
}
TASKS = ("math", "alfworld", "webshop")
TASK_SETS = {"math": "math", "alfworld": "alfworld", "webshop": "shopping"}
# GPUs that a run is planned on, by the size of its model.
GPUS = {"1.5b": (8, "h100-80g"), "7b": (8, "h100-80g"), "32b": (64, "h200-141g")}
# What an algorithm is: estimator, division by the group's std, filters, token loss's upper clip.
BASELINES = {
    "grpo": ("grpo", True, False, 0.2),
    "drbot": ("grpo", False, True, 0.28),
    "gigpo": ("gigpo", True, False, 0.2),
    "drbot-gigpo": ("gigpo", False, True, 0.28),
}
NAMES = [
    *[f"math-{model}-drbot{spear}" for model, spear in product(("qwen2.5-32b", "qwen3-32b"), ("", "-spear"))],
    *[
        f"{task}-qwen2.5-{size}-{baseline}{spear}"
        for task, size, baseline, spear in product(TASKS[1:], ("1.5b", "7b"), BASELINES, ("", "-spear"))
    ],
]


def test_every_published_run_is_a_file() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_holds_the_published_numbers_and_fits_its_gpus(name: str) -> None:
    file = FOLDER / f"{name}.yaml"
    config = load_config(file)
    task, rest = name.split("-", 1)
    assert (config.name, config.task.name, config.steps > 0) == (name, TASK_SETS[task], True)
    assert numbers(config) == {key: values[TASKS.index(task)] for key, values in TABLE.items()}
    check_algorithm(config, name)
    labels = dict(describe(config))
    assert labels["run"].startswith(name) and labels["trajectories per step"]
    num_gpus, gpu = GPUS[next(size for size in GPUS if size in rest.split("-"))]
    shape = shape_of_run(config, file)
    assert config.rollout.max_tokens <= (shape.max_positions or 0)
    plan = plan_memory(shape, config, num_gpus, load_gpu(gpu).memory_bytes)
    assert plan.fits and plan.kv_cache_bytes >= shape.kv_bytes_per_token("bfloat16") * config.rollout.max_tokens


def numbers(config: RunConfig) -> dict[str, object]:
    """The table's row of a configuration; the covariance bounds of fresh and replayed tokens are the same."""
    rollout, algo, replay = config.rollout, config.algo, config.algo.replay
    cov = (algo.loss.cov_ratio, algo.loss.cov_lower, algo.loss.cov_upper)
    assert cov == (replay.cov_ratio, replay.cov_lower, replay.cov_upper)
    return {
        "group_size": rollout.group_size,
        "prompts_per_step": rollout.prompts_per_step,
        "mini_batch_size": config.update.mini_batch_size,
        "max_turns": rollout.max_turns,
        "max_turn_tokens": rollout.max_turn_tokens,
        "max_tokens": rollout.max_tokens,
        "history": rollout.history,
        "norm_length": algo.loss.norm_length,
        "lr": config.update.lr,
        "buffer_size": replay.buffer_size,
        "baseline_size": replay.baseline_size,
        "tolerate_steps": replay.tolerate_steps,
        "warmup_steps": replay.warmup_steps,
        "decay_steps": algo.intrinsic.decay_steps,
        "cov": cov,
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "samples": config.eval.samples,
    }


def check_algorithm(config: RunConfig, name: str) -> None:
    """The baseline is what its name says, and SPEAR adds the same three things to each."""
    algo, spear = config.algo, name.endswith("-spear")
    baseline = name.removesuffix("-spear").split("b-")[-1]
    assert baseline in BASELINES
    found = (algo.advantage.estimator, algo.advantage.std_norm, algo.filters.overlong, algo.loss.clip_high)
    assert found == BASELINES[baseline]
    assert (algo.advantage.gamma, algo.advantage.step_weight, algo.advantage.step_std_norm) == (0.95, 1.0, True)
    assert algo.loss.kind == ("clip_cov" if spear else "ppo")
    assert algo.intrinsic.mode == ("cosine" if spear else "none")
    assert algo.intrinsic.count == ("tool_calls" if config.task.name == "math" else "turns")
    assert (algo.replay.enabled, algo.replay.recalibrate) == (spear, "p50")
    assert algo.loss.kl_coef == 0.0


@pytest.mark.parametrize(
    "name", ["math-qwen3-32b-drbot-spear", "webshop-qwen2.5-7b-gigpo", "alfworld-qwen2.5-1.5b-grpo"]
)
def test_a_dry_run_prints_the_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(FOLDER / f"{name}.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "Task set not available" not in printed
    assert "Memory plan, 1 rank on" in printed and f"name: {name}" in printed


@pytest.mark.parametrize("name", ["math-qwen2.5-32b-drbot", "webshop-qwen2.5-1.5b-grpo", "alfworld-qwen2.5-1.5b-grpo"])
def test_the_task_sets_know_the_parameters_and_want_the_official_files(name: str) -> None:
    """A recipe of a published run must not start on generated tasks."""
    task = load_config(FOLDER / f"{name}.yaml").task
    params = task_set_class(task.name).Params.model_validate(task.params)
    files = [value for value in params.model_dump().values() if str(value).startswith("data/")]
    assert files, "nothing official is asked for"
    with pytest.raises(SpearError, match="data/"):
        make_task_set(task.name, task.params, seed=0)


def test_plan_predicts_a_recipe_on_gpus_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", str(FOLDER / "math-qwen2.5-32b-drbot-spear.yaml"), "--gpu", "h200-141g"]
    assert main([*command, "--gpus", "64", "update.token_budget=20480"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "Memory of each of 64 x h200-141g",
        "KV cache",
        "rollout",
        "self-imitation",
        "lower bounds",
        "assumed",
    ):
        assert words in printed
    assert main([*command, "--gpus", "64", "--nodes", "7"]) == 2
    assert "--gpus 64 does not fill --nodes 7" in capsys.readouterr().err
    assert main([*command, "--gpus", "64", "--sampled", "9000", "--tokens", "8000"]) == 2
    assert "--sampled 9000 --tokens 8000" in capsys.readouterr().err
    assert main([*command[:2], "--gpu", "h300", "--gpus", "8"]) == 2
    assert "known: a100-80g" in capsys.readouterr().err
    assert main([*command, "--gpus", "2"]) == 2
    assert "does not fit: the update phase needs" in capsys.readouterr().err
