"""bench/step.py: both trainers learn the same tokens, what differs is refused, and what fails is a row of the table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from bench import step
from bench.common.failures import NeedsCuda, failed_row
from bench.common.random_policy import build, first_word, make_tokenizer
from bench.steps import worker
from bench.steps.contender import Opening, StepReport, Turn, run, script_of
from bench.steps.ours import _Rows as Rows
from bench.steps.phases import PHASES, PhaseClock
from bench.steps.tables import markdown, table
from bench.steps.trl_trainer import CERTAIN, Forcing
from bench.steps.workloads import TrainedRow, digest, digest_of_actions, reward_of
from spear_fast.data.chat import Chat

WORKLOAD = "tools"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build("tiny", tmp_path_factory.mktemp("model")))


def take_steps(opening: Opening, count: int, folder: Path) -> list[StepReport]:
    """The reports of `count` steps taken in this process."""
    reports: list[StepReport | None] = []

    def turn(report: StepReport | None) -> bool:
        reports.append(report)
        return len(reports) <= count

    run(opening, turn, folder)
    return [report for report in reports if report is not None]


@pytest.fixture(scope="module")
def reports(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[StepReport]]:
    """Two steps of each trainer: the second must repeat the first's tokens under other weights."""
    pytest.importorskip("trl")
    blank = Opening("ours", "tiny", WORKLOAD, model, "cpu")
    return {
        "ours": take_steps(blank, 2, tmp_path_factory.mktemp("ours")),
        "trl": take_steps(replace(blank, trainer="trl", micro_batch=2), 1, tmp_path_factory.mktemp("trl")),
    }


def test_both_trainers_learn_the_scripts_tokens(reports: dict[str, list[StepReport]], model: str) -> None:
    script = script_of(Opening("ours", "tiny", WORKLOAD, model, "cpu"))
    ours, trl = reports["ours"], reports["trl"]
    assert script.latencies, "the workload should call tools"
    for report in [*ours, *trl]:
        assert step.complaint(report, ours[0], script) is None
        assert report.tokens == script.action_tokens
        assert sum(report.phases.values()) == pytest.approx(report.seconds)
        assert set(report.phases) == set(PHASES)
        assert report.phases["generation"] > 0
        assert report.phases["update"] > 0


def test_unequal_work_is_refused(reports: dict[str, list[StepReport]], model: str) -> None:
    script = script_of(Opening("ours", "tiny", WORKLOAD, model, "cpu"))
    good = reports["ours"][0]
    other = [-advantage for advantage in good.advantages]
    assert "action tokens" in str(step.complaint(replace(good, tokens=good.tokens - 1), good, script))
    other_words = replace(good, actions="0")
    assert "script" in str(step.complaint(other_words, other_words, script)), "also where there is no other row"
    assert "masks" in str(step.complaint(replace(good, digest="0"), good, script))
    assert "differ" in str(step.complaint(replace(good, advantages=other), good, script))
    zero = replace(good, advantages=[0.0] * len(other))
    assert "0" in str(step.complaint(zero, zero, script))


def test_digest_depends_on_each_token_and_mask() -> None:
    row = TrainedRow(0, 1, (5, 6, 7), (False, True, True), 0.5)
    first = TrainedRow(0, 0, (5,), (True,), 0.5)
    assert digest([row, first]) == digest([first, row])
    changed = [replace(row, tokens=(5, 6, 8)), replace(row, mask=(True, True, True)), replace(row, sample=2)]
    assert len({digest([first, each]) for each in (row, *changed)}) == 4
    assert digest_of_actions([row]) == digest_of_actions([replace(row, tokens=(9, 6, 7))])
    assert len({digest_of_actions([first, each]) for each in (row, *changed)}) == 4


def test_a_skipped_step_is_a_failure() -> None:
    trainer = SimpleNamespace(_roll_out=lambda: [], _update=lambda rows: bool(rows))
    Rows(trainer, 2)  # type: ignore[arg-type]
    assert trainer._update([1])
    with pytest.raises(ArithmeticError, match="skipped"):
        trainer._update([])


NEEDS_CUDA = step.WorkerError("kernels", "needs CUDA")


