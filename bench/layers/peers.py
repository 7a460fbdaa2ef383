"""Other projects' operators on hidden states and logits; each imports its project only when it is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from bench.layers.contenders import (
    CLIP_HIGH,
    CLIP_LOW,
    DUAL_CLIP,
    HEAD_LEVELS,
    Contender,
    Outcome,
    Step,
    actions_of,
    loss_of_actions,
    loss_of_all,
)
from bench.layers.problems import Problem
from bench.layers.verl_alone import VERL, import_verl

IGNORED = -100
TRL = "pip install trl"
LIGER = "pip install --no-deps liger-kernel"
# The vocabulary width that TRL's trainers pass, and the rows at which Liger's own inner loop splits.
TRL_VOCAB_CHUNK = 32768
LIGER_CHUNK_ROWS = 2048
QUACK_CHUNK_ROWS = 4096


def _trl_chunked(device: torch.device) -> Step:
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    # Its backward pass needs this module: without it the operator is not usable.
    importlib.import_module("trl.trainer.utils")

    def step(problem: Problem) -> Outcome:
        actions = actions_of(problem)
        scale = (1.0, TRL_VOCAB_CHUNK, None, 1.0)
        logp, entropy, *_ = function.apply(
            actions.inputs, problem.weight, None, actions.ids, *scale, ("log_probs", "entropy")
        )
        return loss_of_actions(logp, actions, problem, entropy.detach())

    return step


def _trl_logits(device: torch.device) -> Step:
    score = importlib.import_module("trl.trainer.utils").selective_log_softmax_and_entropy

    def step(problem: Problem) -> Outcome:
        if problem.logits is not None:
            logp, entropy = score(problem.logits, problem.ids, entropy_requires_grad=False, row_mask=problem.mask)
            return loss_of_all(logp, problem, entropy)
        actions = actions_of(problem)
        logp, entropy = score(actions.inputs @ problem.weight.t(), actions.ids, entropy_requires_grad=False)
        return loss_of_actions(logp, actions, problem, entropy)

    return step


def _verl_fused_linear(device: torch.device) -> Step:
    fused = import_verl("verl.utils.experimental.torch_functional").FusedLinearForPPO(impl_backend="torch")

    def step(problem: Problem) -> Outcome:
        logp, entropy = fused(problem.hidden, problem.weight, problem.ids)
        return loss_of_all(logp, problem, entropy.detach())

    return step


def _verl_logits(device: torch.device) -> Step:
    score = import_verl("verl.utils.torch_functional").logprobs_from_logits

    def step(problem: Problem) -> Outcome:
        logits = problem.hidden @ problem.weight.t() if problem.logits is None else problem.logits
        return loss_of_all(score(logits, problem.ids, inplace_backward=problem.logits is None), problem)

    return step


def _verl_triton(device: torch.device) -> Step:
    linear_cross_entropy = import_verl("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def step(problem: Problem) -> Outcome:
        logp, entropy = linear_cross_entropy(problem.hidden, problem.weight, problem.ids, 1.0, "none")
        return loss_of_all(logp, problem, entropy.detach())

    return step


def _liger_grpo(device: torch.device) -> Step:
    loss_class = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss

    def step(problem: Problem) -> Outcome:
        num_seqs, seq_len = problem.shape.num_seqs, problem.shape.seq_len
        loss_module = loss_class(
            beta=0.0,
            # Its default; on the CPU compiling needs a C++ compiler, which a test machine may lack.
            compiled=device.type == "cuda",
            use_ref_model=False,
            # Its default is one sequence at a time, which starves the products when sequences are short.
            chunk_size=max(1, LIGER_CHUNK_ROWS // seq_len),
            epsilon_low=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            delta=DUAL_CLIP,
        )
        loss, _ = loss_module(
            problem.hidden.view(num_seqs, seq_len, -1),
            problem.weight,
            problem.ids.view(num_seqs, seq_len),
            problem.mask.view(num_seqs, seq_len),
            problem.advantages.view(num_seqs, seq_len)[:, 0],
            old_per_token_logps=problem.old_logp.view(num_seqs, seq_len),
        )
        return Outcome(loss)

    return step


def _liger_scaled_ce(device: torch.device) -> Step:
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def step(problem: Problem) -> Outcome:
        actions = actions_of(problem)
        nll, entropy = function.apply(actions.inputs, problem.weight, actions.ids, 1.0, IGNORED, 1, True)
        return loss_of_actions(-nll, actions, problem, entropy.detach())

    return step


def _liger_logits(device: torch.device) -> Step:
    module = importlib.import_module("liger_kernel.transformers.grpo_loss")

    def step(problem: Problem) -> Outcome:
        assert problem.logits is not None
        by_sequence = (problem.shape.num_seqs, problem.shape.seq_len)
        logits = problem.logits.view(*by_sequence, -1)
        # Both read the first L of L + 1 rows of a sequence.
        ids, mask, old_logp = (
            tensor.view(by_sequence)[:, :-1].contiguous() for tensor in (problem.ids, problem.mask, problem.old_logp)
        )
        if not torch.is_grad_enabled():
            return Outcome(None, module.fused_selective_log_softmax(logits, ids, 1.0, mask)[mask])
        loss, _ = module.triton_grpo_loss(
            logits,
            old_logp,
            None,
            ids,
            problem.advantages.view(by_sequence)[:, 0].contiguous(),
            mask,
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP_LOW,
            eps_high=CLIP_HIGH,
            # In place it would destroy the input of the next repetition.
            inplace=False,
            reduce=True,
            delta=DUAL_CLIP,
        )
        return Outcome(loss)

    return step


def _cut_cross_entropy(device: torch.device) -> Step:
    linear_cross_entropy = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def step(problem: Problem) -> Outcome:
        actions = actions_of(problem)
        nll = linear_cross_entropy(actions.inputs, problem.weight, actions.ids, reduction="none")
        return loss_of_actions(-nll, actions, problem)

    return step


def _quack(device: torch.device) -> Step:
    chunked = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy

    def step(problem: Problem) -> Outcome:
        target = torch.where(problem.mask, problem.ids, IGNORED)
        return Outcome(chunked(problem.hidden, problem.weight, target, chunk_size=QUACK_CHUNK_ROWS))

    return step


def _peer(package: str, install: str) -> Callable[..., Contender]:
    def contender(name: str, build: Callable[[torch.device], Step], computes: str, **fields: Any) -> Contender:
        return Contender(name, computes, build, package=package, install=install, **fields)

    return contender


_trl, _verl_peer, _liger = _peer("trl", TRL), _peer("verl", VERL), _peer("liger-kernel", LIGER)
CUDA = ("cuda",)

PEERS = (
    _trl(
        "trl_chunked",
        _trl_chunked,
        "ChunkedLogProbFunction with entropy, as its GRPO trainer calls it, + loss in torch; action rows gathered",
        levels=HEAD_LEVELS,
    ),
    _trl(
        "trl_logits",
        _trl_logits,
        "full logits, selective_log_softmax_and_entropy, + loss in torch; action rows gathered",
        levels=HEAD_LEVELS,
    ),
    _verl_peer(
        "verl_fused_linear",
        _verl_fused_linear,
        "FusedLinearForPPO (torch) with entropy + loss in torch; every row",
        levels=HEAD_LEVELS,
    ),
    _verl_peer(
        "verl_logits",
        _verl_logits,
        "full logits, logprobs_from_logits, no entropy, + loss in torch; every row",
        levels=HEAD_LEVELS,
    ),
    _verl_peer(
        "verl_triton",
        _verl_triton,
        "Triton linear_cross_entropy with entropy + loss in torch; every row",
        levels=HEAD_LEVELS,
        devices=CUDA,
    ),
    _liger(
        "liger_grpo",
        _liger_grpo,
        "LigerFusedLinearGRPOLoss: PPO loss, no entropy; every row; compiled, as by its default, on CUDA only",
    ),
    _liger(
        "liger_scaled_ce",
        _liger_scaled_ce,
        "LigerFusedLinearScaledCrossEntropyFunction with entropy + loss in torch; action rows gathered",
        levels=HEAD_LEVELS,
    ),
    Contender(
        "cut_cross_entropy",
        "linear_cross_entropy, its default filter of small gradients, + loss in torch; action rows gathered",
        _cut_cross_entropy,
        levels=HEAD_LEVELS,
        package="cut-cross-entropy",
        install="pip install --no-deps cut-cross-entropy",
        devices=CUDA,
    ),
    Contender(
        "quack",
        "chunked_linear_cross_entropy: mean cross-entropy, no policy loss, no entropy; every row, others ignored",
        _quack,
        levels=HEAD_LEVELS,
        objective="cross_entropy",
        package="quack-kernels",
        install="pip install --no-deps quack-kernels nvidia-cutlass-dsl apache-tvm-ffi torch-c-dlpack-ext einops",
        devices=CUDA,
    ),
    _trl(
        "trl_selective",
        _trl_logits,
        "selective_log_softmax_and_entropy + PPO loss in torch",
        levels=("logits",),
    ),
    _verl_peer(
        "verl_logprobs",
        _verl_logits,
        "logprobs_from_logits, no entropy, + PPO loss in torch",
        levels=("logits",),
    ),
    _liger(
        "liger_selective",
        _liger_logits,
        "forward: fused_selective_log_softmax; with gradient: triton_grpo_loss, not in place; no entropy",
        devices=CUDA,
        levels=("logits",),
    ),
)
