"""A vLLM core in a process of its own: started by spawn, spoken to by a pipe, weights through shared memory."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch import multiprocessing as _torch_multiprocessing  # noqa: F401  lets pipes carry tensors in shared memory

from spear_fast.errors import ConfigError, EngineError, SpearError
from spear_fast.rollout.vllm_bucket import Bucket, Entry, open_bucket, view
from spear_fast.rollout.vllm_compat import CoreSettings
from spear_fast.rollout.vllm_core import CoreRequest, Progress, VllmCore
from spear_fast.rollout.vllm_isolation import plain_environment

_INTERRUPT = "interrupt"
_PARENT_CHECK_S = 1.0
_STOP_S = 10.0


class CoreProcess:
    """A core in a child process; see `CoreHost`. It sees only its device and nothing of the launcher.

    The child ends when this process does: it is a daemon, its pipe closes, and it watches its parent.
    """

    def __init__(self, settings: CoreSettings, *, bucket_bytes: int, startup_timeout_s: float = 900.0) -> None:
        """Start the child and wait until its engine runs.

        Args:
            settings: Of the core.
            bucket_bytes: Weights in flight at once; a larger parameter gets a larger bucket.
            startup_timeout_s: Seconds after which the start has failed.

        Raises:
            SpearError: The engine does not start; the message is the child's.
        """
        self._bucket: Bucket | None = None
        self._sending = threading.Lock()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        device = torch.device(settings.device)
        child_settings = settings
        if device.type == "cuda":
            child_settings = dataclasses.replace(settings, device="cuda:0")
        self._process = context.Process(
            target=_serve, args=(theirs, child_settings, os.getpid()), name="vllm", daemon=True
        )
        with plain_environment():
            if device.type == "cuda":
                os.environ["CUDA_VISIBLE_DEVICES"] = _visible_name(device)
            self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(startup_timeout_s):
                raise EngineError(f"the vllm process did not start within {startup_timeout_s:.0f} s")
            # A small model needs no large bucket; what the alignment of its parameters adds does not matter.
            self._bucket_bytes = min(bucket_bytes, self._answer())
        except BaseException:
            self._process.kill()
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._process.is_alive()

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid

    def rearm(self) -> None:
        """Nothing to do: an interrupt that comes before the next request is read and dropped."""

    def interrupt(self) -> None:
        """Let `advance` return; see `CoreHost.interrupt`."""
        with suppress(EngineError):  # whoever waits for the child learns that it died
            self._send(_INTERRUPT)

    def advance(self, adds: Sequence[CoreRequest]) -> list[Progress]:
        """Add requests and step; see `CoreHost.advance`."""
        return self._call("advance", adds)

    def abort(self, keys: Sequence[int]) -> None:
        """Drop requests; see `CoreHost.abort`."""
        self._call("abort", keys)

    def begin_load(self) -> None:
        """Expect every parameter anew; see `CoreHost.begin_load`."""
        self._bucket = None
        self._call("begin_load")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a parameter into the bucket, which is sent when full; see `CoreHost.write`."""
        tensor = tensor.detach()
        if self._bucket is not None and self._bucket.device == tensor.device and self._bucket.add(name, tensor):
            return
        self._flush()
        size = tensor.numel() * tensor.element_size()
        if self._bucket is None or self._bucket.device != tensor.device or self._bucket.size < size:
            self._bucket = Bucket(max(self._bucket_bytes, size), tensor.device)
            self._call("open_bucket", self._bucket.handle())
        self._bucket.add(name, tensor)

    def finish_load(self) -> set[str]:
        """Send the rest, free the bucket and return what is missing; see `CoreHost.finish_load`."""
        self._flush()
        self._call("open_bucket", None)
        on_cuda = self._bucket is not None and self._bucket.device.type == "cuda"
        self._bucket = None
        if on_cuda:
            torch.cuda.ipc_collect()
        return self._call("finish_load")

    def weights_digest(self) -> dict[str, int]:
        """Digest of each parameter in the child."""
        return self._call("weights_digest")

    def sleep(self) -> None:
        """Free what the sleep level says; see `CoreHost.sleep`."""
        self._call("sleep")

    def wake(self) -> None:
        """Undo `sleep`; see `CoreHost.wake`."""
        self._call("wake")

    def close(self) -> None:
        """End the child, by force if it does not end by itself."""
        self._pipe.close()
        self._process.join(_STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _flush(self) -> None:
        if self._bucket is not None:
            entries = self._bucket.take()
            if entries:
                self._call("write_bucket", entries)

    def _call(self, method: str, *args: Any) -> Any:
        self._send((method, args))
        return self._answer()

    def _send(self, message: Any) -> None:
        try:
            with self._sending:
                self._pipe.send(message)
        except OSError as error:
            raise self._died() from error

    def _answer(self) -> Any:
        """The child's answer; errors it meant for the user keep their type."""
        try:
            answer, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if answer == "refused":
            kind, text = value
            raise ConfigError(text) if kind == ConfigError.__name__ else EngineError(text)
        if answer == "failed":
            raise RuntimeError(f"in the vllm process:\n{value}")
        return value

    def _died(self) -> EngineError:
        self._process.join(_STOP_S)
        return EngineError(
            f"the vllm process died with exit code {self._process.exitcode}; load_weights starts a new one. A code of "
            "-9 usually means that the machine ran out of memory"
        )


class _Child:
    """What the child process does with messages; methods have the names that the parent calls."""

    def __init__(self, pipe: Connection, settings: CoreSettings) -> None:
        self._pipe = pipe
        self._core = VllmCore(settings)
        self._buffer: Tensor | None = None
        self.weight_bytes = self._core.weight_bytes
        for method in ("abort", "begin_load", "finish_load", "weights_digest", "sleep", "wake"):
            setattr(self, method, getattr(self._core, method))

    def advance(self, adds: Sequence[CoreRequest]) -> list[Progress]:
        """Step until a request finishes or the parent sends anything."""
        return self._core.advance(adds, self._pipe.poll)

    def open_bucket(self, handle: Any) -> None:
        """Map the parent's buffer, or let go of it."""
        self._buffer = None if handle is None else open_bucket(handle)

    def write_bucket(self, entries: Sequence[Entry]) -> None:
        """Copy parameters out of the buffer, which the parent then fills again."""
        assert self._buffer is not None
        for entry in entries:
            self._core.write(entry.name, view(self._buffer, entry))
        if self._buffer.is_cuda:
            torch.cuda.synchronize(self._buffer.device)

    def close(self) -> None:
        """Shut vLLM down."""
        self._buffer = None
        self._core.close()


def _serve(pipe: Connection, settings: CoreSettings, parent: int) -> None:
    """Main function of the child: answer messages until the pipe closes. Ends the process without python's clean-up.

    That takes seconds after vLLM, and the parent waits for it to have the memory of the device back.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    child = _attempt(pipe, lambda: _Child(pipe, settings), tell=lambda child: child.weight_bytes)
    while child is not None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            with suppress(Exception):
                child.close()
            break
        if message != _INTERRUPT:
            method, args = message
            _attempt(pipe, lambda method=method, args=args: getattr(child, method)(*args))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _attempt(pipe: Connection, work: Callable[[], Any], tell: Callable[[Any], Any] = lambda result: result) -> Any:
    """Do the work and send what `tell` makes of the result, or the error; return the result."""
    try:
        result = work()
        pipe.send(("done", tell(result)))
        return result
    except SpearError as error:
        _send_quietly(pipe, ("refused", (type(error).__name__, str(error))))
    except Exception:
        _send_quietly(pipe, ("failed", traceback.format_exc()))
    return None


def _send_quietly(pipe: Connection, message: Any) -> None:
    with suppress(OSError):  # the parent is gone, which ends the loop
        pipe.send(message)


def _end_with(parent: int) -> None:
    """End this process when its parent does, even from the midst of a step."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def _visible_name(device: torch.device) -> str:
    """The entry of CUDA_VISIBLE_DEVICES that a device of this process has."""
    index = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index].strip() if visible else str(index)
