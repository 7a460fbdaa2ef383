"""What the policy is fed: windows, rows forked where a template rewrites, and the same rows from demonstrations."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import pytest

from spear_fast.batching import rows_from_groups
from spear_fast.data.chat import Chat
from spear_fast.data.tokenizer import train_tokenizer
from spear_fast.rollout.demos import demonstration_rows
from spear_fast.rollout.episode import Episode
from spear_fast.rollout.history import FULL, History, HistoryRule, without_thoughts
from spear_fast.rollout.scripted_engine import ScriptedEngine
from spear_fast.types import Group, Status, Task, Trajectory
from tests.rollout.test_episode import ECHO, LIMITS
from tests.toys import GuessEnv, GuessTasks, ToolTasks

TALK = ["<think>aa bb</think>first", "<think>cc</think>second", "third", "<think>dd</think>fourth"]

# As Qwen3's: thoughts are shown from the last user message on, in a fixed form, and left out before it.
THOUGHT_DROPPING = """\
{%- set state = namespace(last_user=0) -%}
{%- for message in messages if message.role == 'user' -%}
{%- set state.last_user = messages.index(message) -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set text = message.content -%}
{%- if message.role == 'assistant' and '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
{%- if loop.index0 > state.last_user -%}
{%- set text = '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ text -%}
{%- endif -%}
{%- endif -%}
<|im_start|>{{ message.role }}
{{ text }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
# As DeepSeek-R1's: the header of the next message opens its thought, which later renderings leave out.
OPENED_THOUGHT = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<think>
{% endif -%}
"""
TRIMMING = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


class TalkEnv(GuessEnv):
    """Answers "n?" to the n-th message; the fourth ends the episode."""

    async def reset(self, *, seed, options):
        self._said = 0
        return "goal", {"task_type": "talk"}

    async def step(self, text):
        self._said += 1
        return f"{self._said}?", 0.25, self._said == 4, False, {"won": self._said == 4}


class TalkTasks(GuessTasks):
    system_prompt = "Talk."

    def make(self):
        return TalkEnv()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([ECHO, *TALK, "system\nuser\nassistant\ngoal 0? Talk."] * 9, 300)


@pytest.fixture(scope="module")
def chat(tokenizer) -> Chat:
    return Chat(tokenizer)


def with_template(tokenizer, template: str) -> Chat:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return Chat(other)


def play(chat: Chat, texts: list[str], tasks=None, **limits) -> Trajectory:
    spoken = iter(texts)
    trajectory = Trajectory(Task("talk", "train", 0, seed=5), group_id=0, sample=0, uid=3, version=0)
    engine = ScriptedEngine(lambda _: chat.message(next(spoken)))
    episode = Episode(trajectory, tasks or TalkTasks(None, 0), engine, chat, replace(LIMITS, **limits), seed=1)
    return asyncio.run(episode.run())


def shown(chat: Chat, trajectory: Trajectory) -> list[str]:
    return [chat.tokenizer.decode(trajectory.tokens[start:end]) for start, end in trajectory.row_spans]


def rendered(chat: Chat, *said: tuple[str, str]) -> str:
    messages = [{"role": role, "content": content} for role, content in said]
    return chat.tokenizer.decode(chat.prompt(messages))


def test_a_window_holds_the_opening_and_the_last_exchanges(chat):
    trajectory = play(chat, TALK, history=HistoryRule("windowed", window=2))
    opening = (("system", "Talk."), ("user", "goal"))
    prompts = [
        rendered(chat, *opening),
        rendered(chat, *opening, ("assistant", "first"), ("user", "1?")),
        rendered(chat, *opening, ("assistant", "first"), ("user", "1?"), ("assistant", "second"), ("user", "2?")),
        rendered(chat, *opening, ("assistant", "second"), ("user", "2?"), ("assistant", "third"), ("user", "3?")),
    ]
    assert shown(chat, trajectory) == [f"{p}{text}<|im_end|>" for p, text in zip(prompts, TALK, strict=True)]
    assert trajectory.success and trajectory.task_type == "talk" and trajectory.outcome_reward == 1.0
    spoken = [chat.tokenizer.decode(trajectory.tokens[turn.start : turn.end]) for turn in trajectory.turns]
    assert spoken == [f"{text}<|im_end|>" for text in TALK]
    assert [len(trajectory.row_turns(part)) for part in range(4)] == [1] * 4
    assert [message["content"] for message in trajectory.messages if message["role"] == "assistant"] == TALK


def test_thoughts_stay_when_asked_for(chat):
    trajectory = play(chat, TALK, history=HistoryRule("windowed", window=1, drop_thoughts=False))
    last = rendered(chat, ("system", "Talk."), ("user", "goal"), ("assistant", TALK[2]), ("user", "3?"))
    assert shown(chat, trajectory)[3] == f"{last}{TALK[3]}<|im_end|>"
    assert TALK[0] in shown(chat, trajectory)[1]


def test_an_opening_with_examples_is_kept_whole(chat):
    opening = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    said = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}, {"role": "tool", "content": "z"}]
    history = History(chat, HistoryRule("windowed", window=1))
    history.open(opening)
    fed = history.follow([*opening, *said, *said], num_new=2, ended=True)
    assert fed == (chat.prompt([*opening, *said]), True)


def test_the_token_limit_is_that_of_one_row(chat):
    rule = HistoryRule("windowed", window=1)
    lengths = [end - start for start, end in play(chat, TALK, history=rule).row_spans]
    whole = play(chat, TALK, history=rule, max_tokens=max(lengths))
    assert whole.status is Status.OK and sum(lengths) > max(lengths)
    cut = play(chat, TALK, history=rule, max_tokens=lengths[1] - len(chat.message(TALK[1])))
    assert (cut.status, len(cut.turns), len(cut.row_starts)) == (Status.TRUNCATED, 1, 2)
    full = play(chat, TALK, max_tokens=max(lengths))
    assert full.status is Status.TRUNCATED and full.row_starts == [0]


@pytest.mark.parametrize("template", [None, TRIMMING])
def test_templates_that_keep_earlier_messages_give_one_row(tokenizer, chat, template):
    used = chat if template is None else with_template(tokenizer, template)
    trajectory = play(used, [f"{text} " for text in TALK])
    assert trajectory.row_starts == [0] and len(trajectory.turns) == 4


def test_a_template_that_drops_thoughts_forks_a_row_where_it_does(tokenizer):
    chat = with_template(tokenizer, THOUGHT_DROPPING)
    trajectory = play(chat, TALK)
    opening = (("system", "Talk."), ("user", "goal"))
    first, second, third = shown(chat, trajectory)
    assert first == rendered(chat, *opening) + TALK[0] + "<|im_end|>"
    assert second == (rendered(chat, *opening, ("assistant", "first"), ("user", "1?")) + TALK[1] + "<|im_end|>")
    # "third" has no thought, so its row goes on.
    before = rendered(chat, *opening, ("assistant", "first"), ("user", "1?"), ("assistant", "second"), ("user", "2?"))
    tail = "<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n"
    assert third == f"{before}third<|im_end|>\n{tail}{TALK[3]}<|im_end|>"
    assert trajectory.num_action_tokens == sum(len(chat.message(text)) for text in TALK), "each message is trained once"
    assert "aa bb" not in second + third


def test_thoughts_between_tool_calls_are_kept_in_one_row(tokenizer):
    chat = with_template(tokenizer, THOUGHT_DROPPING)
    trajectory = play(chat, [f"<think>a</think>{ECHO}", ECHO, "7"], tasks=ToolTasks(None, 0))
    assert trajectory.success and trajectory.row_starts == [0], "white space alone forks nothing"


def test_a_header_that_opens_a_thought_forks_rows(tokenizer):
    chat = with_template(tokenizer, OPENED_THOUGHT)
    trajectory = play(chat, ["aa</think>first", "bb</think>second", "cc</think>third", "dd</think>fourth"])
    rows = shown(chat, trajectory)
    assert len(rows) == 4 and all(row.count("<think>") == 1 for row in rows)
    assert "first<|im_end|>" in rows[3] and "aa" not in rows[3]


@pytest.mark.parametrize(
    ("template", "rule", "num_rows"),
    [(None, FULL, 1), (THOUGHT_DROPPING, FULL, 3), (THOUGHT_DROPPING, HistoryRule("windowed", 3, False), 4)],
)
def test_demonstrations_and_training_rows_agree(tokenizer, chat, template, rule, num_rows):
    used = chat if template is None else with_template(tokenizer, template)
    trajectory = play(used, TALK, history=rule)
    trajectory.advantages = trajectory.action_mask
    rollout = rows_from_groups([Group(3, trajectory.task, [trajectory])])
    messages = [m for m in trajectory.messages if m["content"] != "4?"]
    demos = demonstration_rows(messages, used, 3, rule)
    assert len(demos) == len(rollout) == num_rows
    for demo, row in zip(demos, rollout, strict=True):
        assert (demo.uid, demo.tokens.tolist()) == (row.uid, row.tokens.tolist())
        assert demo.action_mask.tolist() == row.action_mask.tolist()
        assert demo.advantages.tolist() == row.advantages.tolist()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("<think>a</think> b ", "b"),
        ("a</think>b", "b"),
        ("b<think>a", "b"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("b", "b"),
    ],
)
def test_what_is_left_without_thoughts(text, kept):
    assert without_thoughts(text) == kept
