"""Whole parameters out of sharded ones: each shard cast first, many gathered in one collective, memory bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

_ALIGN = 64
"""Elements to which places in the buffers are rounded up, so that collectives and copies move whole cache lines."""


@dataclass(frozen=True)
class _Sharded:
    """This rank's rows of a parameter that is cut along dimension 0 over the ranks of `group`."""

    name: str
    local: Tensor
    shape: torch.Size
    group: dist.ProcessGroup
    device: torch.device

    @property
    def room(self) -> int:
        """Elements of a rank's place in the send buffer: the longest share of rows, as `torch.chunk` cuts them."""
        row = self.shape[1:].numel()
        return -(-self.shape[0] // self.group.size()) * row


class _Buffers:
    """The send and receive memory of the gathers, kept from bucket to bucket."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._held: dict[str, Tensor] = {}

    def take(self, use: str, elements: int, device: torch.device) -> Tensor:
        """Return uninitialised memory [elements], the same as last time if it is large enough."""
        held = self._held.get(use)
        if held is None or len(held) < elements or held.device.type != device.type:
            self._held.pop(use, None)
            del held
            held = self._held[use] = torch.empty(elements, dtype=self._dtype, device=device)
        return held[:elements]


@torch.no_grad()
def weight_buckets(
    named: Iterable[tuple[str, Tensor]], dtype: torch.dtype, bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield whole parameters, bucket by bucket; every rank gets all of them and must go through all buckets.

    FSDP2 shards (dimension 0, also within the rows of an HSDP mesh) are cast to `dtype` while they are packed into one
    buffer, gathered by one collective and yielded as views of the other buffer. A plain tensor, or a DTensor on one
    rank, is yielded by itself as it is: whoever copies it casts it.

    Args:
        named: Parameters by name, in the same order on all ranks; DTensors in their sharded state. Shards in CPU
            memory under a CUDA mesh are moved to the device. Only those of one bucket are held at a time.
        dtype: Floating-point type of what is gathered.
        bucket_bytes: Most bytes of a bucket; a larger parameter makes a bucket of its own.

    Yields:
        (name, tensor [whole shape]) pairs. Gathered tensors are valid until the next bucket is asked for.
    """
    buffers = _Buffers(dtype)
    pending: list[_Sharded] = []
    size = 0
    for name, tensor in named:
        shard = _shard_of(name, tensor)
        if shard is None:
            yield [(name, _whole(tensor, dtype))]
            continue
        elements = _rounded(shard.room) * shard.group.size()
        if pending and ((size + elements) * dtype.itemsize > bucket_bytes or shard.group != pending[0].group):
            yield _gather(pending, buffers)
            pending, size = [], 0
        pending.append(shard)
        size += elements
    if pending:
        yield _gather(pending, buffers)


def _shard_of(name: str, tensor: Tensor) -> _Sharded | None:
    """The shard to gather, or None if the tensor is whole already or cut in some other way."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    cuts = [axis for axis, placement in enumerate(tensor.placements) if placement != Replicate()]
    if len(cuts) != 1 or type(tensor.placements[cuts[0]]) is not Shard or not tensor.placements[cuts[0]].is_shard(0):
        return None
    if mesh.size(cuts[0]) == 1 or not tensor.numel():
        return None
    device = torch.device(mesh.device_type)
    return _Sharded(name, tensor.to_local(), tensor.shape, mesh.get_group(cuts[0]), device)


def _whole(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it is whole on this rank; otherwise gathered alone, by DTensor's own means."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.to_local().device)
    placements = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    if all(placement == Replicate() or size == 1 for placement, size in placements):
        return tensor.to_local()
    # Summands are added up before they are cast: DTensor sees to that.
    return cast("DTensor", tensor.to(dtype)).full_tensor()


def _gather(shards: list[_Sharded], buffers: _Buffers) -> list[tuple[str, Tensor]]:
    group, device = shards[0].group, shards[0].device
    ranks = group.size()
    total = sum(_rounded(shard.room) for shard in shards)
    sent, received = buffers.take("send", total, device), buffers.take("receive", total * ranks, device)
    inputs, outputs, whole = [], [], []
    start = 0
    for shard in shards:
        mine = sent[start : start + shard.room]
        mine[: shard.local.numel()].copy_(shard.local.reshape(-1))
        # Rank after rank, so that only the last ranks' places have a gap, which is behind the last row.
        everyone = received[start * ranks : start * ranks + shard.room * ranks]
        inputs.append(mine)
        outputs.append(everyone)
        whole.append((shard.name, everyone[: shard.shape.numel()].view(shard.shape)))
        start += _rounded(shard.room)
    _all_gather(group, outputs, inputs)
    return whole


def _all_gather(group: dist.ProcessGroup, outputs: list[Tensor], inputs: list[Tensor]) -> None:
    """One collective for all pairs; wait until the outputs can be read by anyone."""
    # The name that torch 2.13 brought; the older one is going away.
    gather = getattr(group, "all_gather_single_coalesced", None) or group.allgather_into_tensor_coalesced
    gather(outputs, inputs).wait()
    if outputs[0].device.type == "cuda":
        torch.cuda.current_stream().synchronize()


def _rounded(elements: int) -> int:
    return -(-elements // _ALIGN) * _ALIGN