class FakeWorker:
    """A process that fails as `failures` says, and dies in the second step of plain TRL if `broken`."""

    report: StepReport
    seconds: dict[tuple[str, int], float]
    """Of a step, by row and micro-batch; 3 s if missing."""
    failures: dict[tuple[str, int], step.WorkerError]
    """By row and micro-batch."""
    opened: list[tuple[str, int]]
    ended: list[str]
    alive: list[FakeWorker]
    most_alive: int
    broken: bool

    def __init__(self, folder: Path, patience_s: float) -> None:
        self.row, self.steps, self.size = "", 0, 0
        self.alive.append(self)
        FakeWorker.most_alive = max(self.most_alive, len(self.alive))

    def open(self, opening: Opening) -> None:
        self.row, self.size = opening.trainer + ("-liger" if opening.liger else ""), opening.micro_batch
        self.opened.append((self.row, self.size))
        if error := self.failures.get(self.opened[-1]):
            raise error

    def step(self) -> StepReport:
        self.steps += 1
        if self.row == "trl" and self.steps == 2 and self.broken:
            raise step.WorkerLostError("killed")
        return replace(self.report, seconds=self.seconds.get((self.row, self.size), 3.0))

    def close(self) -> None:
        assert self.steps

    def end(self) -> None:
        self.ended.append(self.row)
        self.alive.remove(self)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, model: str) -> Iterator[type[FakeWorker]]:
    script = script_of(Opening("ours", "tiny", WORKLOAD, model, "cpu"))
    phases = dict.fromkeys(PHASES, 0.5)
    FakeWorker.report = StepReport(3.0, phases, 0.01, script.action_tokens, "d", script.digest(), [1.0, -1.0])
    FakeWorker.ended, FakeWorker.broken, FakeWorker.opened, FakeWorker.seconds = [], False, [], {}
    FakeWorker.alive, FakeWorker.most_alive = [], 0
    FakeWorker.failures = {("trl-liger", 4): NEEDS_CUDA}
    monkeypatch.setattr(step, "Worker", FakeWorker)
    yield FakeWorker


def measured(fake: type[FakeWorker], tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = tmp_path / "step.json"
    what = ["--size", "tiny", "--workload", WORKLOAD, "--only", "ours", "trl", "trl-liger"]
    code = step.main([*what, "--steps", "2", "--micro-batch", "0", "2", "--out", str(out), *options])
    return code, json.loads(out.read_text())


def test_a_failing_peer_is_a_row(fake: type[FakeWorker], tmp_path: Path) -> None:
    code, result = measured(fake, tmp_path)
    rows = result["cases"][0]["rows"]
    assert code == 0
    assert {"benchmark", "machine", "settings", "cases"} == set(result)
    assert {"size", "device", "dtype", "threads"} <= set(result["settings"])
    missing = {"status": "needs CUDA", "reason": "kernels"}
    assert rows["trl-liger"] == missing | {"micro_batches_tried": {"4": missing}}
    assert rows["ours"]["times_s"] == [3.0, 3.0]
    assert rows["ours"]["useful_tokens_per_s"] == pytest.approx(fake.report.tokens / 3.0)
    assert rows["trl"]["micro_batches_tried"] == {"4": {"seconds": 3.0}, "2": {"seconds": 3.0}}
    assert result["cases"][0]["ratio"] == pytest.approx(1.0)
    text = markdown(result)
    assert "| tools | TRL, transformers |" in text
    assert "Liger: needs CUDA: kernels" in text
    assert "needs CUDA: kernels" in table(result["cases"][0])


def test_a_lost_process_is_a_row_and_the_exit_says_so(fake: type[FakeWorker], tmp_path: Path) -> None:
    fake.broken = True
    code, result = measured(fake, tmp_path)
    assert code == 1
    assert result["cases"][0]["rows"]["trl"]["reason"] == "killed"
    assert "ratio" not in result["cases"][0]
    assert "trl" in fake.ended


def test_each_row_of_trl_takes_the_micro_batch_that_suits_it(fake: type[FakeWorker], tmp_path: Path) -> None:
    fake.seconds = {("trl", 2): 2.0, ("trl-liger", 2): 4.0}
    fake.failures = {}
    rows = measured(fake, tmp_path)[1]["cases"][0]["rows"]
    assert {name: rows[name]["facts"].get("micro_batch") for name in rows} == {"ours": None, "trl": 2, "trl-liger": 4}
    assert rows["trl-liger"]["micro_batches_tried"] == {"4": {"seconds": 3.0}, "2": {"seconds": 4.0}}


def test_a_smaller_micro_batch_is_tried_for_want_of_memory(fake: type[FakeWorker], tmp_path: Path) -> None:
    fake.failures = {("trl", 4): step.WorkerError("OutOfMemoryError: CUDA out of memory")}
    fake.failures |= {("trl-liger", size): step.WorkerError(f"MemoryError: {size}") for size in (4, 2)}
    rows = measured(fake, tmp_path)[1]["cases"][0]["rows"]
    assert rows["trl"]["facts"]["micro_batch"] == 2
    assert (rows["trl-liger"]["status"], rows["trl-liger"]["reason"]) == ("failed", "MemoryError: 2")
    assert fake.opened.count(("trl-liger", 4)) == fake.opened.count(("trl-liger", 2)) == 1


def test_apart_only_one_process_lives(fake: type[FakeWorker], tmp_path: Path) -> None:
    measured(fake, tmp_path, "--apart")
    assert (fake.most_alive, fake.alive) == (1, [])
    measured(fake, tmp_path)
    assert fake.most_alive == 3


def test_worker_serves_one_trainer_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    report = StepReport(1.0, {}, 0.0, 3, "d", "a", [1.0])
    answers = io.StringIO()
    freed: list[int] = []
    monkeypatch.setattr(worker, "_free", lambda: freed.append(len(answers.getvalue().splitlines())))

    def fake_run(opening: Opening, turn: Turn, folder: Path) -> None:
        if opening.liger:
            raise RuntimeError("no")
        go_on = turn(None)
        while go_on:
            go_on = turn(report)

    monkeypatch.setattr(worker, "run", fake_run)
    opening = asdict(Opening("ours", "tiny", WORKLOAD, "m", "cpu"))
    commands = [{"open": opening | {"liger": True}}, {"open": opening}, {"step": True}, {"step": True}, {"close": True}]
    worker.serve(io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), answers)
    got = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert got == [{"status": "failed", "reason": "RuntimeError: no"}, {}, asdict(report), asdict(report), {}]
    assert freed == [0, 4], "before the last answer of each trainer"


