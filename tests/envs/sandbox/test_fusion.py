"""The SandboxFusion client against a real HTTP server that answers in its documented shape by running our sandbox."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from spear_fast.envs.sandbox import fusion
from spear_fast.envs.sandbox.bubblewrap import BubblewrapSandbox
from spear_fast.envs.sandbox.choose import SandboxParams, make_sandbox
from spear_fast.envs.sandbox.jail import Limits
from spear_fast.errors import ConfigError

LIMITS = Limits(memory_mb=512, max_output_chars=1000, max_processes=16, disk_mb=16)


class Server(ThreadingHTTPServer):
    """`script` holds what to answer before it behaves: an HTTP status, raw bytes, or None to hang up."""

    daemon_threads = True

    def __init__(self, sandbox: BubblewrapSandbox) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.sandbox = sandbox
        self.script: list[int | bytes | None] = []
        self.requests: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, **request})
        scripted = self.server.script.pop(0) if self.server.script else b""
        if scripted is None:
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(scripted, int):
            self.answer(scripted, b"out of order")
        else:
            self.answer(200, scripted or self.run(request))

    def run(self, request: dict[str, Any]) -> bytes:
        files = {name: base64.b64decode(content) for name, content in request["files"].items()}
        result = asyncio.run(
            self.server.sandbox.run(
                request["code"], timeout_s=request["run_timeout"], stdin=request["stdin"], files=files
            )
        )
        run_result = {
            "status": result.ending,
            "execution_time": result.execution_time,
            "return_code": result.return_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
        }
        answer = {"status": result.status, "message": result.message, "compile_result": None, "run_result": run_result}
        return json.dumps({**answer, "executor_pod_name": None, "files": {}}).encode()

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    sandbox = BubblewrapSandbox(2, LIMITS, [])
    server = Server(sandbox)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    sandbox.close()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(fusion, "WAITS_S", (0.0, 0.0))
    running.script.clear()
    running.requests.clear()
    return running


def run(url: str, code: str, timeout_s: float = 20.0, **more: Any):
    sandbox = make_sandbox(SandboxParams(kind="sandbox_fusion", url=url, memory_mb=512))
    try:
        return asyncio.run(sandbox.run(code, timeout_s=timeout_s, **more))
    finally:
        sandbox.close()


def test_results_are_those_of_the_server(server):
    good = run(server.url, "print(input(), open('d/f').read())", stdin="in", files={"d/f": b"file"})
    assert (good.status, good.ending, good.return_code, good.stdout) == ("Success", "Finished", 0, "in file\n")
    assert good.execution_time > 0
    sent = server.requests[0]
    assert (sent["path"], sent["language"], sent["run_timeout"], sent["memory_limit_MB"]) == (
        "/run_code", "python", 20.0, 512
    )  # fmt: skip
    bad = run(server.url + "/run_code", "1/0")
    assert (bad.status, bad.return_code) == ("Failed", 1) and bad.stderr.endswith("division by zero\n")
    late = run(server.url + "/", "while True: pass", timeout_s=0.3)
    assert (late.status, late.ending) == ("Failed", "TimeLimitExceeded")
    assert [request["path"] for request in server.requests] == ["/run_code"] * 3


def test_requests_run_beside_each_other_and_the_loop_goes_on(server):
    sandbox = make_sandbox(SandboxParams(kind="sandbox_fusion", url=server.url, workers=2))
    code = "import time\nbegan = time.monotonic()\ntime.sleep(0.2)\nprint(began, time.monotonic())"

    async def two():
        return await asyncio.gather(*(sandbox.run(code, timeout_s=20.0) for _ in range(2)))

    first, second = (tuple(map(float, result.stdout.split())) for result in asyncio.run(two()))
    assert first[0] < second[1] and second[0] < first[1]


@pytest.mark.parametrize("trouble", [[503], [429, 502], [None], [None, 503]])
def test_a_server_in_trouble_is_asked_again(server, trouble):
    server.script = list(trouble)
    assert run(server.url, "print(1)").stdout == "1\n"
    assert len(server.requests) == len(trouble) + 1


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([503, 503, 503], "cannot be reached: HTTP 503"),
        ([None, None, None], "cannot be reached"),
        ([500], "HTTP 500: out of order"),
        ([404], "HTTP 404"),
        ([b"<html>"], "not SandboxFusion's"),
        ([b'{"status": "Fine"}'], "not SandboxFusion's"),
        ([b'{"status": "SandboxError", "message": "no room"}'], "no room"),
        ([b'{"status": "Success", "run_result": null}'], "no reason"),
    ],
)
def test_a_server_that_fails_says_so_in_the_result(server, answers, reason):
    server.script = list(answers)
    result = run(server.url, "print(1)")
    assert (result.status, result.ending, result.stdout) == ("SandboxError", "Error", "")
    assert reason in result.message
    assert len(server.requests) == len(answers)


def test_a_slow_server_is_not_asked_twice(server, monkeypatch):
    monkeypatch.setattr(fusion, "MARGIN_S", -1.8)
    result = run(server.url, "import time\ntime.sleep(5)", timeout_s=2.0)
    assert result.status == "SandboxError" and "no answer within" in result.message
    assert len(server.requests) == 1


def test_wrong_addresses_are_refused_before_any_work():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for url, reason in (
        (f"http://127.0.0.1:{port}", "no server answers there"),
        ("127.0.0.1:8080", "no HTTP address"),
        ("ftp://127.0.0.1", "no HTTP address"),
        ("http://127.0.0.1:99999", "no HTTP address"),
    ):
        with pytest.raises(ConfigError, match=reason):
            make_sandbox(SandboxParams(kind="sandbox_fusion", url=url))
