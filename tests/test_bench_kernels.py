"""The kernel benchmark: what it counts, what it refuses to time, and that it runs from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import plots
from bench.common import machine
from bench.layers import command
from bench.layers.contenders import OWN, Contender, Outcome, actions_of, clipped_loss, loss_of_actions, naive
from bench.layers.gate import gate_problem, truth_of
from bench.layers.head_levels import HeadLevel
from bench.layers.level import Case, CopyFloor
from bench.layers.levels import LEVELS
from bench.layers.measure import Prepared, alternate, run_step
from bench.layers.measured_case import Bench, gated, run_case
from bench.layers.problems import HEADS, NO_HEAD, Head, Shape, loss_flops, make_problem, recompute_flops
from bench.layers.suites import SUITES
from bench.layers.tables import markdown, print_case
from spear_kernels import linear_logprob
from spear_kernels.testing import OperationRecorder

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
HEAD = Head(16, 50, torch.float32)
SMALL = {"policy": 1024, "cov": 1024, "batch": 4096}


def contender_of(name, level="hidden"):
    return next(one for one in LEVELS[level].contenders if one.name == name)


def step_of(name):
    return contender_of(name).build(CPU)


def small_case(level, variant=""):
    return Case(level, Shape(NO_HEAD, SMALL[level], 0.75, num_seqs=512 if level == "batch" else 64), variant)


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


def test_log_probs_alone_are_weighted_by_advantages():
    level = LEVELS["hidden-logprob"]
    problem = level.problem(Case("hidden-logprob", Shape(HEAD, 256, 0.5)), CPU, 4)
    truth = level.truth(problem, "loss", None)
    assert truth.loss.item() == pytest.approx(-(problem.advantages[problem.rows] * truth.logp).mean().item())


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
    given = tuple(contenders)

    class Only(HeadLevel):
        contenders = (contender_of("floor"), *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LEVELS, "hidden", Only("hidden"))
        record = run_case(Case("hidden", shape), Bench(CPU, repeats=2, seed=3, memory=False))
    print_case(record)
    assert all(one.name in markdown({"cases": [record]}) for one in given)
    return record["contenders"]


@pytest.mark.parametrize("level", ["hidden", "hidden-logprob"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_operators_pass_their_gate(level, dtype):
    for contender in LEVELS[level].contenders:
        if contender.name.startswith("linear") and "cpu" in contender.devices:
            entry = gated(contender, Case(level, Shape(replace(HEAD, dtype=dtype), 256)), CPU, seed=3)
            assert entry["status"] == "passed", entry
            assert entry["gate"]["logp_max"] < 1e-4
            assert entry["gate"]["entropy_p99"] < 1e-4


@pytest.mark.parametrize(("level", "variant"), [(name, variant) for name in SMALL for variant in LEVELS[name].variants])
def test_layers_without_a_head_agree_with_their_definitions(level, variant):
    bench = Bench(CPU, repeats=1, seed=5, memory=False, skip=("naive_compiled", "trl", "verl", "verl_vectorized"))
    record = run_case(small_case(level, variant), bench)
    floor, *others = record["contenders"].items()
    assert floor[0] == "copy"
    for name, entry in others:
        assert entry["status"] == "measured", (name, entry)
        assert entry["floor_share"] > 0
        assert ("forward" in entry) == (level == "policy")


@pytest.mark.parametrize("kind", ["ppo", "gspo", "cispo"])
def test_the_loss_of_trl_is_the_same(kind):
    pytest.importorskip("trl")
    entry = gated(contender_of("trl", "policy"), small_case("policy", kind), CPU, seed=6)
    assert entry["status"] == "passed", entry


@pytest.mark.parametrize("name", ["liger_grpo", "liger_scaled_ce"])
def test_the_losses_of_liger_are_the_same(name):
    pytest.importorskip("liger_kernel")
    entry = gated(contender_of(name), Case("hidden", Shape(HEAD, 256)), CPU, seed=6)
    assert entry["status"] == "passed", entry


def test_a_wrong_choice_of_tokens_gets_no_speed():
    level, case = LEVELS["cov"], small_case("cov", "kl_cov")
    problem = level.gate_problem(case, CPU, 0)
    truth = level.truth(problem, "loss", None)
    assert 0 < truth.choice.sum() < problem.num_active
    moved = Outcome(None, values=(truth.choice.roll(1),))
    assert level.errors(moved, problem, truth)["choice"] > 0.1
    assert level.errors(Outcome(None, values=(truth.choice,)), problem, truth)["choice"] == 0


def test_torch_compile_without_a_compiler_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    entry = gated(contender_of("naive_compiled"), Case("hidden", Shape(HEAD, 256)), CPU, seed=3)
    assert (entry["status"], entry["install"]) == ("not installed", "install a C++ compiler, g++ say, or set CXX")
    assert "C++ compiler" in entry["reason"]


def test_end_to_end(tmp_path, capsys):
    out = tmp_path / "new" / "kernels.json"
    options = ["--suite", "tiny", "--repeats", "2", "--no-memory", "--only", "ours,naive", "--out", str(out)]
    heads = ["hidden", "hidden-logprob", "logits"]
    assert command.main([*options, "--level", *heads]) == 0
    result = json.loads(out.read_text())
    assert result["benchmark"] == "kernels"
    assert result["machine"]["packages"]["torch"] == torch.__version__
    assert [case["level"] for case in result["cases"]] == heads
    own = {
        "hidden": ["floor", "naive", "linear_policy_loss", "linear_logprob"],
        "hidden-logprob": ["floor", "naive", "linear_logprob", "linear_logprob_mask"],
        "logits": ["copy", "naive", "logprob"],
    }
    shown = markdown(result)
    for case in result["cases"]:
        for name in own[case["level"]]:
            entry = case["contenders"][name]
            assert entry["status"] == "measured"
            for part in (entry, entry["forward"]):
                assert len(part["times_s"]) == 2
                assert part["floor_share"] > 0
            assert name in shown
            assert name in ("floor", "copy") or entry["errors"]["logp_p99"] < 1e-4
    assert "linear_policy_loss" in capsys.readouterr().out
    (path,) = plots.draw({**result, "cases": result["cases"][:1]}, tmp_path, "kernels-shares-x")
    assert path.name == "kernels-shares-x-hidden-h64.png"
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(("name", "code"), [("naive_compiled", 0), ("trl", 0), ("linear_logprob", 1)])
def test_only_operators_of_this_project_decide_the_exit_status(monkeypatch, name, code):
    monkeypatch.setattr(command, "run_case", lambda case, bench: {"contenders": {name: {"status": "failed"}}})
    monkeypatch.setattr(command, "print_case", lambda record: None)
    assert command.main(["--suite", "tiny", "--no-memory"]) == code


def test_every_suite_names_cases_that_exist():
    for name, blocks in SUITES.items():
        cases = [case for block in blocks for case in block.cases()]
        assert {case.level for case in cases} == set(LEVELS) or name.startswith("cuda-"), name
        assert len({(case.level, case.title) for case in cases}) == len(cases), name
        assert all(case.variant in LEVELS[case.level].variants for case in cases)
    heads = {case.shape.head for block in SUITES["cuda"] for case in block.cases()}
    assert {HEADS[name] for name in HEADS if name.startswith("qwen")} <= heads


def test_a_suite_can_be_narrowed_but_not_changed():
    with pytest.raises(SystemExit, match="cannot change a suite"):
        command.main(["--suite", "tiny", "--tokens", "512"])
    with pytest.raises(SystemExit, match="no case"):
        command.main(["--suite", "tiny", "--level", "hidden", "--shape", "cpu"])
    with pytest.raises(SystemExit, match="no row is an action token"):
        command.main(["--level", "logits", "--shape", "tiny", "--tokens", "256", "--active", "0.3"])


def test_a_deadline_leaves_cases_out_and_says_so(tmp_path):
    out = tmp_path / "kernels.json"
    command.main(["--suite", "tiny", "--level", "logits", "--deadline", "0", "--out", str(out)])
    result = json.loads(out.read_text())
    assert not result["cases"]
    assert result["left_out_from"].startswith("logits: N 256")


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "linear_policy_los"])
    assert "linear_policy_loss" in capsys.readouterr().err


def test_groups_stand_for_their_members():
    def chosen(**options):
        bench = Bench(CPU, repeats=1, **options)
        return [one.name for one in bench.chosen(Case("hidden", Shape(HEAD, 256)))]

    own = ["floor", "linear_policy_loss", "linear_policy_loss_on_device", "linear_logprob"]
    assert chosen(only=command._names("ours")) == own
    left = chosen(skip=command._names("peers"))
    assert left == [one.name for one in OWN if "hidden" in one.levels]


def test_the_script_hides_its_folder_from_transformers():
    """First as another script of its folder, where transformers looks for the package "kernels", then as a script."""
    code = (
        "import importlib.util, runpy, sys\n"
        "sys.path[0] = 'bench'\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available(), any(name.startswith('bench') for name in sys.modules))\n"
        "print(hasattr(sys.modules['kernels'], '__file__'))\n"
        "sys.argv = ['bench/kernels.py', '--suite', 'none']\n"
        "try: runpy.run_path('bench/kernels.py', run_name='__main__')\n"
        "except SystemExit: print(importlib.util.find_spec('bench.layers.levels') is not None, 'bench' in sys.path)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False False", "False", "True False"], done.stderr


def test_turns_alternate():
    problem = make_problem(Shape(HEAD, 256), CPU)
    order = []

    def recorded(name):
        return lambda given: order.append((name, problems.index(given))) or Outcome(None)

    problems = problem.rotated(2)
    times = alternate({name: recorded(name) for name in "ab"}, problems, 3, backward=True)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)]
    assert all(len(taken) == 3 for taken in times.values())


def test_inputs_of_another_project_are_made_once_and_before_the_clock():
    made, order = [], []
    problems = make_problem(Shape(HEAD, 256), CPU).rotated(2)
    step = Prepared(
        made.append, lambda given, inputs: order.append((problems.index(given), len(made))) or Outcome(None)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.layers.measure.run_step", lambda step, given, backward: order.append(len(made)))
        alternate({"a": step}, problems, 1, backward=True)
    assert made == problems[:1] and order == [1]
    order.clear()
    alternate({"a": step}, problems, 4, backward=True)
    assert made == problems and [index for index, _ in order] == [0, 1, 0, 1]


def test_the_copy_takes_turns_with_buffers_that_exceed_the_cache_twice(monkeypatch):
    seen = []
    problem = LEVELS["policy"].problem(small_case("policy", "ppo"), CPU, 0)
    for cache, turns in ((0, 1), (100_000, 12)):
        monkeypatch.setattr("bench.layers.level.cache_bytes", lambda device, cache=cache: cache)
        floor = CopyFloor(CPU)
        monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: seen.append((target, source)))
        for _ in range(2 * turns):
            floor(problem)
        monkeypatch.undo()
        assert len({tensor.data_ptr() for pair in seen for tensor in pair}) == 2 * turns
        assert sum(target.nbytes + source.nbytes for target, source in seen) / 2 > 2 * cache
        assert all(target.nbytes == source.nbytes == 17 * 1024 // 2 for target, source in seen)
        seen.clear()


def test_rotated_problems_are_equal_and_apart():
    problem = make_problem(Shape(HEAD, 256, 0.5), CPU)
    first, second = problem.rotated(2)
    assert first is problem
    assert torch.equal(actions_of(first).inputs, actions_of(second).inputs)
    assert first.hidden.data_ptr() != second.hidden.data_ptr()
    assert second.hidden.is_leaf
    assert second.hidden.requires_grad


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
        "--suite cuda-tokens --shape qwen2.5-32b",
        "--suite cuda-shares",
        "--suite cuda-logprob",
        "--suite cuda-logits",
        "--suite cuda-packed --out bench/results/GPU/kernels-packed.json",
    ):
        assert part in done.stdout
