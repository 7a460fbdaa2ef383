"""Other projects' losses on log-probs, called as their trainers call them."""

from __future__ import annotations

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from bench.layers.contenders import Contender, Outcome, Step
from bench.layers.measure import Prepared
from bench.layers.peers import TRL
from bench.layers.policy_problems import TokenProblem
from bench.layers.verl_alone import VERL, actor_config, import_verl

VERL_NAMES = {"ppo": "vanilla"}
"""verl's name of a kind where it differs."""


def _verl(device: torch.device) -> Step:
    losses = import_verl("verl.trainer.ppo.core_algos")

    def make(problem: TokenProblem) -> tuple[Any, Any]:
        function = losses.get_policy_loss_fn(VERL_NAMES.get(problem.cfg.kind, problem.cfg.kind))
        return function, _verl_config(problem)

    def step(problem: TokenProblem, made: tuple[Any, Any]) -> Outcome:
        function, config = made
        tensors = (problem.old_logp, problem.logp, problem.advantages, problem.mask)
        padded = (problem.by_sequence(tensor) for tensor in tensors)
        loss, _ = function(*padded, loss_agg_mode=problem.cfg.aggregation, config=config)
        return Outcome(loss)

    return Prepared(make, step)


def _verl_config(problem: TokenProblem) -> Any:
    cfg = problem.cfg
    counts = {"dp_size": 1, "batch_num_tokens": problem.num_active, "global_batch_size": problem.shape.num_seqs}
    return actor_config(
        clip_ratio=cfg.clip_low,
        clip_ratio_low=cfg.clip_low,
        clip_ratio_high=cfg.clip_high,
        clip_ratio_c=cfg.dual_clip or 1e9,
        policy_loss=SimpleNamespace(
            clip_cov_ratio=cfg.cov_ratio,
            clip_cov_lb=cfg.cov_lower,
            clip_cov_ub=cfg.cov_upper,
            kl_cov_ratio=cfg.cov_ratio,
            ppo_kl_coef=cfg.kl_cov_coef,
        ),
        global_batch_info=counts,
    )


def _trl(device: torch.device) -> Step:
    compute = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer._compute_loss

    def make(problem: TokenProblem) -> tuple[dict[str, Any], torch.Tensor]:
        mask = problem.by_sequence(problem.mask).long()
        ids = torch.zeros_like(mask)
        inputs = {
            "prompt_ids": ids[:, :0],
            "prompt_mask": mask[:, :0],
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": problem.by_sequence(problem.advantages)[:, 0],
            "old_per_token_logps": problem.by_sequence(problem.old_logp),
            "num_items_in_batch": torch.tensor(problem.num_active, device=problem.device),
        }
        return inputs, torch.zeros(mask.shape, device=problem.device)

    def step(problem: TokenProblem, made: tuple[dict[str, Any], torch.Tensor]) -> Outcome:
        inputs, entropies = made
        trainer = _trl_trainer(problem, (problem.by_sequence(problem.logp), entropies, None))
        return Outcome(compute(trainer, None, inputs))

    return Prepared(make, step)


def _trl_trainer(problem: TokenProblem, scores: tuple[Any, ...]) -> Any:
    """What TRL's method reads of its trainer, with a model that answers `scores`; it cannot be called without one."""
    cfg = problem.cfg
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: scores,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if cfg.kind == "gspo" else "token",
        beta=0.0,
        # Its names of a mean over tokens, and of a mean over sequences of means over tokens.
        loss_type={"ppo": "bnpo", "gspo": "grpo", "cispo": "cispo"}[cfg.kind],
        epsilon_low=cfg.clip_low,
        # Of cispo this is the bound itself.
        epsilon_high=cfg.clip_high + 1 if cfg.kind == "cispo" else cfg.clip_high,
        args=SimpleNamespace(delta=cfg.dual_clip, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor
        ),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )


def verl_contender(level: str, computes: str, **fields: Any) -> Contender:
    """verl's policy losses as a contender of `level`."""
    return Contender("verl", computes, _verl, package="verl", install=VERL, levels=(level,), **fields)


PEERS = (
    verl_contender("policy", "compute_policy_loss_* on padded rows, metrics as Python numbers"),
    Contender(
        "trl",
        "GRPOTrainer._compute_loss with the log-probs given, metrics as Python numbers",
        _trl,
        package="trl",
        install=TRL,
        levels=("policy",),
        variants=("ppo", "gspo", "cispo"),
    ),
)
