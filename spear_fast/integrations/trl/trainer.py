"""SPEARTrainer: TRL's GRPOTrainer with SPEAR's rewards, filters, token losses and self-imitation."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from spear_fast.errors import ConfigError
from spear_fast.losses import keep_top_groups, mark_filtered
from spear_fast.rewards import score
from spear_fast.schedules import intrinsic_weight
from spear_fast.seeds import derive_seed
from spear_fast.types import Group, Task, Trajectory

from .batches import TokenBatch, from_inputs, to_rows
from .config import SPEARConfig
from .logprob import LogProbMixin, loss_mask
from .loss import ExtraTerms, Metrics, StepPlan, joined, micro_batch_loss, plan_step
from .replay import Imitation
from .rollouts import ToolWatch, number, set_outcomes, trajectories_of
from .state import load_state, save_state

REWARD_NAME = "spear_tool_reward"
"""Name of the intrinsic reward among TRL's reward functions: mu * R_tool, with weight 1."""
_TRL_NAMES = {
    "entropy": "entropy",
    "kl_ref": "kl",
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
}
"""Metrics of the loss that TRL reports under names of its own."""


class SPEARTrainer(LogProbMixin, GRPOTrainer):
    """GRPOTrainer that learns with SPEAR (arXiv 2509.22601); the same arguments, `args` a SPEARConfig.

    A round is one generation batch with all updates on it. In each round, rewards get mu(round) * R_tool, repetitive
    and unreadable completions and the groups of least spread leave the loss, the policy loss is taken over optimizer
    steps whose averages and covariance draws do not depend on micro-batches or ranks, and good trajectories are
    replayed later with A~ = R - median. Evaluation is TRL's.

    Every rank holds the same replay memory; batches, losses and gradients are each rank's own share. The memory, the
    round and with them the schedules are saved with TRL's checkpoints and restored by `resume_from_checkpoint`. A
    checkpoint inside a round loses that round's completions, as TRL's do; the round is made again with the same draw.

    Dr.BoT's filter of incomplete trajectories is absent: TRL does not say whether an answer was given. Leave such
    completions to `mask_truncated_completions` and to the reward.

    A `rollout_func` may return, beside TRL's `env_mask`, `num_tool_calls` and `num_valid_tool_calls`, one int per
    completion; otherwise every stretch that `env_mask` marks as not the model's counts as one valid call.

    Raises:
        ConfigError: `args` is no SPEARConfig, or does not fit the model or the tools.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: SPEARConfig | None = None, *others: Any, **named: Any
    ) -> None:
        if not isinstance(args, SPEARConfig):
            raise ConfigError(f"args={type(args).__name__} must be a SPEARConfig; its fields are GRPOConfig's and more")
        super().__init__(model, reward_funcs, args, *others, **named)
        self._check(args)
        self.spear = args
        self._finished_rounds = 0
        self._local: list[Trajectory] = []
        self._groups: list[Group] = []
        self._plan: StepPlan | None = None
        self._batches: list[TokenBatch] = []
        self._parts: list[Metrics] = []
        self._recorded: torch.Tensor | None = None
        self._on_policy, replayed = args.loss_terms()
        self._imitation = None if args.replay_mode == "off" else Imitation(self, args, replayed)
        if args.intrinsic_mode != "none":
            self._add_tool_reward()
        self.add_callback(_StepEnd(self))

    def _check(self, args: SPEARConfig) -> None:
        _check_tools(args, bool(self.tools or self.rollout_func or self.environment_factories))
        if self.is_deepspeed_enabled and args.replay_mode != "off":
            raise ConfigError(
                f"replay_mode={args.replay_mode!r} takes backward passes that DeepSpeed's engine would count as its "
                "own; use DDP, or set replay_mode='off'"
            )
        if self._is_vlm and (args.policy_loss != "trl" or args.replay_mode != "off"):
            raise ConfigError(
                f"policy_loss={args.policy_loss!r}, replay_mode={args.replay_mode!r}: images are not handed to SPEAR's "
                "losses; set policy_loss='trl' and replay_mode='off', or train with LogProbMixin and GRPOTrainer"
            )

    def _add_tool_reward(self) -> None:
        """Append a column to TRL's rewards; `_calculate_rewards` fills it, since it may depend on the others."""
        # New lists: the old ones may be the caller's.
        self.reward_funcs = [*self.reward_funcs, _not_scored]
        self.reward_func_names = [*self.reward_func_names, REWARD_NAME]
        self.reward_processing_classes = [*self.reward_processing_classes, None]
        self.reward_weights = torch.cat([self.reward_weights, torch.ones(1)])

    @property
    def _in_training(self) -> bool:
        return self.model.training

    def _generate(self, prompts: list[Any], *args: Any, **kwargs: Any) -> Any:
        watch = None
        if self.tools:
            watch = ToolWatch(len(prompts))
            watch.wrap(self._sync_tool_dicts)
            watch.wrap(self._async_tool_dicts)
        result = super()._generate(prompts, *args, **kwargs)
        _, completion_ids, tool_mask, completions, _, extra, *_ = result
        if self._in_training:
            decode = self._tokenizer.decode
            self._local = trajectories_of(completion_ids, tool_mask, completions, extra, watch, decode)
        return result

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        """TRL's rewards [all ranks' rows, functions], the column of the intrinsic reward filled."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        column = self.reward_func_names.index(REWARD_NAME) if REWARD_NAME in self.reward_func_names else None
        others = [index for index in range(rewards.shape[1]) if index != column]
        outcome = (rewards * self.reward_weights.to(rewards.device))[:, others]
        scored = ~outcome.isnan().all(1)
        if not self._in_training:
            if column is not None:
                rewards[:, column] = torch.where(scored, 0.0, torch.nan)
            return rewards
        self._score(outcome.nansum(1).tolist(), scored.tolist())
        if column is not None:
            mu = self._mu()
            values = [mu * member.intrinsic_reward for group in self._groups for member in group.trajectories]
            filled = torch.tensor(values, dtype=rewards.dtype, device=rewards.device)
            rewards[:, column] = torch.where(scored, filled, torch.nan)
        return rewards

    def _score(self, outcomes: list[float], scored: list[bool]) -> None:
        """Make the round's groups of all ranks' trajectories and set their total rewards."""
        spear = self.spear
        # Filters look at tokens, which therefore need not travel.
        local = Group(0, Task("trl", "train", 0, seed=0), self._local)
        mark_filtered(
            [local],
            overlong=False,
            incomplete=False,
            repetitive=spear.filter_repetitive,
            unreadable=spear.filter_unreadable,
            ngram=spear.repetition_ngram,
            max_repeats=spear.repetition_max_repeats,
        )
        for trajectory in self._local:
            trajectory.tokens, trajectory.action_mask = [], []
        trajectories = gather_object(self._local)
        number(trajectories, self._finished_rounds, self.num_generations)
        set_outcomes(trajectories, [value if ok else None for value, ok in zip(outcomes, scored, strict=True)])
        size = self.num_generations
        self._groups = [
            Group(members[0].group_id, members[0].task, members)
            for members in (trajectories[start : start + size] for start in range(0, len(trajectories), size))
        ]
        stats = score(
            self._groups,
            mu=self._mu(),
            variant=spear.intrinsic_variant,  # pyright: ignore[reportArgumentType]
            count=spear.intrinsic_count,  # pyright: ignore[reportArgumentType]
            per_call=spear.intrinsic_per_call,
        )
        self._report({name: value for name, value in stats.items() if name != "reward/success_rate"})

    def _mu(self) -> float:
        mode: Any = self.spear.intrinsic_mode
        return intrinsic_weight(mode, self._finished_rounds, self.spear.intrinsic_decay_steps)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch; in training its `tool_mask` leaves out what the filters drop, and `spear_uid` names the rows."""
        output = super()._generate_and_score_completions(inputs)
        if not self._in_training:
            return output
        if self._imitation is not None:
            self._report(self._imitation.begin_round(self._finished_rounds))
        keep, uids = self._kept()
        rank, count = self.accelerator.process_index, len(output["completion_ids"])
        own = slice(rank * count, (rank + 1) * count)
        mask = output["completion_mask"]
        kept = torch.tensor(keep[own], device=mask.device)[:, None].to(mask.dtype)
        output["tool_mask"] = output.get("tool_mask", torch.ones_like(mask)) * kept
        output["spear_uid"] = torch.tensor(uids[own], device=mask.device)
        output["num_items_in_batch"] = self.accelerator.gather(loss_mask(output).sum()).sum()
        return output

    def _kept(self) -> tuple[list[bool], list[int]]:
        """Of all ranks' rows in order: whether each enters the loss, and its uid."""
        members = [member for group in self._groups for member in group.trajectories]
        usable = [
            Group(group.group_id, group.task, [member for member in group.trajectories if member.status.usable])
            for group in self._groups
        ]
        kept, stats = keep_top_groups([group for group in usable if group.trajectories], self.spear.keep_groups)
        stats |= {
            f"filter/{reason}_frac": sum(member.filtered == reason for member in members) / len(members)
            for reason in ("repetitive", "unreadable")
        }
        self._report(stats)
        groups = {group.group_id for group in kept}
        keep = [m.group_id in groups and m.filtered is None and m.status.usable for m in members]
        return keep, [member.uid for member in members]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self._in_training:
            return super()._compute_loss(model, inputs)
        accumulation = self.args.gradient_accumulation_steps
        place = self._step % accumulation
        if place == accumulation - 1 and self._imitation is not None:
            # Before this micro-batch, whose backward pass adds up what the others left and reduces it over ranks.
            updates = self.args.steps_per_generation // accumulation * self.num_iterations
            self._report(self._imitation.join(model, (self._step // accumulation) % updates, updates))
        if self.spear.policy_loss == "trl":
            loss = super()._compute_loss(model, inputs)
            inputs.setdefault("old_per_token_logps", self._recorded)
            self._recorded = None
            return loss
        if place == 0:
            self._begin_step(model)
        return self._policy_loss(model, inputs, place)

    def _begin_step(self, model: Any) -> None:
        """Plan the optimizer step from all its micro-batches."""
        accumulation, per_round = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        start = self._step % per_round
        window = self._buffered_inputs[start : start + accumulation]
        self._batches, self._parts = [from_inputs(inputs) for inputs in window], []
        place_in_round = self._step % (per_round * self.num_iterations)
        # What TRL computed after generating is of the present weights until the first optimizer step.
        fresh = place_in_round == 0
        known = [batch.old_logp for batch in self._batches if batch.old_logp is not None] if fresh else []
        self._plan = plan_step(
            model,
            self._batches,
            self._on_policy,
            self.spear.cov_stats,
            self.accelerator,
            self.temperature,
            derive_seed(self.args.seed, "on-policy", self._finished_rounds, place_in_round // accumulation),
            known if len(known) == len(window) else None,
        )

    def _policy_loss(self, model: Any, inputs: dict[str, Any], place: int) -> torch.Tensor:
        """The loss of one micro-batch, scaled as TRL's: gradients add up over micro-batches and average over ranks."""
        assert self._plan is not None
        batch, accumulation = self._batches[place], self.args.gradient_accumulation_steps
        aux = self.router_aux_loss_coef / accumulation if self.aux_loss_enabled else 0.0
        with self.accelerator.autocast():
            loss, metrics, logp = micro_batch_loss(model, batch, self._plan, place, ExtraTerms(self.entropy_coef, aux))
        if inputs.get("old_per_token_logps") is None:
            inputs["old_per_token_logps"] = logp[:, inputs["prompt_ids"].shape[1] :]
        self._parts.append(metrics)
        if place == accumulation - 1:
            values = joined(self._parts, self._plan, self.accelerator)
            self._report({f"loss/{name}": value for name, value in values.items()})
            for name, trl_name in _TRL_NAMES.items():
                if name in values:
                    self._metrics["train"][trl_name].append(values[name])
            self._plan, self._batches, self._parts = None, [], []
        return loss

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if torch.is_grad_enabled():
            self._recorded = result[0].detach()
        return result

    def _end_step(self) -> None:
        """After an optimizer step; at the end of a round, imitate and take its trajectories into the memory."""
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            return
        if self._imitation is not None:
            rewards = {member.uid: member.reward for group in self._groups for member in group.trajectories}
            own = [
                row
                for inputs in self._buffered_inputs
                for row in to_rows(inputs, rewards, self._finished_rounds, self.num_generations)
            ]
            rows = sorted(gather_object(own), key=lambda row: row.uid)
            self._report(self._imitation.end_round(self._finished_rounds, self._groups, rows))
        self._finished_rounds += 1

    def _report(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics["train"][f"spear/{name}"].append(value)

    def _save_rng_state(self, output_dir: str) -> None:
        """What a checkpoint needs to go on: our state beside it, before older checkpoints are deleted or it is sent."""
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            memory = {} if self._imitation is None else self._imitation.state_dict()
            save_state(output_dir, self._finished_rounds, memory)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._finished_rounds = load_state(checkpoint, None if self._imitation is None else self._imitation.memory)


class _StepEnd(TrainerCallback):
    """Tells the trainer that an optimizer step was taken, before TRL logs and saves."""

    def __init__(self, trainer: SPEARTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer._end_step()


def _not_scored(completions: list[Any], **_: Any) -> list[None]:
    """A reward function that leaves its column to `_calculate_rewards`."""
    return [None] * len(completions)


def _check_tools(args: SPEARConfig, has_tools: bool) -> None:
    """Refuse options that count tool calls where there can be none."""
    if has_tools:
        return
    missing = "the trainer has neither tools, rollout_func nor environment_factory; pass one,"
    if args.intrinsic_mode != "none" and args.intrinsic_count == "tool_calls":
        raise ConfigError(
            f"intrinsic_mode={args.intrinsic_mode!r} rewards tool calls, but {missing} or set intrinsic_mode='none'"
        )
    if args.replay_mode != "off" and args.replay_require_tool_call:
        raise ConfigError(
            f"replay_require_tool_call=True stores trajectories with tool calls, but {missing} or set it False"
        )
