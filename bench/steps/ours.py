"""This project's trainer in the step benchmark: `Trainer.step` as a run takes it, tokens forced and phases timed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from bench.steps.contender import CLIP, LEARNING_RATE, Opening, StepReport, Turn, device_of, script_of
from bench.steps.phases import PhaseClock
from bench.steps.workloads import Script, TrainedRow
from spear_fast.assemble import push_policy
from spear_fast.config.load import load_config
from spear_fast.config.schema import RunConfig
from spear_fast.log.progress import Progress
from spear_fast.rollout import hf_engine
from spear_fast.rollout.engine import Completion, GenerationRequest
from spear_fast.trainer import Trainer
from spear_fast.types import Row

SAMPLE = hf_engine.sample


def run_ours(opening: Opening, turn: Turn, folder: Path) -> None:
    """Train on the opening's workload step by step; see `contender.run`."""
    script = script_of(opening)
    config = configure(opening, script, folder)
    trainer = Trainer(config, Progress(config.steps, config.name))
    try:
        clock, forcing = PhaseClock(device_of(opening)), Forcing(trainer, script)
        rows = _Rows(trainer, script.workload.samples)
        _time_phases(trainer, clock)
        push_policy(config, trainer.policy, trainer.engine, 0, verify=True)
        report = None
        while turn(report):
            forcing.restart()
            clock.restart()
            trainer.step()
            seconds = clock.stop()
            report = StepReport.of(rows.trained(), seconds, clock.seconds, forcing.seconds)
    finally:
        trainer.close()
        hf_engine.sample = SAMPLE


def configure(opening: Opening, script: Script, folder: Path) -> RunConfig:
    """A run's configuration with this workload; what it does not name is the default of the production path."""
    workload, longest = script.workload, script.longest()
    # vLLM's log-probs are those of other tokens; see `Forcing.generate_as_long`.
    gap = {"max_logp_gap": 1e3} if opening.engine == "vllm" else {}
    base = {
        "name": "step",
        "out": str(folder),
        "steps": 1_000_000,
        "device": opening.device,
        "task": {
            "name": "bench.steps.tasks:ScriptTasks",
            "params": {"size": opening.size, "workload": opening.workload, "model": opening.model},
        },
        "model": {"path": opening.model, "dtype": opening.dtype},
        "engine": {"name": opening.engine},
        "rollout": {
            "prompts_per_step": workload.prompts,
            "group_size": workload.samples,
            "max_turns": script.most_turns,
            "max_turn_tokens": script.longest_message,
            "max_tokens": longest,
            "max_concurrent": workload.trajectories,
        },
        "algo": {"preset": "grpo", "loss": {"clip_low": CLIP, "clip_high": CLIP, "aggregation": "token-mean"}},
        "update": {"lr": LEARNING_RATE, "token_budget": max(8192, longest), **gap},
        "checkpoint": {"every": 0},
        "log": {"progress": "off", "tensorboard": False, "sample_every": 0},
    }
    return load_config(None, base=base)


class Forcing:
    """Puts the drawn tokens in place of those that the engine has sampled."""

    def __init__(self, trainer: Trainer, script: Script) -> None:
        chat = trainer.policy.chat
        self._prompts = {tuple(chat.prompt(messages)): index for index, messages in enumerate(script.prompts)}
        self._turns, self._samples = script.turns, script.workload.samples
        self._engine, self._generate = trainer.engine, trainer.engine.generate
        if isinstance(trainer.engine, hf_engine.HFEngine):
            hf_engine.sample = self.sample
            trainer.engine.generate = self.generate  # type: ignore[method-assign]
        else:
            trainer.engine.generate = self.generate_as_long  # type: ignore[method-assign]
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self.seconds = 0.0
        self._messages: dict[int, list[list[int]]] = {}
        self._spoken: Counter[int] = Counter()

    async def generate(self, request: GenerationRequest) -> Completion:
        """Note which trajectory the request belongs to, then hand it on to the hf engine."""
        started = time.perf_counter()
        self._note(request)
        self.seconds += time.perf_counter() - started
        return await self._generate(request)

    def sample(
        self, logits: torch.Tensor, temperatures: torch.Tensor, draws: torch.Tensor, top_p: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample as the hf engine does, then return the drawn tokens and their log-probs under the same logits.

        The log-prob follows from that of the sampled token and the difference of both logits: two look-ups a row.
        """
        tokens, logps = SAMPLE(logits, temperatures, draws, top_p)
        started = time.perf_counter()
        # The engine samples for the last of its running requests, those that have just been computed.
        batch = cast(hf_engine.HFEngine, self._engine)._running[-len(tokens) :]
        wanted = [self._message(one.request.uid)[len(one.sampled)] for one in batch]
        forced = torch.tensor(wanted, device=tokens.device)
        both = logits.gather(1, torch.stack([forced, tokens], 1)).float()
        logps = logps + both[:, 0] - both[:, 1]
        self.seconds += time.perf_counter() - started
        return forced, logps

    async def generate_as_long(self, request: GenerationRequest) -> Completion:
        """Let vLLM sample as many tokens as the drawn message has, and return those of the message.

        Their log-probs are those of what was sampled, and the next prompt is not what vLLM has cached: as in TRL's row.
        """
        self._note(request)
        message = self._message(request.uid)
        completion = await self._generate(replace(request, max_tokens=len(message), stop_ids=()))
        return replace(completion, tokens=list(message), finish="stop")

    def _note(self, request: GenerationRequest) -> None:
        if request.uid not in self._messages:
            group = self._turns[self._prompts[tuple(request.prompt)]]
            self._messages[request.uid] = group[request.uid % self._samples]
        else:
            self._spoken[request.uid] += 1

    def _message(self, uid: int) -> list[int]:
        return self._messages[uid][self._spoken[uid]]


class _Rows:
    """Remembers what the last step trained on."""

    def __init__(self, trainer: Trainer, samples: int) -> None:
        self._samples = samples
        self._tasks: dict[int, int] = {}
        self._taken: Sequence[Row] = ()
        roll_out, update = trainer._roll_out, trainer._update

        def rolled_out(*arguments: Any) -> Any:
            groups = roll_out(*arguments)
            self._tasks = {t.uid: group.task.index for group in groups for t in group.trajectories}
            return groups

        def updated(rows: list[Row], *arguments: Any) -> bool:
            self._taken = rows
            if not update(rows, *arguments):
                raise ArithmeticError("the step was skipped")
            return True

        trainer._roll_out, trainer._update = rolled_out, updated  # type: ignore[method-assign]

    def trained(self) -> list[TrainedRow]:
        """Its rows by prompt and sample."""
        return [
            TrainedRow(
                self._tasks[row.uid],
                row.uid % self._samples,
                row.tokens.tolist(),
                row.action_mask.tolist(),
                float(row.advantages[row.action_mask][0]),
            )
            for row in self._taken
        ]


def _time_phases(trainer: Trainer, clock: PhaseClock) -> None:
    engine = trainer.engine
    if isinstance(engine, hf_engine.HFEngine):
        clock.wrap(engine, "_admit", "generation")
        clock.wrap(engine, "_decode", "generation")
        clock.wrap(trainer.collector, "collect_step", "tools")
    else:
        # It samples beside the trainer, so that there is no time which is the tools' alone.
        clock.wrap(trainer.collector, "collect_step", "generation")
    clock.wrap(trainer.updater, "score", "scoring")
    clock.wrap(trainer, "_update", "update")
    clock.wrap(trainer, "_push", "sync")
