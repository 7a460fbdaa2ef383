"""Demonstrations as JSONL: what is written is read back, TRL's form is understood, wrong lines are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.envs.registry import make_task_set
from spear_fast.envs.tool_schema import tool_schema
from spear_fast.errors import TaskError
from spear_fast.rollout.demo_file import demo_record, read_demos, write_demos
from spear_fast.rollout.demos import demonstrate, demonstration_text, demonstrations
from spear_fast.rollout.tool_calls import ToolCall, parse_tool_calls
from tests.toys import echo

ASK = {"role": "user", "content": "Say a."}
SAY = {"role": "assistant", "content": "a"}
CALL = {"function": {"name": "echo", "arguments": {"text": "a"}}}


@pytest.fixture(scope="module")
def calculator():
    return make_task_set("calculator", {"num_eval": 1}, seed=1)


@pytest.fixture(scope="module")
def written(calculator, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demos") / "new" / "demos.jsonl"
    made = demonstrations(calculator, 5, max_turns=9, seed=2)
    records = (demo_record(calculator, task, messages, 2) for task, messages in made)
    assert write_demos(path, records) == 5
    return path


def lines_of(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "demos.jsonl"
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


def test_what_is_written_is_read_back(calculator, written):
    assert read_demos(written, calculator.tools) == demonstrate(calculator, 5, max_turns=9, seed=2)
    assert [path.name for path in written.parent.iterdir()] == ["demos.jsonl"]
    first = json.loads(written.read_text().splitlines()[0])
    assert first["task"] == {"name": "calculator", "split": "demo", "index": 0, "seed": 2}
    assert first["success"] is True


def test_a_failure_on_the_way_leaves_the_old_file(tmp_path):
    def records():
        yield {"messages": []}
        raise TaskError("the expert failed")

    path = tmp_path / "demos.jsonl"
    path.write_text("old")
    with pytest.raises(TaskError, match="the expert failed"):
        write_demos(path, records())
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("demos.jsonl", "old")]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TaskError, match="cannot write demonstrations"):
        write_demos(tmp_path / "file" / "demos.jsonl", [])


def test_trl_renders_the_lines_as_a_rollout_would(calculator, written):
    """TRL's SFTTrainer loads such a file with `datasets` and calls the tokenizer's template with `tools`."""
    from datasets import load_dataset

    demos = demonstrate(calculator, 5, max_turns=9, seed=2)
    tokenizer = train_tokenizer(map(demonstration_text, demos), 400)
    rows = load_dataset("json", data_files=str(written), split="train", cache_dir=str(written.parent / "cache"))
    chat = Chat(tokenizer, [tool_schema(tool) for tool in calculator.tools])
    for row, demo in zip(rows, demos, strict=True):
        theirs = tokenizer.apply_chat_template(row["messages"], tools=row["tools"], tokenize=False)
        assert theirs.startswith(tokenizer.decode(chat.prompt(demo[:2])))
        assert theirs.count("<|im_end|>") == len(demo)


@pytest.mark.parametrize("arguments", [{"text": "a"}, '{"text": "a"}'])
def test_calls_and_thoughts_in_fields_of_their_own_become_text(tmp_path, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "echo", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "reasoning_content": "An echo.", "tool_calls": [call, call]}
    reply = {"role": "tool", "content": "a", "tool_call_id": "1", "name": "echo"}
    conversation = [ASK, message, reply, {"role": "assistant", "content": "a", "tool_calls": None}]
    [demo] = read_demos(lines_of(tmp_path, {"messages": conversation}, ""), [echo])
    assert parse_tool_calls(demo[1]["content"]) == [ToolCall("echo", {"text": "a"})] * 2
    assert demo[1]["content"].startswith("<think>\nAn echo.\n</think>\n<tool_call>")
    assert demo[2:] == [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}]


def test_a_message_of_weight_0_keeps_it(tmp_path):
    conversation = [ASK, {**SAY, "weight": 0}, ASK, {**SAY, "weight": 1}]
    assert read_demos(lines_of(tmp_path, {"messages": conversation}), []) == [[ASK, conversation[1], ASK, SAY]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ([], "field 'messages' must be a list of messages; the line has list"),
        ({"prompt": "a"}, "field 'messages' must be a list of messages; the line has prompt"),
        ({"messages": [ASK]}, "no assistant's message"),
        ({"messages": [ASK, "a"]}, r"messages\[1\].role must be one of"),
        ({"messages": [ASK, {"role": "model", "content": "a"}]}, r"messages\[1\].role must be one of"),
        ({"messages": [ASK, {"role": "assistant"}]}, r"messages\[1\].content must be text, not NoneType"),
        ({"messages": [{"role": "user", "content": [ASK]}]}, r"messages\[0\].content must be text, not list"),
        ({"messages": [{**ASK, "mood": 0}]}, r"messages\[0\].mood: unknown field"),
        ({"messages": [{**ASK, "weight": 0}]}, r"messages\[0\].weight: only an assistant's"),
        ({"messages": [ASK, {**SAY, "weight": 0.5}]}, r"messages\[1\].weight must be 1.* it is 0.5"),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "no assistant's message of weight 1"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}]}, r"messages\[0\].tool_calls: only an assistant's"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": ["a"]}]}, r"messages\[1\].tool_calls\[0\] must be of"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "echo", "arguments": "a"}]}]},
            r"tool_calls\[0\].function.arguments is not JSON",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "echo", "arguments": []}]}]},
            r"arguments must be an object, not list",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, r"messages\[0\].role: .* cannot stand first"),
        ({"messages": [ASK, *[{"role": "assistant", "content": "a"}] * 2]}, r"messages\[2\].role: .* after the"),
        ({"messages": [ASK, {"role": "system", "content": "a"}, CALL]}, r"messages\[2\].role must be one of"),
        (
            {"messages": [ASK, {"role": "system", "content": "a"}, ASK, {"role": "assistant", "content": "a"}]},
            "a system message can only be the first",
        ),
        ({"messages": [ASK], "tools": 3}, "field 'tools' must be a list of OpenAI function schemas"),
        ({"messages": [ASK], "tools": []}, "field 'tools' has none, but the task set shows the policy echo"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(tmp_path, line, said):
    right = {"messages": [ASK, {"role": "assistant", "content": "a"}]}
    with pytest.raises(TaskError, match=rf"demos.jsonl, line 3: .*{said}"):
        read_demos(lines_of(tmp_path, right, "", line), [echo])


def test_a_file_without_demonstrations_is_refused(tmp_path):
    with pytest.raises(TaskError, match="is empty"):
        read_demos(lines_of(tmp_path, ""), [])
    with pytest.raises(TaskError, match="cannot be read"):
        read_demos(tmp_path / "nowhere.jsonl", [])
