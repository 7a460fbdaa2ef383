"""Keeps from the trainer what vLLM changes for the whole process: random state, torch.distributed, the environment."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.distributed import distributed_c10d as c10d

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
            "ROLE_NAME", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
"""Variables of torchrun; those that start with TORCHELASTIC_ go too. An engine is alone, whatever rank it serves."""

_engines_world: Any = None
"""The default process group that vLLM made in this process; its engines share it."""


@contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """Put the random state of python, numpy, torch and `device` back at the end: vLLM seeds all of them."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with kept_torch_rng(device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


@contextmanager
def kept_torch_rng(device: torch.device) -> Iterator[None]:
    """Put torch's random state back at the end: the sampler draws from it even if every request has its own seed.

    python's and numpy's are left alone, because tools may draw from them while the engine steps.
    """
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


@contextmanager
def own_process_group() -> Iterator[None]:
    """Hide the trainer's default process group, so that vLLM makes one of its own, of one rank.

    vLLM would otherwise join a group that exists, which takes collectives of all ranks, or leave one behind. With one
    rank it communicates with nobody, so its group is needed only while it is built.
    """
    global _engines_world
    trainers = c10d.GroupMember.WORLD
    # A trainer that ends destroys all groups of the process.
    alive = _engines_world if _engines_world in c10d._world.pg_map else None
    c10d._update_default_pg(alive)
    try:
        yield
    finally:
        _engines_world = c10d.GroupMember.WORLD
        c10d._update_default_pg(trainers)


@contextmanager
def plain_environment(*dropped: str) -> Iterator[None]:
    """Hide the launcher's variables and those in `dropped`, and undo every change of the environment at the end."""
    kept = dict(os.environ)
    for name in kept:
        if name in LAUNCHER or name in dropped or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    try:
        yield
    finally:
        for name in os.environ.keys() - kept.keys():
            del os.environ[name]
        os.environ.update(kept)