def test_liger_says_what_it_needs(tmp_path: Path, model: str) -> None:
    opening = Opening("trl", "tiny", WORKLOAD, model, "cpu", liger=True)
    with pytest.raises(NeedsCuda, match="Triton"):
        run(opening, lambda _: False, tmp_path)
    assert failed_row(NeedsCuda("x")) == {"status": "needs CUDA", "reason": "x"}
    assert failed_row(ModuleNotFoundError("x"))["status"] == "not installed"


def test_inner_phases_stop_the_outer_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bench.steps.phases.time.perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    clock = PhaseClock(torch.device("cpu"))
    with clock.phase("tools"):
        pass_time(1.0)
        with clock.phase("generation"):
            pass_time(4.0)
        pass_time(2.0)
    pass_time(8.0)
    assert clock.stop() == 15.0
    assert clock.seconds == dict.fromkeys(PHASES, 0.0) | {"tools": 3.0, "generation": 4.0, "rest": 8.0}


def test_forced_token_is_certain_at_its_place() -> None:
    processor = Forcing([[3, 1], [2]], prompt_length=2, device=torch.device("cpu"))
    scores = processor(torch.zeros(2, 2, dtype=torch.long), torch.randn(2, 5) * 10)
    assert scores.argmax(1).tolist() == [3, 2]
    assert scores.softmax(1)[0, 3].item() == 1.0
    assert scores.max().item() == CERTAIN
    later = processor(torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 5))
    assert later.argmax(1).tolist() == [1, 2]


def test_every_id_of_the_tokenizer_is_a_token_and_words_decode_alone(model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == 1024
    words = [tokenizer.decode([index]) for index in range(first_word(), 1024)]
    assert len(set(words)) == len(words)
    assert all(word.isalpha() and word.islower() for word in words)
    assert Chat(tokenizer).end_of_turn == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="vocab_size=100"):
        make_tokenizer(100)


def test_rewards_do_not_depend_on_how_a_message_is_stripped() -> None:
    assert reward_of(" abc\n") == reward_of("abc")
    assert reward_of("abc") != reward_of("abd")
