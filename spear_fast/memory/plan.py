"""The memory plan of a run: bytes of each phase on one GPU, the way trainer and engine share it, and what if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from spear_fast.config.schema import RunConfig
from spear_fast.errors import ConfigError

from .engine import EngineNeeds
from .remedies import remedies
from .shapes import ModelShape
from .training import Items, Training

GIB = 1 << 30
MODES = ("resident", "sleep1", "sleep2", "offload")
"""From the fastest switch between phases to the most frugal."""
PHASES = ("rollout", "sync", "update")
COMFORT = 0.25
"""Part of the greatest useful KV cache that a mode must leave for "auto" to take it before a more frugal one."""
CPU_CACHE_BYTES = GIB
"""Greatest KV cache that is planned on a CPU, whose memory is not the engine's alone."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank, phase by phase.

    Example: `plan.phases["rollout"]["KV cache"]`, `plan.total("update")`.
    """

    mode: str
    """"resident", "sleep1", "sleep2" or "offload", as `MemoryConfig.mode`."""
    capacity_bytes: int
    """Memory of the GPU, or what is available on the CPU."""
    reserve_bytes: int
    phases: dict[str, Items] = field(repr=False)
    """Phase -> item -> bytes, without the reserve."""
    kv_cache_bytes: int
    """What the engine is to be given."""
    host_bytes: int
    """What the plan parks in the memory of the CPU."""

    def total(self, phase: str) -> int:
        """Bytes of a phase, the reserve included."""
        return sum(self.phases[phase].values()) + self.reserve_bytes

    @property
    def fits(self) -> bool:
        """Whether every phase fits the capacity."""
        return all(self.total(phase) <= self.capacity_bytes for phase in PHASES)

    def as_rows(self) -> list[tuple[str, ...]]:
        """Table rows: a header, one row for each item with its GiB in the three phases, total, capacity, host."""
        names = list(dict.fromkeys(name for phase in PHASES for name in self.phases[phase]))
        rows: list[tuple[str, ...]] = [("GiB on one rank", *PHASES)]
        for name in names:
            values = [self.phases[phase].get(name, 0) for phase in PHASES]
            if any(values):
                rows.append((name, *map(_gib, values)))
        rows.append(("reserve", *[_gib(self.reserve_bytes)] * len(PHASES)))
        rows.append(("total", *[_gib(self.total(phase)) for phase in PHASES]))
        rows.append(("capacity", *[_gib(self.capacity_bytes)] * len(PHASES)))
        rows.append((f"mode {self.mode}; parked in CPU memory", _gib(self.host_bytes), "", ""))
        return rows


def plan_memory(
    shape: ModelShape,
    config: RunConfig,
    num_ranks: int,
    gpu_bytes: int,
    *,
    host_bytes: int | None = None,
    on_cpu: bool = False,
) -> MemoryPlan:
    """Return how trainer and engine share the memory of one rank.

    Args:
        shape: The policy.
        config: The run; `memory.gpu_gib` takes precedence over `gpu_bytes`.
        num_ranks: Ranks of the run, each with a GPU.
        gpu_bytes: Memory of one GPU; with `on_cpu` the memory available to one rank.
        host_bytes: CPU memory available to one rank, None if unknown: it is not checked then.
        on_cpu: Whether training and engine run on the CPU: nothing is reserved, "auto" means resident, and the KV
            cache stays modest.

    Raises:
        ConfigError: Nothing fits, or `memory.mode` does not; it names the phase, what it is made of, the bytes that
            are too many and the remedies in order. Or `num_ranks` is not a multiple of `parallel.replicate`.
    """
    _check_ranks(config, num_ranks)
    capacity = gpu_bytes if config.memory.gpu_gib is None else int(config.memory.gpu_gib * GIB)
    planner = _Planner(shape, config, num_ranks, capacity, on_cpu)
    _check_cache(planner)
    plans = [planner.plan(mode) for mode in planner.modes]
    for least in (planner.comfortable_cache, planner.least_cache):
        for plan in plans:
            parks = host_bytes is None or plan.host_bytes <= host_bytes
            if plan.fits and parks and plan.kv_cache_bytes >= least:
                return plan
    raise ConfigError(_refusal(plans[-1], planner, host_bytes))


def _check_ranks(config: RunConfig, num_ranks: int) -> None:
    replicate = config.parallel.replicate
    if num_ranks % replicate:
        raise ConfigError(f"parallel.replicate={replicate} does not divide {num_ranks} ranks; set it to a divisor")


def _check_cache(planner: _Planner) -> None:
    fixed, least = planner.engine.fixed_cache(), planner.least_cache
    if fixed is not None and fixed < least:
        raise ConfigError(
            f"engine.kv_cache_mib={fixed >> 20} holds no trajectory of rollout.max_tokens="
            f"{planner.config.rollout.max_tokens}, which needs {-(-least >> 20)} MiB; raise it, or set it to null and "
            "let the memory plan size it"
        )


class _Planner:
    """Lays out the phases for each mode."""

    def __init__(self, shape: ModelShape, config: RunConfig, num_ranks: int, capacity: int, on_cpu: bool) -> None:
        self.shape, self.config, self.num_ranks, self.capacity, self.on_cpu = shape, config, num_ranks, capacity, on_cpu
        self.training = Training(shape, config, num_ranks, on_cpu)
        self.engine = EngineNeeds(shape, config, num_ranks)
        self.reserve = 0 if on_cpu else int(config.memory.reserve_gib * GIB)

    @property
    def modes(self) -> Sequence[str]:
        if self.config.memory.mode != "auto":
            return (self.config.memory.mode,)
        return MODES[:1] if self.on_cpu else MODES

    @property
    def least_cache(self) -> int:
        """Room for the longest trajectory, below which no rollout can end."""
        return self.engine.cache_of(1)

    @property
    def greatest_cache(self) -> int:
        most = self.engine.cache_of(self.engine.concurrent)
        return max(self.least_cache, min(most, CPU_CACHE_BYTES)) if self.on_cpu else most

    @property
    def comfortable_cache(self) -> int:
        fixed = self.engine.fixed_cache()
        wanted = max(self.least_cache, int(COMFORT * self.greatest_cache))
        return wanted if fixed is None else min(wanted, fixed)

    def plan(self, mode: str) -> MemoryPlan:
        """The phases in this mode, with as much KV cache as fits."""
        cache = self.engine.fixed_cache()
        if cache is None:
            without = self._phases(mode, 0)
            holding = ("rollout", "sync", "update") if mode == "resident" else ("rollout",)
            free = min(self.capacity - self.reserve - sum(without[phase].values()) for phase in holding)
            cache = max(self.least_cache, min(self.greatest_cache, free))
        phases = self._phases(mode, cache)
        return MemoryPlan(mode, self.capacity, self.reserve, phases, cache, self._host_bytes(mode))

    def _phases(self, mode: str, cache: int) -> dict[str, Items]:
        training, engine, resident = self.training, self.engine, mode == "resident"
        on_device = 0 if self.config.parallel.cpu_offload else 1
        # With "offload" weights and moments leave together once the engine has the weights, and come back together.
        in_rollout = 0 if mode == "offload" else on_device
        reference = on_device * training.reference_weights()
        always = {"reference policy": reference if self.config.algo.loss.kl_coef > 0 else 0}
        awake = {"engine weights": engine.weights(), "engine workspace": engine.workspace()}
        asleep = {"engine weights": engine.asleep()}
        master, moments = training.master_weights(), training.optimizer_state()
        return {
            "rollout": {
                "master weights": in_rollout * master,
                "optimizer state": in_rollout * moments,
                **always,
                **awake,
                "KV cache": cache,
            },
            "sync": {
                "master weights": on_device * master,
                "optimizer state": on_device * moments,
                **always,
                **awake,
                "KV cache": cache if resident else 0,
                "sync bucket": engine.bucket(),
            },
            "update": {
                "master weights": on_device * master,
                "optimizer state": on_device * moments,
                "gradients": on_device * training.gradients(),
                **training.micro_batch(),
                **always,
                **(awake if resident else asleep),
                "KV cache": cache if resident else 0,
            },
        }

    def _host_bytes(self, mode: str) -> int:
        training = self.training
        state = training.master_weights() + training.optimizer_state()
        parked = 0
        if self.config.parallel.cpu_offload:
            parked = state + training.gradients()
        elif mode == "offload":
            parked = state
        return parked + (self.engine.weights() - self.engine.asleep() if mode == "sleep1" else 0)


def _refusal(plan: MemoryPlan, planner: _Planner, host_bytes: int | None) -> str:
    """Why the most frugal plan allowed does not do, and what would help."""
    worst = max(PHASES, key=plan.total)
    place = "this machine" if planner.on_cpu else "a GPU"
    mode = f"memory.mode={plan.mode}" + (" (the most frugal)" if planner.config.memory.mode == "auto" else "")
    if plan.fits and host_bytes is not None:
        return (
            f"{mode} parks {_gib(plan.host_bytes)} GiB of each rank in CPU memory, where {_gib(host_bytes)} GiB are "
            "left for it; set memory.mode=sleep2, start more ranks, or leave parallel.cpu_offload off"
        )
    items = sorted(plan.phases[worst].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in items if size)
    lines = [
        f"{mode} does not fit: the {worst} phase needs {_gib(plan.total(worst))} GiB of the "
        f"{_gib(plan.capacity_bytes)} GiB of {place}, {_gib(plan.total(worst) - plan.capacity_bytes)} GiB too many.",
        f"It consists of (GiB): {parts}, reserve {_gib(plan.reserve_bytes)}.",
        "What helps, in this order:",
    ]

    def fits(config: RunConfig, num_ranks: int) -> bool:
        changed = _Planner(planner.shape, config, num_ranks, plan.capacity_bytes, planner.on_cpu)
        return any(changed.plan(mode).fits for mode in changed.modes)

    found = remedies(planner.config, planner.num_ranks, worst, fits, on_cpu=planner.on_cpu)
    return "\n".join([*lines, *(f"  - {text}" for text in found)])


def _gib(size: int) -> str:
    return f"{size / GIB:.3f}" if 0 < size < GIB // 10 else f"{size / GIB:.1f}"
