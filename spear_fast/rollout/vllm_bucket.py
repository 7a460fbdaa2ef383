"""A buffer that two processes share, through which weights go from the trainer to an engine."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the buffer: `buffer[start : start + bytes]`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """First byte behind it."""
        count = 1
        for size in self.shape:
            count *= size
        return self.start + count * self.dtype.itemsize


class Bucket:
    """The trainer's side: tensors are copied in one behind the other until the next does not fit.

    In memory that both processes map: shared memory on the CPU, an allocation exported by CUDA IPC on CUDA.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Allocate `size` bytes on `device`."""
        if device.type == "cpu":
            # Shared from the start, because `share_memory_` would copy.
            storage = torch.UntypedStorage._new_shared(size)
            self._buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
        else:
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._entries: list[Entry] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return self._buffer.numel()

    @property
    def device(self) -> torch.device:
        """Where the buffer is."""
        return self._buffer.device

    def add(self, name: str, tensor: Tensor) -> bool:
        """Copy a tensor in and return True, or return False if it does not fit any more."""
        last = self._entries[-1].end if self._entries else 0
        entry = Entry(name, tensor.dtype, tuple(tensor.shape), -(-last // _ALIGNMENT) * _ALIGNMENT)
        if entry.end > self.size:
            return False
        view(self._buffer, entry).copy_(tensor)
        self._entries.append(entry)
        return True

    def take(self) -> list[Entry]:
        """Return what is in the buffer, complete on the device, and start to fill it anew."""
        if self._buffer.is_cuda:
            torch.cuda.synchronize(self._buffer.device)
        entries, self._entries = self._entries, []
        return entries

    def handle(self) -> Any:
        """What `open_bucket` needs; can be sent to another process while the bucket lives."""
        if not self._buffer.is_cuda:
            return self._buffer
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, arguments = reduce_tensor(self._buffer)
        return rebuild, arguments


def open_bucket(handle: Any) -> Tensor:
    """The engine's side: map a buffer by its handle, uint8 [size].

    The engine's process sees one CUDA device, so the trainer's index of it is replaced by 0.
    """
    if isinstance(handle, Tensor):
        return handle
    rebuild, arguments = handle
    position = list(inspect.signature(rebuild).parameters).index("storage_device")
    return rebuild(*arguments[:position], 0, *arguments[position + 1 :])


def view(buffer: Tensor, entry: Entry) -> Tensor:
    """The tensor of an entry, as a view of the buffer."""
    return buffer[entry.start : entry.end].view(entry.dtype).view(entry.shape)
