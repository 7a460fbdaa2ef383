"""The loss benchmark: what it counts, what it refuses to time, and that it runs from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import machine, ops
from bench.contenders import OWN, Contender, Outcome, actions_of, clipped_loss, loss_of_actions, naive
from bench.gate import gate_problem, truth_of
from bench.measure import alternate, resident_peak, run_step
from bench.problems import Head, Shape, loss_flops, make_problem, recompute_flops
from spear_kernels import linear_logprob
from spear_kernels.testing import OperationRecorder

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
HEAD = Head(16, 50, torch.float32)
OPTIONS = ops.Options(CPU, "hidden", repeats=2, seed=3, memory=False)


def step_of(name: str, level: str = "hidden"):
    contender = next(one for one in OWN if (one.name, one.level) == (name, level))
    return contender.build(CPU)


@pytest.mark.parametrize("active", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("live", [1.0, 0.5, 0.1])
def test_a_problem_has_the_shares_it_was_asked_for(active, live):
    problem = make_problem(Shape(HEAD, 64 * 40, active, live), CPU, seed=1)
    assert problem.num_active == int(problem.mask.sum()) == round(active * 40) * 64
    assert problem.num_live / problem.num_active == pytest.approx(live, abs=0.02)
    assert torch.equal(problem.rows, problem.mask.nonzero()[:, 0])


def test_where_logits_are_given_the_last_row_of_a_sequence_is_no_action():
    problem = make_problem(Shape(HEAD, 512), CPU, level="logits")
    assert problem.logits is not None
    assert problem.leaves == (problem.logits,)
    assert not problem.mask.view(64, 8)[:, -1].any()
    assert problem.num_active == 64 * 7


def test_old_logp_is_near_and_no_bound_is_in_force():
    problem = make_problem(Shape(HEAD, 512), CPU, seed=2)
    logp = torch.log_softmax((problem.hidden @ problem.weight.t()).detach().double(), 1)
    logp = logp.gather(1, problem.ids[:, None])[:, 0]
    assert (problem.old_logp - logp).abs().max() < 0.151
    assert logp.mean() > -3, "tokens are drawn from the head, so most are likely"


@pytest.mark.parametrize(("num_rows", "change"), [(100, {}), (128, {}), (512, {"active": 0.0}), (512, {"live": 1.5})])
def test_impossible_shapes_are_named(num_rows, change):
    with pytest.raises(ValueError, match=next(iter(change), "num_rows")):
        Shape(HEAD, num_rows, **change)


def flops_of(step, problem):
    with OperationRecorder() as seen:
        run_step(step, problem)
    return seen.matrix_flops


def recomputing(problem):
    """linear_logprob in chunks of a tenth of the rows, so that it cannot keep their logits."""
    actions = actions_of(problem)
    chunk_bytes = problem.num_active // 10 * HEAD.vocab_size * 4
    logp = linear_logprob(actions.inputs, problem.weight, actions.ids, chunk_bytes=chunk_bytes).logp
    return loss_of_actions(logp, actions, problem)


@pytest.mark.parametrize("active", [1.0, 0.7])
@pytest.mark.parametrize("live", [1.0, 0.5, 0.1])
def test_flop_formulas_are_what_the_operators_spend(active, live):
    problem = make_problem(Shape(HEAD, 1280, active, live), CPU)
    least = loss_flops(problem.num_active, problem.num_live, HEAD)
    expected = {
        "floor": least,
        "linear_policy_loss": least,
        "floor_dense": loss_flops(1280, 1280, HEAD),
        "naive": loss_flops(1280, 1280, HEAD),
    }
    for name, flops in expected.items():
        assert flops_of(step_of(name), problem) == flops, name
    recompute = recompute_flops(problem.num_active, problem.num_live, HEAD)
    assert flops_of(recomputing, problem) == recompute
    assert flops_of(step_of("linear_logprob"), problem) in (least, recompute)
    assert least == pytest.approx(2 * problem.num_active * (1 + 2 * problem.num_live / problem.num_active) * 50 * 16)


def test_the_gate_puts_every_bound_in_force():
    problem = gate_problem(torch.float32, CPU)
    logp = truth_of(problem, "ppo").logp
    ratio = (logp - problem.old_logp[problem.rows]).exp()
    gains = problem.advantages[problem.rows]
    assert ((ratio > 1.28) & (gains > 0)).any()
    assert ((ratio < 0.8) & (gains < 0)).any()
    assert ((ratio > 10) & (gains < 0)).any()
    assert (gains == 0).any()


def without_dual_clip(problem):
    ratio = (problem_logp(problem) - problem.old_logp).exp()
    losses = torch.maximum(-problem.advantages * ratio, -problem.advantages * ratio.clamp(0.8, 1.28))
    return Outcome((losses * problem.mask).sum() / problem.num_active)


def with_masked_rows(problem):
    losses = clipped_loss(problem_logp(problem), problem.old_logp, problem.advantages)
    return Outcome(losses.sum() / problem.num_active)


def with_half_the_gradient(problem):
    loss = naive(problem).loss
    return Outcome(loss / 2 + loss.detach() / 2)


def with_nan(problem):
    return Outcome(naive(problem).loss * float("nan"))


def with_a_frozen_head(problem):
    loss = naive(replace(problem, weight=problem.weight.detach())).loss
    return Outcome(loss + 0 * problem.weight.sum())


def problem_logp(problem):
    log_probs = torch.log_softmax(problem.hidden @ problem.weight.t(), 1)
    return log_probs.gather(1, problem.ids[:, None])[:, 0]


@pytest.mark.parametrize(
    "step", [without_dual_clip, with_masked_rows, with_half_the_gradient, with_nan, with_a_frozen_head]
)
def test_a_wrong_contender_gets_no_speed(step):
    contender = Contender(step.__name__, "something else", lambda device: step)
    entry = measured([contender], Shape(HEAD, 256))[step.__name__]
    assert entry["status"] == "refused"
    assert "off by" in entry["reason"]
    assert not {"times_s", "median_s", "tflop_per_s"} & entry.keys()


def test_a_contender_that_is_wrong_only_at_size_gets_no_speed():
    def step(problem):
        return naive(problem) if problem.shape.num_rows <= 512 else with_half_the_gradient(problem)

    contender = Contender("shrinks", "", lambda device: step)
    assert measured([contender], Shape(HEAD, 256))["shrinks"]["status"] == "measured"
    entry = measured([contender], Shape(HEAD, 1024))["shrinks"]
    assert entry["status"] == "refused"
    assert "times_s" not in entry


def test_failures_and_absences_are_reported_and_do_not_stop_the_others():
    def absent(device):
        raise ModuleNotFoundError("No module named 'somewhere'")

    def breaks(problem):
        raise RuntimeError("first line\nsecond line")

    def tires(problem):
        if problem.shape.head is HEAD and tired.append(1) is None and len(tired) > 2:
            raise torch.OutOfMemoryError("too much")
        return naive(problem)

    tired: list[int] = []
    contenders = [
        Contender("absent", "", absent, install="pip install somewhere"),
        Contender("breaks", "", lambda device: breaks),
        Contender("tires", "", lambda device: tires),
        Contender("elsewhere", "", absent, devices=("cuda",)),
        Contender("right", "", lambda device: naive),
    ]
    entries = measured(contenders, Shape(HEAD, 256))
    assert entries["absent"]["status"] == "not installed"
    assert entries["absent"]["install"] == "pip install somewhere"
    assert (entries["breaks"]["status"], entries["breaks"]["reason"]) == ("failed", "RuntimeError: first line")
    assert entries["tires"]["status"] == "out of memory"
    assert "times_s" not in entries["tires"]
    assert entries["elsewhere"]["status"] == "needs CUDA"
    assert len(entries["right"]["times_s"]) == 2


def measured(contenders, shape):
    contenders = [*ops.chosen("hidden", ("floor",)), *contenders]
    gates = {one.name: ops.gated(one, HEAD.dtype, OPTIONS) for one in contenders}
    case = ops.run_case(contenders, gates, shape, OPTIONS)
    assert ops.table(case)
    return case["contenders"]


@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_logprob"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_operators_pass_their_gate(name, dtype):
    (contender,) = (one for one in OWN if one.name == name)
    entry = ops.gated(contender, dtype, OPTIONS)
    assert entry["status"] == "passed"
    assert entry["gate"]["logp_max"] < 1e-4


@pytest.mark.parametrize("level", ["hidden", "logits"])
def test_end_to_end(level, tmp_path, capsys):
    out = tmp_path / "new" / "ops.json"
    command = ["--shape", "tiny", "--level", level, "--repeats", "2", "--no-memory", "--out", str(out)]
    assert ops.main([*command, "--tokens", "256", "512", "--active", "0.5"]) == 0
    result = json.loads(out.read_text())
    assert result["machine"]["packages"]["torch"] == torch.__version__
    assert [case["num_rows"] for case in result["cases"]] == [256, 512]
    own = {"hidden": ["floor", "naive", "linear_policy_loss", "linear_logprob"], "logits": ["copy", "naive", "logprob"]}
    for case in result["cases"]:
        for name in own[level]:
            entry = case["contenders"][name]
            assert entry["status"] == "measured"
            assert len(entry["times_s"]) == 2
            assert entry["floor_share"] > 0
            assert name not in ("linear_policy_loss", "logprob") or entry["errors"]["logp_p99"] < 1e-4
    assert "linear_policy_loss" in capsys.readouterr().out or level == "logits"


def test_a_deadline_leaves_cases_out_and_says_so(tmp_path):
    out = tmp_path / "ops.json"
    command = ["--shape", "tiny", "--only", "naive", "--repeats", "1", "--no-memory", "--out", str(out)]
    ops.main([*command, "--tokens", "256", "512", "--deadline", "1e-9"])
    assert not out.exists() or not json.loads(out.read_text())["cases"]


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        ops.main(["--only", "linear_policy_los"])
    assert "linear_policy_loss" in capsys.readouterr().err


def test_groups_stand_for_their_members():
    assert [one.name for one in ops.chosen("hidden", ops._names("ours"))] == [
        "floor",
        "linear_policy_loss",
        "linear_policy_loss_on_device",
        "linear_logprob",
    ]
    left = {one.name for one in ops.chosen("hidden", skip=ops._names("peers"))}
    assert left == {one.name for one in OWN if one.level == "hidden"}


def test_turns_alternate():
    problem = make_problem(Shape(HEAD, 256), CPU)
    order = []

    def recorded(name):
        return lambda given: order.append((name, problems.index(given))) or Outcome(None)

    problems = problem.rotated(2)
    times = alternate({name: recorded(name) for name in "ab"}, problems, 3, backward=True)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)]
    assert all(len(taken) == 3 for taken in times.values())


def test_rotated_problems_are_equal_and_apart():
    problem = make_problem(Shape(HEAD, 256, 0.5), CPU)
    first, second = problem.rotated(2)
    assert first is problem
    assert torch.equal(actions_of(first).inputs, actions_of(second).inputs)
    assert first.hidden.data_ptr() != second.hidden.data_ptr()
    assert second.hidden.is_leaf
    assert second.hidden.requires_grad


def test_the_memory_probe_sees_what_was_allocated_and_freed():
    def work():
        torch.ones(1 << 24)

    assert 60 << 20 < resident_peak(work) < 80 << 20


def test_memory_of_a_step_is_taken_in_a_process_of_its_own():
    problem = make_problem(Shape(ops.HEADS["tiny"], 2048), CPU, OPTIONS.seed)
    (contender,) = ops.chosen("hidden", ("naive",), skip=("floor",))[1:]
    figure = ops._peak(contender, step_of("naive"), problem, OPTIONS)
    logits = 2048 * 515 * 4
    assert 2 * logits < figure["peak_extra_bytes"] < 8 * logits


def test_gpus_are_described_by_their_driver(monkeypatch):
    class Refused(Exception):
        pass

    def refuse(handle):
        raise Refused("not supported")

    nvml = types.SimpleNamespace(
        NVMLError=Refused,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "NVIDIA H200 (test)",
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(total=1 << 37),
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: 1980,
        nvmlDeviceGetEnforcedPowerLimit=refuse,
        nvmlDeviceGetTemperature=lambda handle, sensor: 40,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (gpu,) = machine.describe_machine()["gpus"]
    assert gpu["driver"] == "580.1"
    assert (gpu["sm_clock_mhz"], gpu["memory_clock_mhz"], gpu["sm_clock_max_mhz"]) == (1000, 2000, 1980)
    assert gpu["power_limit_w"] == "not supported"
    assert machine.result_folder() == "nvidia-h200-test"


def test_a_named_commit_wins(monkeypatch):
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert machine.describe_machine()["commit"] == "abc"


def test_the_session_script_plans_every_part():
    done = subprocess.run(
        ["bash", "bench/gpu_session.sh", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for part in (
        "== machine",
        "== tests on the GPU",
        "ops-qwen2.5-32b-65536.json",
        "--level logits",
        "--live 1 0.5 0.1",
    ):
        assert part in done.stdout
