"""Self-imitation inside a TRL trainer: when to draw from the replay memory, and backward passes on what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from spear_fast.batching.minibatches import split
from spear_fast.replay import ReplayMemory
from spear_fast.schedules import cosine_warmup
from spear_fast.seeds import derive_seed
from spear_fast.types import Group, Row
from spear_kernels import PolicyLossConfig

from .batches import replay_batches
from .loss import joined, micro_batch_loss, plan_step

if TYPE_CHECKING:
    from .config import SPEARConfig
    from .trainer import SPEARTrainer

Stats = dict[str, float]


class Imitation:
    """The replay of one trainer. All ranks make the same calls and draw the same rows, of which each takes a share.

    "joint" draws when a round begins and adds gamma * coef * L_SIL to its optimizer steps, which share the rows;
    "separate_step" draws after the round's updates and takes optimizer steps of its own, of as many rows as the
    others have, at the learning rate of that moment; they count neither as steps of TRL nor of its schedule. Either
    way the memory then holds trajectories of earlier rounds only.
    """

    def __init__(self, trainer: SPEARTrainer, args: SPEARConfig, cfg: PolicyLossConfig) -> None:
        self.trainer, self.args, self.cfg = trainer, args, cfg
        recalibrate: Any = args.replay_recalibrate
        self.memory = ReplayMemory(
            buffer_size=args.replay_buffer_size,
            baseline_size=args.replay_baseline_size,
            tolerate_steps=args.replay_tolerate_steps,
            ripe_factor=args.replay_ripe_factor,
            require_tool_call=args.replay_require_tool_call,
            recalibrate=recalibrate,
            decay_weight=args.replay_decay_weight,
            std_norm=args.scale_rewards != "none",
        )
        self._round = 0
        self._drawn: list[Row] = []
        self._before_draw: dict[str, np.ndarray] | None = None
        """The memory when a joint round began, until that round ends."""

    def begin_round(self, round_index: int) -> Stats:
        """Draw for a joint round; return the statistics of the draw and the schedule."""
        self._round = round_index
        stats = {"schedule/gamma": cosine_warmup(round_index, self.args.replay_warmup_steps)}
        if self.args.replay_mode != "joint":
            return stats
        self._before_draw = self.memory.state_dict()
        return stats | self._draw()

    def end_round(self, round_index: int, groups: list[Group], rows: list[Row]) -> Stats:
        """Take the separate steps, then the round's own trajectories into the memory."""
        stats = self.separate_steps(round_index)
        self._before_draw = None
        return stats | self.memory.offer(groups, rows)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The memory to resume from: inside a round, which is then made again, that before its draw."""
        return self.memory.state_dict() if self._before_draw is None else self._before_draw

    def join(self, model: Any, update: int, num_updates: int) -> Stats:
        """Add the gradient of this optimizer step's share of a joint draw; a later backward pass reduces it."""
        if self.args.replay_mode != "joint" or not self._drawn or self._weight == 0.0:
            return {}
        order = np.random.default_rng(derive_seed(self.args.seed, "share", self._round)).permutation(len(self._drawn))
        share = np.array_split(order, num_updates)[update]
        return self._backward(model, [self._drawn[i] for i in share], update, reduce=False) if len(share) else {}

    def separate_steps(self, round_index: int) -> Stats:
        """Draw after a round and take optimizer steps on what was drawn; return means over them."""
        if self.args.replay_mode != "separate_step":
            return {}
        self._round = round_index
        stats = self._draw()
        if not self._drawn or self._weight == 0.0:
            return stats
        trainer, args = self.trainer, self.args
        model: Any = trainer.model_wrapped
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
        results = []
        for index, part in enumerate(split(len(self._drawn), size, derive_seed(args.seed, "split", round_index))):
            values = self._backward(model, [self._drawn[i] for i in part], index, reduce=True)
            if args.max_grad_norm > 0:
                norm: Any = trainer._clip_grad_norm(model)
                values["sil/grad_norm"] = float(norm)
            trainer.optimizer.step()  # pyright: ignore[reportOptionalMemberAccess]
            model.zero_grad()
            results.append(values)
        means = {name: float(np.mean([values[name] for values in results])) for name in results[0]}
        return stats | means | {"sil/optimizer_steps": float(len(results))}

    @property
    def _weight(self) -> float:
        return cosine_warmup(self._round, self.args.replay_warmup_steps) * self.args.replay_coef

    def _draw(self) -> Stats:
        rows, stats = self.memory.draw(self._round, derive_seed(self.args.seed, "replay", self._round))
        self._drawn = rows or []
        # The size after the round's trajectories were taken in is the one to log.
        return {name: value for name, value in stats.items() if name != "replay/size"}

    def _backward(self, model: Any, rows: Sequence[Row], index: int, *, reduce: bool) -> Stats:
        """Add the gradient of weight * L_SIL of one optimizer step's rows, in micro-batches; return `sil/` metrics."""
        trainer, accelerator = self.trainer, self.trainer.accelerator
        # Rows of about one length share a micro-batch.
        ordered = sorted(rows, key=lambda row: row.num_tokens)
        batches = replay_batches(
            ordered,
            self.args.per_device_train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            trainer._tokenizer.pad_token_id,
            accelerator.device,
        )
        seed = derive_seed(self.args.seed, "sil", self._round, index)
        plan = plan_step(model, batches, self.cfg, self.args.cov_stats, accelerator, self.args.temperature, seed)
        parts = []
        for place, batch in enumerate(batches):
            reduced = reduce and place == len(batches) - 1
            with nullcontext() if reduced else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss, metrics, _ = micro_batch_loss(model, batch, plan, place)
                accelerator.backward(self._weight * loss)
            parts.append(metrics)
        values = joined(parts, plan, accelerator)
        return {f"sil/{name}": value for name, value in values.items()} | {"sil/weight": self._weight}
