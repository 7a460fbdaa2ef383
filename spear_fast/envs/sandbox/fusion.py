"""The sandbox of a SandboxFusion server, as the paper's authors use: POST /run_code, in the shape that it documents."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Mapping
from typing import Any, get_args
from urllib.parse import urlsplit

from spear_fast.envs.threads import Threads
from spear_fast.errors import ConfigError

from .base import Ending, RunResult, RunStatus

CONNECT_S = 10.0
MARGIN_S = 30.0
"""Seconds beyond a program's limit for the server's own queue and the way there and back."""
WAITS_S = (0.5, 2.0, 5.0)
"""Seconds before each further attempt when the server cannot be reached or is overloaded."""
RETRIED = (429, 502, 503, 504)


class _UnavailableError(Exception):
    """The server cannot be reached now, or says that it is overloaded."""


class FusionSandbox:
    """Sends programs to a server, up to `workers` at once."""

    def __init__(self, url: str, workers: int, memory_mb: int, max_output_chars: int) -> None:
        """
        Args:
            url: Address of the server, with or without the path `/run_code`.
            workers: Requests at once.
            memory_mb: Memory of a program in MiB; the server may ignore it.
            max_output_chars: Characters kept of each stream.

        Raises:
            ConfigError: The URL is none, or nothing listens there.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ConfigError(f"sandbox.url={url!r} is no HTTP address; write it like http://host:8080")
        self._url = url
        self._is_secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port or (443 if self._is_secure else 80)
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/run_code") else f"{path}/run_code"
        self._memory_mb = memory_mb
        self._max_output_chars = max_output_chars
        self._threads = Threads(workers)
        try:
            socket.create_connection((self._host, self._port), CONNECT_S).close()
        except OSError as error:
            raise ConfigError(
                f"sandbox.url={url!r}: no server answers there ({error}); start SandboxFusion or correct the address"
            ) from error

    async def run(
        self, code: str, *, timeout_s: float, stdin: str = "", files: Mapping[str, bytes] | None = None
    ) -> RunResult:
        """Run `code`; see `Sandbox.run`. A server that stays out of reach is a SandboxError in the result."""
        request = {
            "code": code,
            "language": "python",
            "run_timeout": timeout_s,
            "memory_limit_MB": self._memory_mb,
            "stdin": stdin,
            "files": {name: base64.b64encode(content).decode() for name, content in (files or {}).items()},
        }
        body = json.dumps(request).encode()
        result, error = await self._threads.run(lambda: self._run(body, timeout_s))
        return result or _failure(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Nothing is kept open between requests."""

    def _run(self, body: bytes, timeout_s: float) -> RunResult:
        reason = ""
        for wait_s in (0.0, *WAITS_S):
            time.sleep(wait_s)
            try:
                return self._result(self._post(body, timeout_s))
            except _UnavailableError as error:
                reason = str(error)
            except TimeoutError:  # the server is busy with it: asking again would only add to its load
                return _failure(f"the server at {self._url} gave no answer within {timeout_s + MARGIN_S:g} s")
        return _failure(f"the server at {self._url} cannot be reached: {reason}")

    def _post(self, body: bytes, timeout_s: float) -> Any:
        """Send a request once and return the decoded answer."""
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        with contextlib.closing(kind(self._host, self._port, timeout=CONNECT_S)) as connection:
            try:
                connection.connect()
            except OSError as error:
                raise _UnavailableError(str(error)) from error
            connection.sock.settimeout(timeout_s + MARGIN_S)
            try:
                connection.request("POST", self._path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                text = response.read()
            except TimeoutError:
                raise
            except (OSError, http.client.HTTPException) as error:
                raise _UnavailableError(f"{type(error).__name__}: {error}") from error
        if response.status in RETRIED:
            raise _UnavailableError(f"HTTP {response.status}")
        if response.status != 200:
            return {
                "status": "SandboxError",
                "message": f"HTTP {response.status}: {text[:200].decode(errors='replace')}",
            }
        try:
            return json.loads(text)
        except ValueError:
            return None

    def _result(self, answer: Any) -> RunResult:
        if not isinstance(answer, dict) or answer.get("status") not in get_args(RunStatus):
            return _failure(f"the server at {self._url} gave an answer that is not SandboxFusion's")
        run = answer.get("run_result") or {}
        ending: Any = run.get("status")
        if answer["status"] == "SandboxError" or ending not in get_args(Ending):
            return _failure(str(answer.get("message") or "the server gives no reason"))
        return RunResult(
            answer["status"],
            ending,
            run.get("return_code"),
            str(run.get("stdout") or "")[: self._max_output_chars],
            str(run.get("stderr") or "")[-self._max_output_chars :],
            float(run.get("execution_time") or 0.0),
            str(answer.get("message") or ""),
        )


def _failure(message: str) -> RunResult:
    return RunResult("SandboxError", "Error", None, "", "", 0.0, message)
