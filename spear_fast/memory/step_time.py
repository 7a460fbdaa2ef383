"""How long a training step takes, phase by phase: operations and bytes by formula, divided by a device's rates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from spear_fast.config.schema import RunConfig
from spear_fast.errors import ConfigError

from .engine import EngineNeeds
from .gpus import FROM_DATASHEET, NOT_KNOWN, Gpu, Rate
from .plan import MemoryPlan
from .shapes import DTYPE_BYTES, ModelShape
from .training import MASTER_BYTES, Training

ADAMW_BYTES = 28
"""Read and written for a parameter by a step of AdamW, all float32: weight 8, gradient 4, two moments 16."""


@dataclass(frozen=True)
class Workload:
    """How long trajectories are, which no configuration knows: means over a training step."""

    tokens: float
    """Tokens of a row: a whole trajectory, or with windowed history one message and what is shown before it."""
    sampled: float
    """Of these, those that the policy sampled."""
    rows: float = 1.0
    """Rows of a trajectory."""

    @staticmethod
    def assumed(config: RunConfig) -> Workload:
        """Half of the longest row, half of that sampled, but at most half of what its turns allow; half of the rows."""
        rollout = config.rollout
        tokens, turns = rollout.max_tokens / 2, rollout.max_turns // rollout.most_rows
        return Workload(tokens, min(tokens / 2, turns * rollout.max_turn_tokens / 2), max(1.0, rollout.most_rows / 2))


@dataclass(frozen=True)
class Phase:
    """A phase's time on the slowest of equal ranks, e.g. `Phase("sync", 0.2, "link", "from datasheet, ...")`."""

    name: str
    seconds: float
    bound: str
    """What takes most of it."""
    source: str
    """Where the rates behind it come from."""


