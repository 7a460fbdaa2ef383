"""The ranks of a run: who this process is, which device it trains on, and the few things ranks tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spear_fast.errors import ConfigError, RankError, SpearError

if TYPE_CHECKING:
    from spear_fast.config.machine import ParallelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among those that torchrun started; alone if it started none.

    The control plane is replicated: every rank holds all groups and rows and decides the same, so ranks exchange
    trajectories, weights and gradients, and hardly anything else.
    """

    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None
    """Gloo group of all ranks for tensors and objects on the CPU; None without a process group."""
    mesh: DeviceMesh | None = None
    """Mesh ("shard",) or ("replicate", "shard"); None if nothing is sharded."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks; values are pickled."""
        if self.cpu_group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _all_present():
            dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.gather(flag))

    def on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the main rank and return its result on all. Its SpearError is raised on every rank."""
        if self.cpu_group is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except SpearError as error:
                outcome[1] = error
        with _all_present():
            dist.broadcast_object_list(outcome, src=0, group=self.cpu_group)
        result, error = outcome
        if error is not None:
            raise error
        return result

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.cpu_group is not None:
            with _all_present():
                dist.barrier(group=self.cpu_group)

    def share(self, count: int, sharers: int | None = None) -> range:
        """Places in a list of `count` things that are this rank's; shares differ by at most one.

        With `sharers`, only that many ranks, the first ones, get any.
        """
        sharers = min(self.size, sharers or self.size)
        return range(self.rank, count, sharers) if self.rank < sharers else range(0)

    def close(self) -> None:
        """Leave the process group."""
        if self.cpu_group is not None and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _all_present() -> Iterator[None]:
    """Say what it means that ranks cannot talk to each other."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split(". ", 1)[0]
        raise RankError(
            f"another rank of this job ended or hangs; its own message says why. Resume once that is mended ({reason})"
        ) from error


def is_main_rank() -> bool:
    """Whether this process is the main one of its job, before it has joined the others."""
    return os.environ.get("RANK", "0") == "0"


def stand_alone(device: str) -> Ranks:
    """Return the ranks of a command that runs in one process. Raises ConfigError if CUDA is asked for and absent."""
    return Ranks(0, 1, _device(device))


def start_ranks(device: str, parallel: ParallelConfig, *, shard: bool) -> Ranks:
    """Join the ranks that torchrun started, or stand alone.

    Args:
        device: "auto", "cpu" or "cuda", as `RunConfig.device`.
        parallel: Mesh and timeout.
        shard: Whether the policy is sharded even on one rank, which float32 master weights of a bfloat16 model and
            `parallel.cpu_offload` need.

    Raises:
        ConfigError: There is no CUDA device for this rank, or `parallel.replicate` does not divide the ranks.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device)
    if size % parallel.replicate:
        raise ConfigError(
            f"parallel.replicate={parallel.replicate} does not divide the {size} ranks of this job; set it to a "
            "divisor, or start another number of ranks"
        )
    if size == 1 and not shard:
        return Ranks(0, 1, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    _join(rank, size, place, timedelta(seconds=parallel.timeout_s))
    cpu_group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
    return Ranks(rank, size, place, cpu_group, _mesh(place, size, parallel.replicate))


def _device(wanted: str) -> torch.device:
    """This rank's device."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not available:
        raise ConfigError(
            "device='cuda', but torch sees no CUDA device; set device=cpu, or install a CUDA build of torch"
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= available:
        raise ConfigError(
            f"rank {local_rank} of this node has no GPU: torch sees {available}; start torchrun with "
            f"--nproc-per-node {available} or fewer"
        )
    return torch.device("cuda", local_rank)


def _join(rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # A lone process has nobody to meet, so it needs no address.
        dist.init_process_group(backend, store=HashStore(), rank=rank, world_size=1, timeout=timeout)


def _mesh(device: torch.device, size: int, replicate: int) -> DeviceMesh:
    if replicate == 1:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, size // replicate), mesh_dim_names=("replicate", "shard"))
