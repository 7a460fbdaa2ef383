"""This project's trainer on a frozen batch: updater and policy update as a run makes them from its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

from bench.updates.job import Clock, Gradients, Job, Phases, copied, timed
from spear_fast.assemble import Policy, spread
from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.dist import start_ranks
from spear_fast.learner import make_policy_update, make_updater
from spear_fast.run_folder import RunFolder
from spear_fast.update.model import PackedModel, load_model

SEED = 0
"""Of the covariance draws, which no shared loss makes."""


class OurTrainer:
    """A policy with its updater, put together as `spear-fast train` does."""

    def __init__(self, job: Job) -> None:
        """Load the weights and put them where they are trained."""
        config = configuration(job)
        self._job = job
        self._rows = job.frozen.rows()
        if not job.loss.kl_coef:
            for row in self._rows:
                row.ref_logp = None
        self._ranks = start_ranks(job.device, config.parallel, shard=config.needs_sharding)
        try:
            model = load_model(str(job.folder), None if config.needs_sharding else torch.float32)
            # It reads and writes no messages.
            policy = Policy(PackedModel(model), cast(Any, None))
            spread(policy, config, self._ranks)
            self._model = policy.model.model
            self._updater = make_updater(config, policy, RunFolder(Path(config.out)))
            self._updater.dump_folder = None
            self._update = make_policy_update(config, self._updater)
        except BaseException:
            self._ranks.close()
            raise
        self.settings: dict[str, Any] = {
            "token_budget": config.update.token_budget,
            "share_prompts": config.update.share_prompts,
            "attention": policy.model.attention,
        }
        self._clock = Clock(job.device)
        self._found: dict[str, torch.Tensor] | None = None
        optimizer = self._updater.optimizer.torch_optimizer
        optimizer.register_step_pre_hook(lambda *_: self._clock.mark("gradients"))
        optimizer.register_step_post_hook(lambda *_: self._clock.mark("optimizer"))

    def steps(self, count: int) -> list[Phases]:
        """See `job.Trainer`."""
        taken = []
        for _ in range(count):
            self._clock.start()
            self._step()
            taken.append(self._clock.stop())
        return taken

    def gradients(self) -> Gradients:
        """See `job.Trainer`."""
        found: dict[str, torch.Tensor] = {}
        hook = self._updater.optimizer.torch_optimizer.register_step_pre_hook(
            lambda *_: found.update(copied(self._model))
        )
        loss = self._step()["update/loss"]
        hook.remove()
        return Gradients(loss, found)

    def score(self) -> float:
        """See `job.Trainer`."""
        return timed(lambda: self._updater.score(self._rows), self._job.device)

    def close(self) -> None:
        """See `job.Trainer`."""
        self._ranks.close()

    def _step(self) -> dict[str, float]:
        stats = self._update.run(self._rows, [], 0.0, SEED)
        if stats["update/skipped_steps"]:
            raise ArithmeticError(f"the step was skipped: {json.dumps(stats)}")
        return stats


def configuration(job: Job) -> RunConfig:
    """The configuration of a run whose update is the job's."""
    frozen = job.frozen
    longest = int(frozen.lengths.max())
    base = {
        "name": "frozen",
        "out": str(job.folder),
        "steps": 1,
        "device": job.device,
        "task": {"name": "calculator"},
        "model": {"path": str(job.folder), "dtype": job.dtype},
        "rollout": {"max_tokens": longest, "max_turn_tokens": longest, "temperature": frozen.temperature},
        "algo": {"loss": job.loss.ours_of(frozen.longest_completion)},
        "update": {"lr": job.lr, "grad_clip": job.grad_clip, "token_budget": max(8192, longest)},
    }
    return load_config(None, (), base)
