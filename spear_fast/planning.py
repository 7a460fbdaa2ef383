"""What a dry run and `spear-fast plan` print: memory and time of a run as tables and notes, nothing being loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from spear_fast.config.schema import RunConfig
from spear_fast.errors import ConfigError
from spear_fast.memory.gpus import FROM_DATASHEET, load_gpu
from spear_fast.memory.plan import plan_memory
from spear_fast.memory.shapes import ModelShape, find_shape, shape_of_file
from spear_fast.memory.step_time import StepTime, Workload

SHIPPED_SHAPES = Path(__file__).parents[1] / "configs/paper/shapes"
"""Shapes of known models, in a checkout of the repository."""


@dataclass(frozen=True)
class Section:
    """A table with a title, its first row the header, and sentences under it."""

    title: str
    rows: Sequence[tuple[str, ...]] = ()
    notes: Sequence[str] = field(default=())


def shape_of_run(config: RunConfig, config_file: Path, shape_file: Path | None = None) -> ModelShape:
    """Return the shape of a run's model: of `shape_file`, or found as `find_shape` does, among files in `shapes/`
    beside the configuration and those that the repository ships."""
    if shape_file is not None:
        return shape_of_file(shape_file)
    return find_shape(config.model.path, config.model.init, [config_file.parent / "shapes", SHIPPED_SHAPES])


def here(config: RunConfig, config_file: Path) -> list[Section]:
    """Return the memory plan for the device of this machine, or why there is none; and what keeps the run from here."""
    import torch

    from spear_fast.envs.registry import task_set_class
    from spear_fast.memory.here import plan_here

    sections = []
    try:
        task_set_class(config.task.name)
    except ConfigError as error:
        sections.append(Section("Task set not available", notes=[f"The run cannot start here: {error}"]))
    ranks = world_size()
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    title = f"Memory plan, {_count(ranks, 'rank')} on {device.type}"
    try:
        plan = plan_here(shape_of_run(config, config_file), config, ranks, device)
    except ConfigError as error:
        note = f"Plan for other machines: spear-fast plan {config_file} --gpus N --gpu NAME"
        return [*sections, Section(title, notes=[str(error), note])]
    return [*sections, Section(title, plan.as_rows())]


def elsewhere(
    config: RunConfig,
    shape: ModelShape,
    *,
    num_gpus: int,
    gpu_name: str,
    num_nodes: int | None = None,
    coefficients: Path | None = None,
    tokens: float | None = None,
    sampled: float | None = None,
) -> list[Section]:
    """Return the memory plan and the predicted step time on `num_gpus` GPUs of a kind, over `num_nodes` machines.

    Args:
        config: The run.
        shape: Its model.
        num_gpus: Ranks.
        gpu_name: A GPU of gpus.json, or the device of the coefficients file.
        num_nodes: Machines; None fills them with as many GPUs as is usual.
        coefficients: File of bench/calibrate.py, whose rates replace the vendor's.
        tokens: Mean length of a trajectory, or with windowed history of one of its rows; None assumes half of the
            longest.
        sampled: Of these, tokens that the policy samples; None assumes half.

    Raises:
        ConfigError: An unknown GPU, GPUs that do not fill the nodes, lengths that contradict each other, or a run
            that does not fit.
    """
    gpu = load_gpu(gpu_name, coefficients)
    if num_nodes is not None:
        if num_gpus % num_nodes:
            raise ConfigError(f"--gpus {num_gpus} does not fill --nodes {num_nodes} evenly; make it a multiple")
        gpu = replace(gpu, gpus_per_node=num_gpus // num_nodes)
    work = _workload(config, tokens, sampled)
    plan = plan_memory(shape, config, num_gpus, gpu.memory_bytes, on_cpu=gpu_name == "cpu")
    times = StepTime(shape, config, num_gpus, gpu, plan, work).as_rows()
    assumed = [name for name, value in (("--tokens", tokens), ("--sampled", sampled)) if value is None]
    notes = [
        (f"Trajectories of {work.rows:,.0f} rows (assumed), each" if work.rows > 1 else "Trajectories")
        + f" of {work.tokens:,.0f} tokens on average, {work.sampled:,.0f} of them sampled"
        + (f" (assumed; set {' and '.join(assumed)})" if assumed else ""),
        "Left out: time in tools and environments, the end of a rollout when only the longest trajectories run.",
    ]
    if any(row[-1] == FROM_DATASHEET for row in times):
        notes.append("Rates of a datasheet are never reached: such times are lower bounds, not predictions.")
    title = f"Memory of each of {num_gpus} x {gpu_name}, model of {shape.num_parameters / 1e6:,.1f} M parameters"
    return [Section(title, plan.as_rows()), Section("Time of a training step", times, notes)]


def world_size() -> int:
    """Ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _workload(config: RunConfig, tokens: float | None, sampled: float | None) -> Workload:
    assumed = Workload.assumed(config)
    mean = assumed.tokens if tokens is None else tokens
    share = min(assumed.sampled, mean / 2) if sampled is None else sampled
    if not 0 < share <= mean <= config.rollout.max_tokens:
        raise ConfigError(
            f"--sampled {share:g} --tokens {mean:g}: of a trajectory's tokens, at most rollout.max_tokens="
            f"{config.rollout.max_tokens}, some but not more than all are sampled"
        )
    return Workload(mean, share, assumed.rows)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
