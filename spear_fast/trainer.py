"""The training loop: `Trainer.step` is the map of the whole program, one line per room."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from spear_fast import schedules
from spear_fast.advantages.fill import fill
from spear_fast.assemble import Policy, load_policy, make_collector, make_engine, make_tasks
from spear_fast.batching.rows import rows_from_groups
from spear_fast.checkpoint.load import Checkpoint, load_latest
from spear_fast.checkpoint.rng import capture_rng, restore_rng
from spear_fast.checkpoint.save import save
from spear_fast.cold_start import start_policy
from spear_fast.config.schema import RunConfig
from spear_fast.data.prompts import PromptStream
from spear_fast.envs.base import TaskSet
from spear_fast.evaluate import evaluate
from spear_fast.log.metrics import StepMetrics
from spear_fast.log.progress import Progress
from spear_fast.log.samples import pick_samples, write_samples
from spear_fast.log.sinks import open_sinks
from spear_fast.losses.filters import keep_top_groups, mark_filtered
from spear_fast.losses.terms import on_policy_terms, replay_terms
from spear_fast.replay.memory import ReplayMemory
from spear_fast.rewards.combine import score
from spear_fast.rollout.collection import refuse_total_failure, rollout_stats
from spear_fast.run_folder import RunFolder, open_existing, open_new
from spear_fast.seeds import derive_seed
from spear_fast.sync.push import push_weights
from spear_fast.types import Group, Row
from spear_fast.update.old_logp import check_gap, correct_old_logp
from spear_fast.update.optimizer import OptimizerSettings
from spear_fast.update.policy_update import PolicyUpdate
from spear_fast.update.scoring import Scorer, fill_ref_logp
from spear_fast.update.step import Updater


class Trainer:
    """One run: owns the rooms' state (policy, optimizer, replay memory, cursor) and walks them step by step."""

    def __init__(self, config: RunConfig, progress: Progress, *, resume: bool = False) -> None:
        """
        Args:
            config: The resolved configuration.
            progress: Where phases and numbers are shown.
            resume: Continue the run of this name from its newest checkpoint.

        Raises:
            SpearError: The folder, task, model or checkpoint cannot be used.
        """
        self.config = config
        self.progress = progress
        self.tasks = make_tasks(config)
        checkpoint = None
        if resume:
            self.folder = open_existing(config)
            checkpoint = load_latest(self.folder.path)
            policy = load_policy(checkpoint.folder("model"), config, self.tasks)
            self.folder.save_config(config)
        else:
            self.folder = open_new(config)
            policy = start_policy(config, self.tasks, progress)
            policy.save(self.folder.start_model)
        self.finished_steps = 0
        """Training steps done; also the version of the policy's weights."""
        self.stop_requested = False
        self._resumed = resume
        self._assemble(policy)
        if checkpoint is not None:
            self._restore(checkpoint)
        first_step = self.finished_steps + 1 if resume else 0
        self.sinks = open_sinks(self.folder.path, tensorboard=config.log.tensorboard, first_step=first_step)

    def _assemble(self, policy: Policy) -> None:
        config = self.config
        self.policy = policy
        self.engine = make_engine(config, policy)
        self.collector = make_collector(config, self.tasks, policy, self.engine)
        self.prompts = PromptStream(self.tasks, config.seed)
        self.memory = make_memory(config, self.tasks) if config.algo.replay.enabled else None
        self.updater = make_updater(config, policy, self.folder)
        self.update = make_policy_update(config, self.updater)
        self.reference = self._load_reference() if config.algo.loss.kl_coef > 0 else None

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
        while self.finished_steps < self.config.steps and not self.stop_requested:
            self.step()
            if self._is_due(self.config.eval.every):
                evaluation = self.evaluate()
            if self._is_due(self.config.checkpoint.every) or self.stop_requested:
                self.save()
        return evaluation

    def step(self) -> None:
        """One training step."""
        config, step = self.config, self.finished_steps
        metrics = StepMetrics(step + 1)
        tasks = self.prompts.next(config.rollout.prompts_per_step)
        groups = self._roll_out(tasks, step, metrics)
        mu = schedules.intrinsic_weight(config.algo.intrinsic.mode, step, config.algo.intrinsic.decay_steps)
        gamma = schedules.cosine_warmup(step, config.algo.replay.warmup_steps)
        metrics.add({"schedule/mu": mu, "schedule/gamma": gamma if self.memory else 0.0})
        rows = self._rows(groups, mu, metrics)
        replay = self._draw(step, metrics)
        all_taken = self._update(rows, replay, gamma * config.algo.replay.coef, step, metrics)
        self._offer(groups, rows if all_taken else [], metrics)
        self.finished_steps += 1
        metrics.add(self._push())
        self._log(metrics, groups)

    def evaluate(self) -> dict[str, float]:
        """Evaluate on held-out tasks, log and return the statistics."""
        self.progress.phase("evaluation")
        started = time.perf_counter()
        stats, groups = evaluate(self.config, self.tasks, self.collector)
        stats["time/eval_s"] = time.perf_counter() - started
        write_samples(self.folder.path / "eval", self.finished_steps, pick_samples(groups, self.config.log.num_samples))
        self._write(stats)
        return stats

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        self.progress.phase("checkpoint")
        values: dict[str, Any] = {"finished_steps": self.finished_steps, "prompts": self.prompts.state_dict()}
        save(
            self.folder.path,
            self.finished_steps,
            tensors={"optimizer": self.updater.optimizer.state_dict(), "rng": capture_rng()},
            arrays={"replay": self.memory.state_dict()} if self.memory else {},
            values={"trainer": values},
            folders={"model": self.policy.save},
            keep=self.config.checkpoint.keep,
        )

    def close(self) -> None:
        """Close files and free the engine; each is tried, also when another fails."""
        with ExitStack() as stack:
            for close in (self.collector.close, self.engine.close, *(sink.close for sink in self.sinks)):
                stack.callback(close)

    def _roll_out(self, tasks: list[Any], step: int, metrics: StepMetrics) -> list[Group]:
        """Collect the groups of this step; failed trajectories leave them here."""
        self.progress.phase("rollout")
        size = self.config.rollout.group_size
        with metrics.phase("rollout"):
            collection = self.collector.collect(tasks, size, tag=f"train/{step}", first_uid=step * len(tasks) * size)
        groups = collection.groups
        refuse_total_failure(groups)
        metrics.add(rollout_stats(collection))
        failed = [t for group in groups for t in group.trajectories if not t.status.usable]
        if failed:
            self.progress.note(f"{len(failed)} trajectories failed, e.g. {failed[0].status.value}: {failed[0].error}")
        for group in groups:
            group.trajectories = [trajectory for trajectory in group.trajectories if trajectory.status.usable]
        return [group for group in groups if group.trajectories]

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
            gap = correct_old_logp(rows, self.updater.score, mode=mode, tis_clip=update.tis_clip)
            self._check_gap(gap)
            if self.reference is not None:
                fill_ref_logp(rows, self.reference)
            stats = self.update.run(rows, replay, replay_weight, derive_seed(self.config.seed, "update", step))
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
            write_samples(self.folder.path, self.finished_steps, pick_samples(groups, log.num_samples))
        self._write(metrics.values())

    def _write(self, values: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.write(self.finished_steps, values)
        self.progress.step(self.finished_steps, values)

    def _push(self) -> dict[str, float]:
        """Give the engine the policy's weights."""
        model = self.policy.model.model
        return push_weights(
            model.named_parameters(),
            self.engine,
            self.finished_steps,
            dtype=model.dtype,
            bucket_bytes=self.config.engine.bucket_mib << 20,
            verify=False,
        )

    def _is_due(self, every: int) -> bool:
        last = self.finished_steps >= self.config.steps
        return last or (every > 0 and self.finished_steps % every == 0)

    def _load_reference(self) -> Scorer:
        """The policy that the KL term pulls to: the one before the first training step."""
        policy = load_policy(self.folder.start_model, self.config, self.tasks)
        policy.model.model.requires_grad_(False)
        return replace(self.updater.scorer, policy=policy.model)

    def _restore(self, checkpoint: Checkpoint) -> None:
        values = checkpoint.values("trainer")
        self.finished_steps = int(values["finished_steps"])
        self.prompts.load_state_dict(values["prompts"])
        self.updater.optimizer.load_state_dict(checkpoint.tensors("optimizer"))
        if self.memory is not None:
            self.memory.load_state_dict(checkpoint.arrays("replay"))
        restore_rng(checkpoint.tensors("rng"))


def make_updater(config: RunConfig, policy: Policy, folder: RunFolder) -> Updater:
    """Return the updater that the configuration describes."""
    update = config.update
    settings = OptimizerSettings(
        lr=update.lr,
        warmup_steps=update.warmup_steps,
        betas=update.betas,
        weight_decay=update.weight_decay,
        grad_clip=update.grad_clip,
    )
    return Updater(
        policy.model,
        settings,
        token_budget=update.token_budget,
        temperature=config.rollout.temperature,
        head_chunk_bytes=update.head_chunk_bytes,
        dump_folder=folder.nonfinite,
    )


def make_memory(config: RunConfig, tasks: TaskSet) -> ReplayMemory:
    """Return the replay memory that the configuration describes."""
    replay = config.algo.replay
    return ReplayMemory(
        buffer_size=replay.buffer_size,
        baseline_size=replay.baseline_size,
        tolerate_steps=replay.tolerate_steps,
        ripe_factor=replay.ripe_factor,
        require_tool_call=replay.require_tool_call and bool(tasks.tools),
        recalibrate=replay.recalibrate,
        decay_weight=replay.decay_weight,
        std_norm=config.algo.advantage.std_norm,
    )


def make_policy_update(config: RunConfig, updater: Updater) -> PolicyUpdate:
    """Return the update that the configuration describes."""
    replay = config.algo.replay
    terms = on_policy_terms(**config.algo.loss.model_dump(exclude={"stats"}), max_tokens=config.rollout.max_tokens)
    return PolicyUpdate(
        updater=updater,
        on_policy=terms,
        replayed=replay_terms(
            terms, cov_ratio=replay.cov_ratio, cov_lower=replay.cov_lower, cov_upper=replay.cov_upper
        ),
        stats=config.algo.loss.stats,
        mode=replay.mode,
        mini_batch_size=config.update.mini_batch_size,
        epochs=config.update.epochs,
    )
