"""The training loop: `Trainer.step` is the map of the whole program, one line per room."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from spear_fast import schedules
from spear_fast.advantages.fill import fill
from spear_fast.assemble import (
    close_tasks,
    load_policy,
    make_collector,
    make_engine,
    make_tasks,
    make_trainable,
    plan_run,
    push_policy,
)
from spear_fast.batching.rows import rows_from_groups
from spear_fast.checkpoint.load import Checkpoint, load_latest
from spear_fast.checkpoint.rng import capture_rng, restore_rng
from spear_fast.checkpoint.save import save
from spear_fast.checkpoint.tensors import load_tensors, save_tensors
from spear_fast.cold_start import prepare_start, start_folder
from spear_fast.config.schema import RunConfig
from spear_fast.data.prompts import PromptStream
from spear_fast.dist import start_ranks
from spear_fast.evaluate import evaluate
from spear_fast.learner import load_reference, make_memory, make_policy_update, make_updater
from spear_fast.log.metrics import StepMetrics
from spear_fast.log.progress import Progress
from spear_fast.log.samples import pick_samples, write_samples
from spear_fast.log.sinks import open_sinks
from spear_fast.losses.filters import keep_top_groups, mark_filtered
from spear_fast.memory.readings import readings, reset_peaks
from spear_fast.rewards.combine import score
from spear_fast.rollout.collection import Collection, merge, refuse_total_failure, rollout_stats
from spear_fast.run_folder import open_existing, open_new
from spear_fast.seeds import derive_seed
from spear_fast.types import Group, Row, Task
from spear_fast.update.offload import offload, onload
from spear_fast.update.old_logp import check_gap, correct_old_logp
from spear_fast.update.scoring import fill_ref_logp
from spear_fast.update.state import set_steps, training_tensors

T = TypeVar("T")


class Trainer:
    """One run: owns the rooms' state (policy, optimizer, replay memory, cursor) and walks them step by step.

    Under torchrun there is one per rank. All decide the same from the same trajectories; only rollouts, forward and
    backward passes and the optimizer's state are spread over them, and only the main rank writes files.
    """

    def __init__(self, config: RunConfig, progress: Progress, *, resume: bool = False) -> None:
        """
        Args:
            config: The resolved configuration.
            progress: Where phases and numbers are shown.
            resume: Continue the run of this name from its newest checkpoint.

        Raises:
            SpearError: The folder, task, model, checkpoint or number of ranks cannot be used.
        """
        self.config = config
        self.progress = progress
        self.tasks = make_tasks(config)
        self._owned = ExitStack()
        """Closes what was opened, the last first; each is tried, also when another fails."""
        self._owned.callback(close_tasks, self.tasks)
        self.finished_steps = 0
        """Training steps done; also the version of the policy's weights."""
        self.started_groups = 0
        """Groups started so far, which number the trajectories."""
        self._unfinished: list[Task] = []
        self.stop_requested = False
        self._resumed, self._pushed = resume, False
        self.sinks = []
        try:
            self.ranks = start_ranks(config.device, config.parallel, shard=config.needs_sharding)
            self._owned.callback(self.ranks.close)
            checkpoint = self._open(resume)
            self._assemble()
            if checkpoint is not None:
                self._restore(checkpoint)
            if self.ranks.is_main:
                first_step = self.finished_steps + 1 if resume else 0
                self.sinks = open_sinks(self.folder.path, tensorboard=config.log.tensorboard, first_step=first_step)
        except BaseException:
            self.close()
            raise

    def _open(self, resume: bool) -> Checkpoint | None:
        """Open the run's folder, and make the policy to start from or find the checkpoint to go on with."""
        config = self.config
        if resume:
            self.folder = self.ranks.on_main(lambda: open_existing(config))
            self.ranks.on_main(lambda: self.folder.save_config(config))
            return load_latest(self.folder.path)
        self.folder = self.ranks.on_main(lambda: open_new(config))
        if start_folder(config, self.folder) == self.folder.start_model:
            prepare_start(config, self.tasks, self.progress, self.ranks, self.folder.start_model)
        return None

    def _assemble(self) -> None:
        config, ranks = self.config, self.ranks
        start = start_folder(config, self.folder)
        self.policy = load_policy(start, config, self.tasks)
        self.plan = plan_run(config, start, ranks)
        self.progress.table("memory plan", self.plan.as_rows())
        self.engine = make_engine(config, start, self.policy, ranks, self.plan)
        self._owned.callback(self.engine.close)
        make_trainable(self.policy, config, ranks)
        self.collector = make_collector(config, self.tasks, self.policy, self.engine)
        self._owned.callback(self.collector.close)
        self.prompts = PromptStream(self.tasks, config.seed)
        self.memory = make_memory(config, self.tasks) if config.algo.replay.enabled else None
        self.updater = make_updater(config, self.policy, self.folder)
        self.update = make_policy_update(config, self.updater)
        self.reference = None
        if config.algo.loss.kl_coef > 0:
            self.reference = load_reference(config, self.tasks, start, self.updater, ranks)

    def run(self) -> dict[str, float]:
        """Train until `config.steps` or until `stop_requested`, evaluating and saving on the way.

        Returns:
            The last evaluation.
        """
        evaluation: dict[str, float] = {}
        self._push()
        if not self._resumed:
            evaluation = self.evaluate()
            self.save()
        stop = False
        while self.finished_steps < self.config.steps and not stop:
            self.step()
            # A signal reaches the ranks at different moments; they must stop after the same step.
            stop = self.ranks.any(self.stop_requested)
            if self._is_due(self.config.eval.every):
                evaluation = self.evaluate()
            if self._is_due(self.config.checkpoint.every) or stop:
                self.save()
        self.stop_requested = stop
        return evaluation

    def step(self) -> None:
        """One training step."""
        config, step = self.config, self.finished_steps
        metrics = StepMetrics(step + 1)
        reset_peaks(self.ranks.device)
        groups = self._roll_out(step, metrics)
        mu = schedules.intrinsic_weight(config.algo.intrinsic.mode, step, config.algo.intrinsic.decay_steps)
        gamma = schedules.cosine_warmup(step, config.algo.replay.warmup_steps)
        metrics.add({"schedule/mu": mu, "schedule/gamma": gamma if self.memory else 0.0})
        rows = self._rows(groups, mu, metrics)
        replay = self._draw(step, metrics)
        all_taken = self._update(rows, replay, gamma * config.algo.replay.coef, step, metrics)
        self._offer(groups, rows if all_taken else [], metrics)
        self.finished_steps += 1
        with metrics.phase("sync"):
            metrics.add(self._push())
        self._log(metrics, groups)

    def evaluate(self) -> dict[str, float]:
        """Evaluate on held-out tasks, log and return the statistics."""
        if not self._pushed:
            # Until then the engine holds the policy that the run started from.
            self._push()
        self.progress.phase("evaluation")
        started = time.perf_counter()
        stats, groups = evaluate(self.config, self.tasks, self.collector, self.ranks, attempt=self._with_engine)
        stats["time/eval_s"] = time.perf_counter() - started
        self._write_samples(groups, self.folder.path / "eval")
        self._write(stats)
        return stats

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        self.progress.phase("checkpoint")
        pending = self.ranks.gather(self.collector.pending_tasks())
        values: dict[str, Any] = {
            "finished_steps": self.finished_steps,
            "optimizer_steps": self.updater.optimizer.num_steps,
            "prompts": self.prompts.state_dict(),
            "started_groups": self.started_groups,
            "unfinished": [asdict(task) for part in pending for task in part] + [*map(asdict, self._unfinished)],
        }
        save(
            self.folder.path,
            self.finished_steps,
            tensors={"rng": capture_rng()},
            arrays={"replay": self.memory.state_dict()} if self.memory else {},
            values={"trainer": values},
            folders={
                "model": lambda folder: self.policy.save(folder, self.ranks, getattr(torch, self.config.model.dtype)),
                "training": lambda folder: save_tensors(folder, self._training_tensors(), self.ranks),
            },
            keep=self.config.checkpoint.keep,
            ranks=self.ranks,
        )

    def close(self) -> None:
        """Close files, end the trajectories and free their engine; each is tried, also when another fails."""
        for sink in self.sinks:
            self._owned.callback(sink.close)
        self._owned.close()

    def _push(self) -> dict[str, float]:
        """Bring the trained weights into the engine, as the version of the steps finished."""
        wanted = self.config.engine.verify_weights
        verify = wanted == "always" or (wanted == "first" and not self._pushed)
        self._pushed = True
        return push_policy(self.config, self.policy, self.engine, self.finished_steps, verify=verify)

    @contextmanager
    def _parked(self) -> Iterator[None]:
        """With a memory plan that says so, keep the trainer's tensors on the CPU meanwhile."""
        if self.plan.mode != "offload":
            yield
            return
        offload(self.policy.model, self.updater.optimizer)
        try:
            yield
        finally:
            onload(self.policy.model, self.updater.optimizer, self.ranks.device)

    def _training_tensors(self) -> dict[str, Any]:
        return training_tensors(self.policy.model, self.updater.optimizer)

    def _roll_out(self, step: int, metrics: StepMetrics) -> list[Group]:
        """Collect the groups of this step; failed trajectories leave them here."""
        self.progress.phase("rollout")
        with metrics.phase("rollout"):
            collection = self._collect(step)
        groups = collection.groups
        refuse_total_failure(groups)
        metrics.add(rollout_stats(collection))
        failed = [t for group in groups for t in group.trajectories if not t.status.usable]
        if failures := [*failed, *collection.replaced]:
            self.progress.note(
                f"{len(failures)} trajectories failed and {len(collection.replaced)} of them were played again, e.g. "
                f"{failures[0].status.value}: {failures[0].error}"
            )
        for group in groups:
            group.trajectories = [trajectory for trajectory in group.trajectories if trajectory.status.usable]
        return [group for group in groups if group.trajectories]

    def _collect(self, step: int) -> Collection:
        """Roll out a step on all ranks."""
        rollout = self.config.rollout
        new = self._next_tasks([])

        def roll_out() -> Collection:
            tasks = self._next_tasks(new)
            own = self.collector.collect_step(
                tasks,
                rollout.group_size,
                step=step,
                num_groups=len(self.ranks.share(rollout.prompts_per_step)),
                first_uid=self.started_groups * rollout.group_size,
                # A rank that returns no groups would hold those it started for ever.
                share=self.ranks.share(len(tasks), rollout.prompts_per_step),
            )
            started.append(len(tasks))
            return merge(self.ranks.gather(own))

        started: list[int] = []
        collection = self._with_engine(roll_out)
        self.started_groups += started[-1]
        return collection

    def _next_tasks(self, chosen: list[Task]) -> list[Task]:
        """Complete the tasks to start in this step, with those that were started before and lost, then with new ones.

        They were lost with a process that ended before the checkpoint which is resumed, or with an engine that died.
        """
        count = self.collector.wanted(self.config.rollout.prompts_per_step) - len(chosen)
        again, self._unfinished = self._unfinished[:count], self._unfinished[count:]
        return again + chosen + self.prompts.next(count - len(again))

    def _with_engine(self, roll_out: Callable[[], T]) -> T:
        """Return `roll_out()`. If an engine died meanwhile, it is started anew and the work done again, once."""
        held = self.collector.pending_tasks()
        with self._parked():
            result = roll_out()
        if not self.ranks.any(not self.engine.alive):
            return result
        self.progress.note("an engine died; it is started anew and the rollout repeated")
        self._unfinished = [task for part in self.ranks.gather(held) for task in part] + self._unfinished
        self.collector.drop()
        self._push()
        with self._parked():
            return roll_out()

    def _rows(self, groups: list[Group], mu: float, metrics: StepMetrics) -> list[Row]:
        """Rewards, advantages and filters, in this order: what is filtered still counts in its group's mean."""
        algo = self.config.algo
        intrinsic, advantage, filters = algo.intrinsic, algo.advantage, algo.filters
        metrics.add(score(groups, mu=mu, variant=intrinsic.variant, count=intrinsic.count, per_call=intrinsic.per_call))
        metrics.add(fill(groups, **advantage.model_dump()))
        metrics.add(mark_filtered(groups, **filters.model_dump(exclude={"keep_groups"})))
        kept, stats = keep_top_groups(groups, filters.keep_groups)
        metrics.add(stats)
        return rows_from_groups(kept)

    def _draw(self, step: int, metrics: StepMetrics) -> list[Row]:
        """Replayed rows of this step; the memory holds only trajectories of earlier steps."""
        if self.memory is None:
            return []
        rows, stats = self.memory.draw(step, derive_seed(self.config.seed, "replay", step))
        # The size after this step's trajectories were taken in is the one to log.
        metrics.add({name: value for name, value in stats.items() if name != "replay/size"})
        return rows or []

    def _update(
        self, rows: list[Row], replay: list[Row], replay_weight: float, step: int, metrics: StepMetrics
    ) -> bool:
        """Take the optimizer steps; return whether all were taken, none skipped as not finite."""
        update = self.config.update
        self.progress.phase("update")
        with metrics.phase("update"):
            mode = "recompute" if update.recompute_old_logp else "sampler"
            # Only rollouts that are paused and resumed mix policy versions.
            version = step if self.config.rollout.mode == "partial" else None
            score = self.updater.score
            gap = correct_old_logp(rows, score, mode=mode, tis_clip=update.tis_clip, version=version)
            self._check_gap(gap)
            if self.reference is not None:
                fill_ref_logp(rows, self.reference)
            seed = derive_seed(self.config.seed, "update", step)
            stats = self.update.run(rows, replay, replay_weight, seed, version)
        stats |= gap
        metrics.add(stats)
        self._check_gap(stats)
        return not stats["update/skipped_steps"]

    def _check_gap(self, stats: dict[str, float]) -> None:
        if "update/logp_gap_nats" in stats:
            check_gap(stats["update/logp_gap_nats"], self.config.update.max_logp_gap)

    def _offer(self, groups: list[Group], rows: list[Row], metrics: StepMetrics) -> None:
        """Give the memory the step's groups for its baseline, and its rows to store."""
        if self.memory is not None:
            metrics.add(self.memory.offer(groups, rows))

    def _log(self, metrics: StepMetrics, groups: list[Group]) -> None:
        log = self.config.log
        if log.sample_every and self.finished_steps % log.sample_every == 0:
            self._write_samples(groups, self.folder.path)
        metrics.add(readings(self.ranks.device))
        self._write(metrics.values())

    def _write_samples(self, groups: list[Group], folder: Path) -> None:
        if self.ranks.is_main:
            write_samples(folder, self.finished_steps, pick_samples(groups, self.config.log.num_samples))

    def _write(self, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.finished_steps, values)
        self.progress.step(self.finished_steps, values)

    def _is_due(self, every: int) -> bool:
        last = self.finished_steps >= self.config.steps
        return last or (every > 0 and self.finished_steps % every == 0)

    def _restore(self, checkpoint: Checkpoint) -> None:
        values = checkpoint.values("trainer")
        self.finished_steps = int(values["finished_steps"])
        self.prompts.load_state_dict(values["prompts"])
        self.started_groups = int(values["started_groups"])
        self._unfinished = [Task(**task) for task in values["unfinished"]]
        load_tensors(checkpoint.folder("training"), self._training_tensors(), self.ranks)
        set_steps(self.updater.optimizer, int(values["optimizer_steps"]))
        if self.memory is not None:
            self.memory.load_state_dict(checkpoint.arrays("replay"))
        restore_rng(checkpoint.tensors("rng"))
