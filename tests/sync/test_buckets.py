"""Gathering in buckets, over gloo ranks: every rank gets every parameter whole and cast, in bounded memory.

Each world size is started once and runs every case.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from spear_fast.errors import EngineError
from spear_fast.sync import buckets
from spear_fast.sync.buckets import weight_buckets
from spear_fast.sync.push import push_weights
from spear_kernels.testing import run_ranks
from tests.sync.recorder import Recorder

BOUND = 1536
"""Bytes; most parameters below share a bucket, and `big.weight` is larger."""


def toy() -> nn.Module:
    """Rows that 2 and 4 ranks divide and that they do not; fewer rows than ranks; one large parameter."""
    torch.manual_seed(0)
    parts = {
        "embed": nn.Embedding(13, 6),
        "odd": nn.Linear(7, 10),
        "even": nn.Linear(8, 16),
        "norm": nn.LayerNorm(3),
        "big": nn.Linear(50, 64),
        "last": nn.Linear(4, 5, bias=False),
    }
    model = nn.ModuleDict(parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def sharded(mesh: DeviceMesh, **settings: Any) -> nn.Module:
    model = toy()
    for part in model.children():
        fully_shard(part, mesh=mesh, **settings)
    return model


def gathered(named: Any, dtype: torch.dtype, bound: int = BOUND) -> dict[str, Any]:
    """All values, cloned before the next bucket overwrites them, and how they came."""
    values: dict[str, Tensor] = {}
    names: list[list[str]] = []
    memory: list[tuple[int, int]] = []
    for bucket in weight_buckets(named, dtype, bound):
        values.update({name: tensor.clone() for name, tensor in bucket})
        names.append([name for name, _ in bucket])
        storage = bucket[0][1].untyped_storage()
        memory.append((storage.data_ptr(), storage.nbytes()))
    return {"values": values, "names": names, "memory": memory}


class Calls:
    """Counts the collectives of the buckets."""

    def __init__(self) -> None:
        self.number = 0
        self._real = buckets._all_gather

    def __enter__(self) -> Calls:
        buckets._all_gather = self._count
        return self

    def __exit__(self, *_: object) -> None:
        buckets._all_gather = self._real

    def _count(self, *arguments: Any) -> None:
        self.number += 1
        self._real(*arguments)


def other_layouts(mesh: DeviceMesh) -> dict[str, Any]:
    """Tensors that FSDP2 does not make: cut elsewhere, replicated, summands, empty; and one that is plain."""
    whole = torch.arange(40.0).view(8, 5)
    summand = whole + (1 + dist.get_rank()) / 3
    tensors = {
        "columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "replicated": distribute_tensor(whole + 1, mesh, [Replicate()]),
        "summands": DTensor.from_local(summand, mesh, [Partial()]),
        "empty": distribute_tensor(torch.empty(4, 0), mesh, [Shard(0)]),
        "plain": whole + 2,
    }
    return gathered(tensors.items(), torch.bfloat16)


def push(mesh: DeviceMesh, fails_on: int | None = None) -> Any:
    """What the engine got, or the error; then a second push must work, so nobody is a collective ahead."""
    engine = Recorder(dtype=torch.bfloat16, fails_after=2 if dist.get_rank() == fails_on else None)
    model = sharded(mesh)
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "bucket_bytes": BOUND, "verify": True}
    error = None
    try:
        push_weights(model.named_parameters(), engine, 1, **settings)
    except EngineError as raised:
        error = str(raised)
    engine.fails_after = None
    metrics = push_weights(model.named_parameters(), engine, 2, **settings)
    return {"error": error, "values": engine.values, "metrics": metrics}


def work(rank: int) -> dict[str, Any]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    with Calls() as calls:
        results: dict[str, Any] = {"bfloat16": gathered(sharded(mesh).named_parameters(), torch.bfloat16)}
    results["calls"] = calls.number
    results["float32"] = gathered(sharded(mesh).named_parameters(), torch.float32, 1 << 20)
    offload: OffloadPolicy = CPUOffloadPolicy(pin_memory=False)
    results["offloaded"] = gathered(sharded(mesh, offload_policy=offload).named_parameters(), torch.bfloat16)
    results["other"] = other_layouts(mesh)
    results["push"] = push(mesh)
    results["push that fails"] = push(mesh, fails_on=1)
    if size == 4:
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results["hybrid"] = gathered(sharded(hybrid).named_parameters(), torch.bfloat16)
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    yield run_ranks(work, request.param, tmp_path_factory.mktemp("ranks"))


def assert_equal(values: dict[str, Tensor], dtype: torch.dtype) -> None:
    expected = {name: parameter.detach().to(dtype) for name, parameter in toy().named_parameters()}
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert values[name].dtype == dtype and torch.equal(values[name], tensor), name


def test_every_rank_gets_every_parameter_as_if_cast_after_gathering(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert_equal(results["bfloat16"]["values"], torch.bfloat16)
        assert_equal(results["offloaded"]["values"], torch.bfloat16)
        assert_equal(results["float32"]["values"], torch.float32)
        if len(ranks) == 4:
            assert_equal(results["hybrid"]["values"], torch.bfloat16)


def test_buckets_keep_to_their_bound_and_large_parameters_go_alone(ranks: list[dict[str, Any]]) -> None:
    size = {name: 2 * parameter.numel() for name, parameter in toy().named_parameters()}
    for results in ranks:
        names = results["bfloat16"]["names"]
        assert [bucket for bucket in names if sum(map(size.__getitem__, bucket)) > BOUND] == [["big.weight"]]
        assert len(names) <= 5  # of nine parameters
        assert results["calls"] == len(names)
        assert len(results["float32"]["names"]) == 1


def test_memory_is_used_again(ranks: list[dict[str, Any]]) -> None:
    """It is new only where what was there is too small, and never above the bound but for the large parameter."""
    for results in ranks:
        memory = results["bfloat16"]["memory"]
        for (place, size), (next_place, next_size) in pairwise(memory):
            assert next_place == place or next_size > size
        assert len(set(memory)) < len(memory)
        large = results["bfloat16"]["names"].index(["big.weight"])
        assert all(size <= BOUND for _, size in memory[:large])


def test_other_layouts_become_whole_too(ranks: list[dict[str, Any]]) -> None:
    whole = torch.arange(40.0).view(8, 5)
    for results in ranks:
        values = results["other"]["values"]
        assert torch.equal(values["columns"], whole.bfloat16())
        assert torch.equal(values["replicated"], whole + 1)
        total = sum(whole + (1 + rank) / 3 for rank in range(len(ranks)))
        half_an_ulp = torch.finfo(torch.bfloat16).eps / 2 * (1 + 1e-4)
        assert ((values["summands"] - total).abs() <= half_an_ulp * total).all()
        assert values["empty"].shape == (4, 0)
        assert torch.equal(values["plain"], whole + 2)


def test_a_push_fills_the_engine_of_every_rank(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        assert results["push"]["error"] is None
        assert_equal(results["push"]["values"], torch.bfloat16)
        assert results["push"]["metrics"]["sync/bytes"] == 2 * sum(p.numel() for p in toy().parameters())
        assert results["push"]["metrics"]["sync/buckets"] == len(results["bfloat16"]["names"])


def test_all_ranks_raise_if_the_engine_of_one_fails(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        error = results["push that fails"]["error"]
        assert "broken engine" in error
        assert ("rank 1" in error) == (rank != 1)
        assert_equal(results["push that fails"]["values"], torch.bfloat16)
