"""OpenEnv's own server and client, played through the adapter."""

from __future__ import annotations

import asyncio
import importlib
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn  # pyright: ignore[reportMissingImports]

from spear_fast.envs.registry import make_task_set
from spear_fast.errors import ConfigError
from spear_fast.types import Status
from tests.environments_page import play, play_async, task_set

Messages = list[dict[str, Any]]


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The server of docs/environments.md, on a free port of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = importlib.import_module("count_server").app
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)


def count_down(messages: Messages) -> str:
    start = int(next(re.findall(r"from (\d+)", each["content"])[0] for each in messages if each["role"] == "user"))
    said = sum(each["role"] == "assistant" for each in messages)
    return f"<action>{start - said}</action>"


def test_the_page_is_played_and_won(url: str) -> None:
    tasks = task_set("count_server", url=url)
    for split in ("train", "eval"):
        won = play(tasks, count_down, split, 3)
        assert (won.error, won.success, won.outcome_reward) == (None, True, 1.0)
    lost = play(tasks, lambda _: "<action>99</action>")
    assert (lost.error, lost.success, len(lost.turns)) == (None, False, 1)


def test_the_index_decides_the_task(url: str) -> None:
    tasks = task_set("count_server", url=url)
    openings = [play(tasks, count_down, "eval", index).messages[1]["content"] for index in (0, 0, 1)]
    assert openings[0] == openings[1] != openings[2]


def test_more_episodes_than_sessions_wait_for_their_turn(url: str) -> None:
    tasks = task_set("count_server", url=url, sessions=2)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(play_async(tasks, count_down, index=index) for index in range(8)))

    played = asyncio.run(all_of_them())
    assert [(each.error, each.success) for each in played] == [(None, True)] * 8


@pytest.mark.parametrize(
    ("params", "message", "problem"),
    [
        ({}, "no tag", "no <action> tag"),
        ({"action_format": "json"}, "<action>{</action>", "not valid JSON"),
        ({"action_format": "json"}, "<action>[]</action>", "not a JSON object"),
        ({"action_format": "json"}, '<action>{"words": "1"}</action>', "VALIDATION_ERROR"),
        ({"action_format": "json", "action": "count_server:Say"}, '<action>{"words": 1}</action>', "Field required"),
    ],
)
def test_what_cannot_be_read_costs_the_penalty(url: str, params: dict[str, Any], message: str, problem: str) -> None:
    tasks = task_set("count_server", url=url, max_steps=2, invalid_penalty=0.25, **params)
    played = play(tasks, lambda _: message)
    assert (played.error, played.outcome_reward, len(played.turns)) == (None, -0.5, 2)
    assert problem in played.messages[3]["content"] and "Count down from" in played.messages[3]["content"]
    assert not any(turn.action_valid for turn in played.turns)


def test_typed_actions_and_json_are_understood(url: str) -> None:
    tasks = task_set("count_server", url=url, action_format="json", action="count_server:Say")

    def as_json(messages: Messages) -> str:
        return count_down(messages).replace("<action>", '<action>{"message": "').replace("</action>", '"}</action>')

    assert play(tasks, as_json).success
    plain = task_set("count_server", url=url, action_format="message")
    assert play(plain, lambda messages: re.sub("<.*?>", "", count_down(messages))).success


def test_a_client_with_blocking_calls_is_played_in_threads(url: str, tmp_path: Path) -> None:
    (tmp_path / "blocking.py").write_text(
        "from openenv.core import GenericEnvClient\n"
        "def client(**arguments):\n    return GenericEnvClient(**arguments).sync()\n"
    )
    assert play(task_set("count_server", url=url, client="blocking:client"), count_down).success


def test_a_server_that_is_not_there_is_an_error_of_the_trajectory() -> None:
    played = play(task_set("count_server", url="http://127.0.0.1:9"), count_down)
    assert played.status is Status.ENV_ERROR and "Failed to connect" in str(played.error)


def test_observations_without_the_named_field_are_shown(url: str) -> None:
    played = play(task_set("count_server", url=url, observation_field="words"), count_down)
    assert "observation_field='words'" in str(played.error) and "Count down" in str(played.error)


@pytest.mark.parametrize("params", [{}, {"observation_field": "text", "render_text": "json:dumps"}])
def test_the_text_has_one_source(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="observation_field or task"):
        make_task_set("openenv", {"url": "http://127.0.0.1:9", **params}, 0)