@dataclass(frozen=True)
class StepTime:
    """Predicts a training step of a run on equal ranks.

    N is a block's matrices times the blocks, V H the head, L the mean length, A the width of all query heads.
    A token's forward pass costs 2 N + 2 A L per block (causal attention: scores and values, half of the square), its
    backward pass twice that, or once where weights are frozen (LoRA) as their gradient is not needed; a sampled token
    costs the head 2 V H for each of its three products. Communication hides behind computation where FSDP2 overlaps
    the two, so the longer of them counts. A prompt that a group shares is counted for each trajectory. Time in tools
    and environments, and the tail of a rollout in which only the longest trajectories still run, are not included.
    """

    shape: ModelShape
    config: RunConfig
    num_ranks: int
    gpu: Gpu
    plan: MemoryPlan
    workload: Workload

    @property
    def training(self) -> Training:
        """The trainer's side of the memory plan, for its shards and sizes."""
        return Training(self.shape, self.config, self.num_ranks)

    @property
    def engine(self) -> EngineNeeds:
        """The engine's side of the memory plan."""
        return EngineNeeds(self.shape, self.config, self.num_ranks)

    def phases(self) -> list[Phase]:
        """The phases of a step in their order; one that does not occur is left out. The first total leaves out
        self-imitation, which takes place only in steps whose buffer is ripe."""
        rollout, update = self.config.rollout, self.config.update
        fresh = rollout.prompts_per_step * rollout.group_size
        groups = ceil(rollout.prompts_per_step * self.config.algo.filters.keep_groups)
        kept = round(groups * rollout.group_size * self.workload.rows)
        found = [self._rollout()]
        if update.recompute_old_logp:
            found.append(self._forward("old log-probs", kept))
        if self.config.algo.loss.kl_coef > 0:
            found.append(self._forward("reference log-probs", kept))
        found += [self._update("update", kept, update.epochs), self._sync(), self._switch()]
        found = [phase for phase in found if phase.seconds > 0 or phase.name in ("rollout", "update", "sync")]
        total = sum(phase.seconds for phase in found)
        sources = _joined(phase.source for phase in found)
        found.append(Phase("step", total, f"{fresh / total:,.1f} trajectories per second" if total else "", sources))
        if self.config.algo.replay.enabled:
            found.append(self._update("self-imitation, when ripe", self.config.algo.replay.buffer_size, 1))
        return found

    def as_rows(self) -> list[tuple[str, ...]]:
        """Table rows: a header, then phase, seconds, bound and the source of its rates."""
        rows = [("phase", "seconds", "bound by", "rates")]
        return rows + [(p.name, f"{p.seconds:.3g}", p.bound, p.source) for p in self.phases()]

    def _rollout(self) -> Phase:
        """Prefill of what was not sampled, then one pass per sampled token over all trajectories in flight.

        A decoding pass reads all weights but the embedding, and the keys and values of each trajectory, on average
        those of half its length; it is bound by these bytes or by its operations, whichever takes longer.
        """
        gpu, work, shape = self.gpu, self.workload, self.shape
        trajectories = self.engine.trajectories
        rows = trajectories * work.rows
        per_token = shape.kv_bytes_per_token(self.engine.dtype)
        in_cache = self.plan.kv_cache_bytes / (work.tokens * per_token)
        flying = max(1.0, min(float(self.engine.concurrent), in_cache))
        passes = work.sampled * work.rows * max(1.0, trajectories / flying)
        weights = (shape.num_layers * shape.block_parameters + shape.embedding_parameters) * DTYPE_BYTES[
            self.engine.dtype
        ]
        read = weights + flying * per_token * work.tokens / 2
        flops = flying * (self._forward_flops(work.tokens) + 2 * shape.embedding_parameters)
        prefill = rows * (work.tokens - work.sampled) * self._forward_flops(work.tokens)
        times = {
            "prefill products": prefill / gpu.matmul_flops.value,
            "reading weights and KV cache": passes * read / gpu.memory_bandwidth.value,
            "decoding products": passes * flops / gpu.matmul_flops.value,
        }
        slower = max("reading weights and KV cache", "decoding products", key=lambda name: times[name])
        # vLLM replays CUDA graphs, which costs no launches to speak of.
        eager = self.config.engine.name == "hf" or self.config.engine.enforce_eager or self.gpu.name == "cpu"
        launches = passes * shape.num_layers * gpu.layer_s.value if eager else 0.0
        parts = {"prefill products": times["prefill products"], slower: times[slower], "launches": launches}
        return _phase("rollout", parts, (gpu.matmul_flops, gpu.memory_bandwidth, gpu.layer_s))

    def _forward(self, name: str, rows: int) -> Phase:
        """A forward pass of trunk and head over these rows, without gradients."""
        flops = self._tokens(rows) * self._forward_flops(self.workload.tokens)
        flops += self._sampled(rows) * 2 * self.shape.embedding_parameters
        parts = {"products": flops / self.gpu.train_flops.value}
        parts["launches"] = self._micro_batches(rows, 1) * self.shape.num_layers * self.gpu.layer_s.value
        gather = self._micro_batches(rows, 1) * self._gathered_bytes(1)
        return self._overlapped(name, parts, gather, 0.0)

    def _update(self, name: str, rows: int, epochs: int) -> Phase:
        """Forward and backward passes, the choice of Clip-Cov, communication, and the optimizer."""
        shape, parallel, gpu = self.shape, self.config.parallel, self.gpu
        forward, frozen = self._forward_flops(self.workload.tokens), self.config.model.lora.rank > 0
        steps = self._optimizer_steps(rows) * epochs
        batches = self._micro_batches(rows, self._optimizer_steps(rows)) * epochs
        passes = (2 if frozen else 3) + (1 if parallel.activation_checkpointing else 0)
        head = 2 * (2 if frozen else 3) * shape.embedding_parameters
        choosing = self._chooses_tokens()
        if choosing:
            head += 2 * shape.embedding_parameters
            # With one micro-batch the hidden states are there already.
            passes += 1 if batches > steps else 0
        flops = epochs * (self._tokens(rows) * passes * forward + self._sampled(rows) * head)
        state = self.training
        optimizer = steps * ADAMW_BYTES * state.trained_parameters / state.num_shards
        parts = {
            "products": flops / gpu.train_flops.value,
            "launches": batches * passes * shape.num_layers * gpu.layer_s.value,
            "optimizer": optimizer / gpu.memory_bandwidth.value,
        }
        gathers = (2 if parallel.reshard_after_forward else 1) + (1 if choosing and batches > steps else 0)
        reductions = batches if parallel.reduce_gradients == "micro_batch" else steps
        moved = batches * self._gathered_bytes(gathers)
        moved += reductions * MASTER_BYTES * state.trained_parameters * _part(state.num_shards)
        replicas = parallel.replicate
        between = reductions * 2 * MASTER_BYTES * state.trained_parameters / state.num_shards * _part(replicas)
        return self._overlapped(name, parts, moved, between)

    def _sync(self) -> Phase:
        """Weights are cast, gathered by every rank, written into the engine, and read on both sides for the digest."""
        gpu, size = self.gpu, self.engine.weights()
        group = gpu.group_bandwidth(self.training.num_shards)
        gathered = size * _part(self.training.num_shards)
        readings = 4 if self.config.engine.verify_weights == "always" else 2
        parts = {"link": _ratio(gathered, group), "copy and digest": readings * size / gpu.memory_bandwidth.value}
        return _phase("sync", parts, (gpu.memory_bandwidth, *([group] if gathered else [])))

    def _switch(self) -> Phase:
        """What is parked in CPU memory goes out and comes back once a step."""
        parked = self.plan.host_bytes if not self.config.parallel.cpu_offload else 0
        seconds = _ratio(2.0 * parked, self.gpu.host_bandwidth)
        return _phase("sleep and wake", {"copies to CPU memory and back": seconds}, (self.gpu.host_bandwidth,))

    def _overlapped(self, name: str, parts: dict[str, float], moved: float, between: float) -> Phase:
        """A phase whose communication (bytes in a shard group, bytes between replicas) hides behind its work."""
        gpu = self.gpu
        group = gpu.group_bandwidth(self.training.num_shards)
        rates = [gpu.train_flops, gpu.layer_s, gpu.memory_bandwidth, *([group] if moved else [])]
        link = _ratio(moved, group) + _ratio(between, gpu.nic_bandwidth)
        work = sum(parts.values())
        if link > work:
            return Phase(name, link, "communication", _joined(rate.source for rate in rates))
        return _phase(name, parts, rates)

    def _forward_flops(self, length: float) -> float:
        """Operations of all blocks for one token of a sequence of this length."""
        shape = self.shape
        matrices = sum(inputs * outputs for inputs, outputs, _ in shape.linears.values())
        return shape.num_layers * (2 * matrices + 2 * shape.query_width * length)

    def _tokens(self, rows: int) -> float:
        return rows * self.workload.tokens / self.num_ranks

    def _sampled(self, rows: int) -> float:
        return rows * self.workload.sampled / self.num_ranks

    def _optimizer_steps(self, rows: int) -> int:
        return ceil(rows / (self.config.update.mini_batch_size or rows))

    def _micro_batches(self, rows: int, optimizer_steps: int) -> int:
        """Forward passes of one rank, whose packing ends with each optimizer step."""
        tokens = self._tokens(rows) / optimizer_steps
        return optimizer_steps * max(1, ceil(tokens / self.config.update.token_budget))

    def _gathered_bytes(self, times: int) -> float:
        """Bytes a rank receives in a micro-batch: blocks so many times, the root once."""
        shape, state = self.shape, self.training
        if not state.is_sharded:
            return 0.0
        parameters = times * shape.num_layers * shape.block_parameters + shape.root_parameters
        return state.itemsize * parameters * _part(state.num_shards)

    def _chooses_tokens(self) -> bool:
        loss = self.config.algo.loss
        return loss.kind in ("clip_cov", "kl_cov") and loss.stats == "minibatch"


def _part(ranks: int) -> float:
    """Share of a whole that a rank does not hold itself and must receive."""
    return (ranks - 1) / ranks


def _ratio(size: float, rate: Rate) -> float:
    """Seconds for these bytes; nothing takes no time, also on a device without links.

    Raises ConfigError if something moves where no rate is known.
    """
    if not size:
        return 0.0
    if not rate.value:
        raise ConfigError(
            "ranks exchange data over a link whose rate is not known: measure it with bench/calibrate.py under "
            "torchrun and pass the file as --coefficients; if all ranks are in one machine, say --nodes 1"
        )
    return size / rate.value


def _phase(name: str, parts: dict[str, float], rates: Iterable[Rate]) -> Phase:
    return Phase(name, sum(parts.values()), max(parts, key=lambda key: parts[key]), _joined(r.source for r in rates))


def _joined(sources: Iterable[str]) -> str:
    """One text for the rates of a figure. Any rate from a datasheet makes the whole figure a datasheet's."""
    names = list(dict.fromkeys(part for source in sources for part in source.split("; ")))
    if FROM_DATASHEET in names:
        return FROM_DATASHEET
    return "; ".join(name for name in names if name != NOT_KNOWN) or NOT_KNOWN
