"""`spear-fast sft`: a run that only imitates demonstrations, with its own metrics, checkpoints and model folder."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import torch

from spear_fast.assemble import close_tasks, load_policy, make_tasks, make_trainable
from spear_fast.checkpoint.load import Checkpoint, load_latest
from spear_fast.checkpoint.save import save
from spear_fast.checkpoint.tensors import load_tensors, save_tensors
from spear_fast.cold_start import demo_rows, load_demos, untaught_policy
from spear_fast.config.schema import RunConfig
from spear_fast.dist import start_ranks
from spear_fast.envs.splits import unit_hash
from spear_fast.errors import CheckpointError, ConfigError
from spear_fast.imitation import Imitation
from spear_fast.log.metrics import StepMetrics
from spear_fast.log.progress import Progress
from spear_fast.log.sinks import open_sinks
from spear_fast.memory.readings import readings, reset_peaks
from spear_fast.rollout.demo_file import read_demos
from spear_fast.rollout.demos import Messages
from spear_fast.run_folder import open_existing, open_new
from spear_fast.update.state import set_steps, training_tensors

LOGGED = ("entropy_nats", "action_tokens", "grad_norm", "lr", "micro_batches", "skipped_steps")
"""Metrics of an update that mean something without a sampler."""


class Sft:
    """One supervised run: owns policy and optimizer. Under torchrun there is one per rank; the main one writes files.

    The run's folder is that of training: config.yaml, metrics.jsonl, checkpoints. At its end it holds `model/`, a
    Hugging Face folder with the tokenizer.
    """

    def __init__(self, config: RunConfig, progress: Progress, *, resume: bool = False) -> None:
        """
        Args:
            config: The resolved configuration; `cold_start` describes the run.
            progress: Where phases and numbers are shown.
            resume: Continue the run of this name from its newest checkpoint.

        Raises:
            SpearError: The folder, task, demonstrations, model, checkpoint or number of ranks cannot be used.
        """
        if not config.cold_start.steps:
            raise ConfigError("cold_start.steps=0: a supervised run needs optimizer steps; set it to 1 or more")
        self.config = config
        self.progress = progress
        self.stop_requested = False
        self.sinks = []
        self._resumed = resume
        self._owned = ExitStack()
        """Closes what was opened, the last first; each is tried, also when another fails."""
        self.tasks = make_tasks(config)
        self._owned.callback(close_tasks, self.tasks)
        try:
            self.ranks = start_ranks(config.device, config.parallel, shard=config.needs_sharding)
            self._owned.callback(self.ranks.close)
            self._assemble(self._open(resume))
            if self.ranks.is_main:
                first_step = self.finished_steps + 1 if resume else 0
                self.sinks = open_sinks(self.folder.path, tensorboard=config.log.tensorboard, first_step=first_step)
        except BaseException:
            self.close()
            raise

    @property
    def finished_steps(self) -> int:
        """Optimizer steps done."""
        return self.imitation.finished_steps

    @property
    def model_folder(self) -> Path:
        """Where the result is written."""
        return self.folder.path / "model"

    def run(self) -> None:
        """Train until `cold_start.steps` or until `stop_requested`, measuring and saving on the way."""
        if not self._resumed:
            self._measure()
            self._save()
        stop = False
        while self.finished_steps < self.config.cold_start.steps and not stop:
            self._step()
            # A signal reaches the ranks at different moments; they must stop after the same step.
            stop = self.ranks.any(self.stop_requested)
            if self._is_due(self.config.eval.every):
                self._measure()
            if self._is_due(self.config.checkpoint.every) or stop:
                self._save()
        self.stop_requested = stop and self.finished_steps < self.config.cold_start.steps
        if not self.stop_requested:
            self._write_model()

    def write(self, values: dict[str, float]) -> None:
        """Log numbers under the present step."""
        for sink in self.sinks:
            sink.write(self.finished_steps, values)
        self.progress.step(self.finished_steps, values)

    def close(self) -> None:
        """Close files, leave the other ranks and free the task set; each is tried, also when another fails."""
        for sink in self.sinks:
            self._owned.callback(sink.close)
        self._owned.close()

    def _open(self, resume: bool) -> Checkpoint | None:
        """Open the run's folder; return the checkpoint to go on with."""
        if not resume:
            self.folder = self.ranks.on_main(lambda: open_new(self.config))
            return None
        self.folder = self.ranks.on_main(lambda: open_existing(self.config))
        self.ranks.on_main(lambda: self.folder.save_config(self.config))
        return load_latest(self.folder.path)

    def _assemble(self, checkpoint: Checkpoint | None) -> None:
        """Make the policy and its rows, or, of a run that is resumed, restore them."""
        config = self.config
        self.progress.phase("demonstrations")
        demos, held_out = self._demos()
        self._digest = _digest([demos, held_out])
        built = config.model.path is None
        if checkpoint is not None and built:
            self.policy = load_policy(self.folder.start_model, config, self.tasks)
            make_trainable(self.policy, config, self.ranks)
        else:
            self.policy = untaught_policy(config, self.tasks, demos, self.ranks)
        if checkpoint is None and built:
            self.policy.save(self.folder.start_model, self.ranks)
        self.num_demos = len(demos)
        self._held_out = demo_rows(held_out, self.policy, config)
        rows = demo_rows(demos, self.policy, config)
        self.imitation = Imitation(self.policy.model, rows, config, self.folder.nonfinite)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _demos(self) -> tuple[list[Messages], list[Messages]]:
        """Demonstrations to learn from, and those for the held-out loss."""
        demos, cold = load_demos(self.config, self.tasks), self.config.cold_start
        if cold.eval_file is not None:
            return demos, read_demos(Path(cold.eval_file), self.tasks.tools)
        return split_demos(demos, cold.eval_fraction)

    def _step(self) -> None:
        metrics = StepMetrics(self.finished_steps + 1)
        reset_peaks(self.ranks.device)
        self.progress.phase("update")
        with metrics.phase("update"):
            stats = self.imitation.step()
        seconds = metrics.values()["time/update_s"]
        metrics.add(
            {
                "sft/loss_nats": stats["update/loss"],
                "sft/tokens_per_s": stats["update/tokens"] / seconds,
                "sft/epochs": self.finished_steps * self.config.cold_start.batch_size / self.num_demos,
            }
        )
        metrics.add({f"update/{name}": stats[f"update/{name}"] for name in LOGGED if f"update/{name}" in stats})
        metrics.add(readings(self.ranks.device))
        self.write(metrics.values())

    def _measure(self) -> None:
        """Log the held-out loss, if anything is held out."""
        if self._held_out:
            self.progress.phase("evaluation")
            self.write({"sft/eval_loss_nats": self.imitation.loss(self._held_out)})

    def _is_due(self, every: int) -> bool:
        last = self.finished_steps >= self.config.cold_start.steps
        return last or (every > 0 and self.finished_steps % every == 0)

    def _save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        self.progress.phase("checkpoint")
        optimizer, dtype = self.imitation.updater.optimizer, getattr(torch, self.config.model.dtype)
        values = {
            "finished_steps": self.finished_steps,
            "optimizer_steps": optimizer.num_steps,
            "demonstrations": self._digest,
        }
        save(
            self.folder.path,
            self.finished_steps,
            values={"sft": values},
            folders={
                "model": lambda folder: self.policy.save(folder, self.ranks, dtype),
                "training": lambda folder: save_tensors(
                    folder, training_tensors(self.policy.model, optimizer), self.ranks
                ),
            },
            keep=self.config.checkpoint.keep,
            ranks=self.ranks,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        values = checkpoint.values("sft")
        if values["demonstrations"] != self._digest:
            raise CheckpointError(
                f"--resume: the demonstrations are not those that {self.folder.path} began with; bring back "
                "cold_start.demos_file and eval_file as they were, or start a new run under another name"
            )
        optimizer = self.imitation.updater.optimizer
        load_tensors(checkpoint.folder("training"), training_tensors(self.policy.model, optimizer), self.ranks)
        set_steps(optimizer, int(values["optimizer_steps"]))
        self.imitation.skip(int(values["finished_steps"]))

    def _write_model(self) -> None:
        """Write the result, in place of one that an earlier end of this run left."""
        aside = self.model_folder.with_name("model.new")

        def put_in_place() -> None:
            shutil.rmtree(self.model_folder, ignore_errors=True)
            aside.rename(self.model_folder)

        self.policy.save(aside, self.ranks, getattr(torch, self.config.model.dtype))
        self.ranks.on_main(put_in_place)


def split_demos(demos: list[Messages], share: float) -> tuple[list[Messages], list[Messages]]:
    """Return demonstrations to learn from and about `share` of them to hold out, each at least one; 0 holds out none.

    Equal ones stay on one side, and one that is held out under one share is under every greater one.

    Raises:
        ConfigError: All are equal.
    """
    if not share:
        return demos, []
    places = [unit_hash(json.dumps(demo)) for demo in demos]
    distinct = sorted(set(places))
    if len(distinct) < 2:
        raise ConfigError(
            f"cold_start.eval_fraction={share}: there are not two different demonstrations, so none can be held out; "
            "give more, or set it to 0"
        )
    wanted = max(1, round(share * len(demos)))
    limit = min(sorted(places)[wanted - 1], distinct[-2])
    return (
        [demo for demo, place in zip(demos, places, strict=True) if place > limit],
        [demo for demo, place in zip(demos, places, strict=True) if place <= limit],
    )


def _digest(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()
