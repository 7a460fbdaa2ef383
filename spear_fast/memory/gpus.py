"""Rates of GPUs: what vendors state (gpus.json), what was measured, and which of the two a prediction rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from spear_fast.errors import ConfigError

DATASHEET = Path(__file__).with_name("gpus.json")
FROM_DATASHEET = "from datasheet, efficiency not measured"
NOT_KNOWN = "not measured, taken as 0 s"


@dataclass(frozen=True)
class Rate:
    """A number with where it comes from, e.g. `Rate(989e12, FROM_DATASHEET)`."""

    value: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """What a prediction needs to know of a device. Rates are per device and second."""

    name: str
    memory_bytes: int
    gpus_per_node: int
    matmul_flops: Rate
    """Floating-point operations of large matrix products in the type that is trained in."""
    train_flops: Rate
    """The same of forward and backward pass of a transformer, its products counted only."""
    memory_bandwidth: Rate
    """Bytes read or written."""
    link_bandwidth: Rate
    """Bytes from one device to another of its node, one direction."""
    nic_bandwidth: Rate
    """Bytes from one device to the network, one direction."""
    host_bandwidth: Rate
    """Bytes between the device and the memory of the CPU, one direction."""
    layer_s: Rate
    """Seconds that one block's forward pass takes however small its input: launches and Python."""

    def group_bandwidth(self, num_ranks: int) -> Rate:
        """Bytes per second and rank of a collective: a ring is as fast as its slowest link, and across nodes each of
        a node's devices carries a ring through its own network adapter."""
        if num_ranks <= self.gpus_per_node:
            return self.link_bandwidth
        across = Rate(self.gpus_per_node * self.nic_bandwidth.value, self.nic_bandwidth.source)
        return min(self.link_bandwidth, across, key=lambda rate: rate.value)


def load_gpu(name: str, coefficients: Path | None = None) -> Gpu:
    """Return a device by its name in gpus.json, rates measured by bench/calibrate.py put over the vendor's.

    A device that gpus.json does not hold (such as "cpu") is taken from a coefficients file that is about it.

    Raises ConfigError listing the known names, or if the coefficients file cannot be used.
    """
    known = json.loads(DATASHEET.read_text(encoding="utf-8"))
    measured = {} if coefficients is None else _read(coefficients)
    if measured and measured["gpu"] != name:
        raise ConfigError(f"--coefficients {coefficients} is about {measured['gpu']!r}, not --gpu {name}")
    if name in known:
        return _gpu(name, known[name], known[name]["measured"] or {}, measured, str(coefficients))
    if measured:
        return _gpu(name, {}, {}, measured, str(coefficients))
    raise ConfigError(
        f"--gpu {name}: no such GPU; known: {', '.join(known)}. Another device, the CPU too, needs "
        "--coefficients with a file that bench/calibrate.py wrote on it"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--coefficients {path} cannot be read as JSON: {error}") from error
    if not isinstance(measured, dict) or not isinstance(measured.get("coefficients"), dict) or "gpu" not in measured:
        raise ConfigError(f"--coefficients {path} is not a file that bench/calibrate.py wrote")
    return measured


def _gpu(
    name: str, datasheet: Mapping[str, Any], shipped: Mapping[str, Any], measured: Mapping[str, Any], path: str
) -> Gpu:
    coefficients = measured.get("coefficients", {})

    def rate(key: str, instead: Rate | None = None) -> Rate:
        if coefficients.get(key) is not None:
            return Rate(coefficients[key], f"measured ({path})")
        if shipped.get(key) is not None:
            return Rate(shipped[key], "measured (gpus.json)")
        if instead is not None:
            return instead
        # A device without links has one rank, whose collectives move nothing.
        return Rate(float(datasheet.get(key, 0.0)), FROM_DATASHEET)

    matmul = rate("matmul_flops")
    rates = {
        field.name: rate(field.name) for field in fields(Gpu) if field.name.endswith("bandwidth")
    }  # fmt: skip
    return Gpu(
        name,
        memory_bytes=int(measured.get("memory_bytes") or datasheet["memory_bytes"]),
        gpus_per_node=int(datasheet.get("gpus_per_node", 1)),
        matmul_flops=matmul,
        train_flops=rate("train_flops", matmul),
        layer_s=rate("layer_s", Rate(0.0, NOT_KNOWN)),
        **rates,
    )
