"""The benchmarks of rollout engines and of weight sync: what they refuse, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import rollout, sync
from bench.common.engine_start import EngineSettings, random_model, shape_of, start_engine
from bench.common.shapes import write_shape
from bench.engines.contenders import Message, TransformersGenerate
from bench.engines.gate import complaint, gap, too_far
from bench.engines.load import SUITES, Turn, Workload, conversations
from spear_fast.errors import EngineError, MissingDependencyError
from spear_fast.rollout import vllm_compat
from spear_fast.rollout.hf_engine import HFEngine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shape(shape_of("1m"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return random_model(folder, torch.float32, CPU)


@pytest.fixture
def no_vllm(monkeypatch):
    def absent() -> None:
        raise MissingDependencyError("vllm", "vllm", "engine.name=vllm")

    monkeypatch.setattr(vllm_compat, "require_package", absent)


@torch.no_grad()
def logps_of(model, prompt: list[int], tokens: list[int]) -> list[float]:
    logits = model.double()(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    model.float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def test_conversations_have_the_lengths_of_their_workload_whatever_their_seed():
    load = Workload("w", 6, 7, 5, long_tail=20, group=3, turns=2, observe_tokens=4)
    ones, others = conversations(load, 100, 1), conversations(load, 100, 2)
    for one, other in zip(ones, others, strict=True):
        assert [turn.max_tokens for turn in one.turns] == [turn.max_tokens for turn in other.turns]
        assert [len(turn.observed) for turn in one.turns] == [4, 0]
        assert one.num_tokens == 7 + one.sampled + 4 and one.prompt != other.prompt
    assert [one.prompt == ones[0].prompt for one in ones] == [True] * 3 + [False] * 3
    assert len({one.uid for one in ones + others}) == 12 and len({one.seed for one in ones + others}) == 12
    assert max(turn.max_tokens for one in ones for turn in one.turns) <= 20


@pytest.mark.parametrize("suite", SUITES.values())
def test_suites_fit_their_models(suite):
    shape = shape_of(suite.size)
    assert shape["hidden_size"] % shape["num_attention_heads"] == 0
    for workload in suite.workloads:
        for one in conversations(workload, shape["vocab_size"], 0):
            assert one.num_tokens <= shape["max_position_embeddings"]


def test_the_gate_measures_the_gap_of_every_message(model):
    prompt, between = [3, 1, 4, 1], [5, 9]
    first, second = [2, 6, 5], [3, 5]
    context = [*prompt, *first, *between]
    exact = [
        Message(prompt, first, logps_of(model, prompt, first), 0.0),
        Message(context, second, logps_of(model, context, second), 0.0),
    ]
    found = gap(model, [exact])
    assert found["gap_max_nats"] < 1e-5 and not too_far(found, "float32")
    assert exact[1].logps is not None
    for error, message in ((0.02, 0), (0.02, 1), (float("nan"), 1)):
        off = [Message(one.prompt, one.tokens, list(one.logps or []), 0.0) for one in exact]
        assert off[message].logps is not None
        off[message].logps = [logp + error for logp in off[message].logps or []]
        assert too_far(gap(model, [off]), "float32")
    with pytest.raises(ValueError, match="without log-probs"):
        gap(model, [[Message(prompt, first, None, 0.0)]])


def test_generate_pads_on_the_left_and_cuts_each_message(model):
    prompts, turns = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]], [Turn(2), Turn(5), Turn(1)]
    messages = TransformersGenerate(model, batch=2).generate(prompts, turns, [1, 2, 3], 0.0, logps=True)
    for message, prompt, turn in zip(messages, prompts, turns, strict=True):
        assert message.prompt == prompt and len(message.tokens) == turn.max_tokens
        assert message.logps == pytest.approx(logps_of(model, prompt, message.tokens), abs=1e-4)


class Wrong:
    """A contender whose answers are changed on the way."""

    computes = "tokens and log-probs"

    def __init__(self, contender, change) -> None:
        self._contender, self._change = contender, change

    def run(self, conversations, *, logps):
        answers = self._contender.run(conversations, logps=True)
        for messages in answers:
            for message in messages:
                self._change(message)
        return answers

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda message: message.logps.__setitem__(0, message.logps[0] + 0.1), "log-probs are"),
        (lambda message: message.tokens.pop(), "instead of"),
    ],
)
def test_wrong_answers_get_no_speed(model, change, reason):
    suite = SUITES["tiny"]
    row = rollout.workload_row(Wrong(TransformersGenerate(model, 4), change), suite.workloads[0], suite, model)
    assert row["status"] == "refused" and reason in row["reason"] and "median_s" not in row
    assert complaint(conversations(suite.workloads[0], 9, 0), [[], [], []]) is not None


def test_the_rollout_benchmark_runs_and_says_what_is_missing(tmp_path, no_vllm):
    arguments = ["--suite", "tiny", "--repeats", "1", "--out", str(tmp_path / "rollout.json")]
    assert rollout.main(arguments) == 0
    result = json.loads((tmp_path / "rollout.json").read_text())
    *workloads, collector = result["cases"]
    assert [case["name"] for case in workloads] == [load.name for load in SUITES["tiny"].workloads]
    for case in workloads:
        assert list(case["rows"]) == list(rollout.NAMES)
        for name, row in case["rows"].items():
            assert row["status"] == ("not installed" if "vllm" in name else "measured"), row
        for name in ("hf", "transformers"):
            assert case["rows"][name]["gap_max_nats"] < 1e-4
    assert workloads[3]["rows"]["hf"]["tokens"] == 3 * 2 * 3
    # Eight turns of 32 tokens in each episode, unless the game ends before.
    assert 0 < collector["rows"]["scripted"]["tokens"] <= collector["rows"]["scripted"]["episodes"] * 8 * 32
    shown = rollout.markdown(result)
    assert "| vllm | not installed |" in shown
    reason = "No figure: vllm, vllm-process, vllm-direct (not installed: `MissingDependencyError"
    assert shown.count(reason) == len(workloads)


def test_a_check_that_cannot_be_made_refuses_the_row_and_asks_for_some_conversations_only(model):
    asked = []

    class Full(TransformersGenerate):
        def run(self, conversations, *, logps):
            if logps:
                asked.append(len(conversations))
                raise torch.OutOfMemoryError("no room")
            return super().run(conversations, logps=logps)

    load = Workload("many", 40, 3, 2)
    row = rollout.workload_row(Full(model, 40), load, SUITES["tiny"], model)
    assert row["status"] == "refused" and row["reason"].endswith("OutOfMemoryError: no room")
    assert asked == [20] and "median_s" not in row


def test_what_was_measured_is_written_before_the_next_contender(tmp_path, monkeypatch):
    rows_of = rollout.contender_rows

    def stopped(name, *others):
        if name != "scripted":
            raise KeyboardInterrupt
        return rows_of(name, *others)

    monkeypatch.setattr(rollout, "contender_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        rollout.main(["--suite", "tiny", "--repeats", "1", "--out", str(tmp_path / "rollout.json")])
    found = json.loads((tmp_path / "rollout.json").read_text())
    assert all(case["rows"]["scripted"]["status"] == "measured" for case in found["cases"])

    run_load = sync.run_load
    monkeypatch.setattr(
        sync, "run_load", lambda load, *others: stopped("") if load.tied is False else run_load(load, *others)
    )
    with pytest.raises(KeyboardInterrupt):
        sync.main(["--suite", "tiny", "--repeats", "1", "--engines", "hf", "--out", str(tmp_path / "sync.json")])
    (case,) = json.loads((tmp_path / "sync.json").read_text())["cases"]
    assert case["rows"]["hf"]["status"] == "measured"


def test_the_device_is_waited_for_before_and_after_a_push_finishes(monkeypatch):
    order = []
    monkeypatch.setattr(sync, "_wait", lambda device: order.append(device.type))
    engine: Any = SimpleNamespace(_cache=SimpleNamespace(clear=lambda: order.append("clear")))
    with sync.finishing(engine, CPU) as seconds:
        engine._cache.clear()
    engine._cache.clear()
    assert order == ["cpu", "clear", "cpu", "clear"] and len(seconds) == 1


def test_the_sync_benchmark_runs_and_says_what_is_missing(tmp_path, no_vllm):
    assert sync.main(["--suite", "tiny", "--repeats", "1", "--out", str(tmp_path / "sync.json")]) == 0
    tied, own = json.loads((tmp_path / "sync.json").read_text())["cases"]
    assert list(tied["rows"]) == ["copy", *(f"{name}{end}" for name in sync.ENGINES for end in ("", ", verified"))]
    assert own["parameters"] - tied["parameters"] == 2048 * 128
    for case, width in ((tied, 4), (own, 2)):
        for name, row in case["rows"].items():
            assert row["status"] == ("not installed" if "vllm" in name else "measured")
            if "vllm" not in name:
                assert row["bytes"] == width * case["parameters"]
        for row in (case["rows"]["hf"], case["rows"]["hf, verified"]):
            phases = [row[f"{phase}_s"] for phase in ("gather", "write", "finish", "digest")]
            assert min(phases) >= 0 and sum(phases) <= row["median_s"]


def test_an_engine_that_keeps_old_weights_is_not_measured(folder, monkeypatch):
    settings = EngineSettings(torch.float32, CPU, max_model_tokens=128, max_concurrent=4)
    ranks = sync.start_ranks("cpu", sync.ParallelConfig(), shard=False)
    trainer = sync.make_trainer(sync.Load("1m", "float32"), folder, ranks)
    engine = start_engine("hf", folder, settings)
    pusher = sync.Pusher(trainer, engine, torch.float32, ranks)
    pusher.push(verify=False)
    load = HFEngine.load_weights

    def stale(self, named, version):
        for _ in named:
            pass
        self.weights_version = version

    monkeypatch.setattr(HFEngine, "load_weights", stale)
    with pytest.raises(EngineError, match="holds other values"):
        pusher.push(verify=False)
    monkeypatch.setattr(HFEngine, "load_weights", load)
    monkeypatch.setattr(sync, "_GROWTH", 1.0)
    with pytest.raises(EngineError, match="the same weights"):
        pusher.push(verify=False)
