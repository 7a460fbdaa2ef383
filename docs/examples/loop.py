"""A policy-gradient loop around a transformers model: in one process, under DDP, or under FSDP2.

python docs/examples/loop.py
torchrun --nproc-per-node 2 docs/examples/loop.py ddp
torchrun --nproc-per-node 2 docs/examples/loop.py fsdp2
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM

from spear_kernels import PolicyInputs, PolicyLossConfig, replace_lm_head

LOSS = PolicyLossConfig("ppo", clip_high=0.28, dual_clip=10.0)  # a mean over the tokens of the mini-batch
SIZES: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def build(parallel: str, device: torch.device) -> Any:
    """The model with its head replaced, then wrapped: in this order."""
    torch.manual_seed(0)
    model: Any = replace_lm_head(Qwen2ForCausalLM(Qwen2Config(**SIZES, vocab_size=200)), temperature=0.9).to(device)
    if parallel == "ddp":
        return DistributedDataParallel(model)
    for part in (*model.model.layers, model) if parallel == "fsdp2" else ():
        fully_shard(part)
        part.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks, so gradients add up
        part.set_force_sum_reduction_for_comms(True)
    return model


def rollouts(step: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Micro-batches (ids [2, 16], labels [2, 16], advantages [2]) of all ranks; stands for your sampler and reward."""
    torch.manual_seed(step)
    ids, advantages = torch.randint(200, (4, 2, 16)), torch.randn(4, 2)
    place, end = torch.arange(16), torch.randint(6, 16, (4, 2, 1))
    labels = ids.where((place >= 4) & (place < end), -100)  # neither the prompt nor what follows the answer
    return list(zip(ids, labels, advantages, strict=True))


def train(parallel: str = "one process", steps: int = 2) -> tuple[list[float], Any]:
    """The norms of the gradients, and the model."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, norms = build(parallel, device), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        batches = rollouts(step)[rank::world]
        with torch.no_grad():  # log-probs at sampling time; an engine that reports them saves this pass
            old = [model(input_ids=ids.to(device), logp_labels=labels).logp for ids, labels, _ in batches]
        num_tokens = torch.stack([(labels[:, 1:] != -100).sum() for _, labels, _ in batches]).sum().to(device)
        if world > 1:
            dist.all_reduce(num_tokens)
        share = world if parallel == "ddp" else 1  # DDP takes the mean of the ranks' gradients
        for index, ((ids, labels, advantages), old_logp) in enumerate(zip(batches, old, strict=True)):
            last = index == len(batches) - 1  # gradients travel once per optimizer step
            if parallel == "fsdp2":
                model.set_requires_gradient_sync(last)
            with model.no_sync() if parallel == "ddp" and not last else nullcontext():
                # Labels and advantages stay on the CPU: they say which rows the head needs before anything is launched.
                inputs = PolicyInputs(labels, old_logp, advantages, LOSS, num_tokens=num_tokens / share)
                model(input_ids=ids.to(device), policy_inputs=inputs).loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append(norm.full_tensor().item() if parallel == "fsdp2" else norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, model


if __name__ == "__main__":
    if sys.argv[1:]:
        dist.init_process_group()
    print(train(*sys.argv[1:])[0])
    if sys.argv[1:]:
        dist.destroy_process_group()
