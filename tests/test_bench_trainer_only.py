"""The replay of frozen rollouts: equal gradients of both trainers and of a float64 loop, the file format, refusals."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from bench import trainer_only
from bench.common import random_policy
from bench.common.failures import NeedsCuda
from bench.freeze import GATE, KINDS, SHAPES, freeze, scorer
from bench.updates import tables as trainer_tables
from bench.updates.frozen import Frozen, FrozenError, describe, from_rows, read, write
from bench.updates.gate import complaint, distances
from bench.updates.job import Gradients, Job
from bench.updates.ours import OurTrainer
from bench.updates.shared_losses import LOSSES
from bench.updates.turns import Turns, compare, measure

VOCAB = 1024
ROUNDING = 2e-5
"""Relative; float32 passes of a two-layer model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return random_policy.build("tiny", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def frozen(folder) -> Frozen:
    return freeze(GATE, scorer(folder, "cpu"), VOCAB, seed=3)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """Looking for garbage after every trainer, as TRL's loop does too, would take longer than all else here."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def no_model(rows):
    """Log-probs as they would be of a model that finds every token equally likely."""
    return [np.where(row.action_mask, np.float32(-np.log(VOCAB)), np.float32(0)) for row in rows]


@dataclass
class Sequence:
    """What a loss sees of one sequence, [n] each but for the advantage."""

    logp: torch.Tensor
    entropy: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    advantage: float

    def clipped(self, ratio: torch.Tensor, low: float, high: float, most: float = float("inf")) -> torch.Tensor:
        loss = torch.maximum(-self.advantage * ratio, -self.advantage * ratio.clamp(1 - low, 1 + high))
        return loss.clamp(max=-self.advantage * most) if self.advantage < 0 else loss

    def ppo(self, most: float = float("inf")) -> torch.Tensor:
        return self.clipped((self.logp - self.old).exp(), 0.2, 0.28, most)

    def gspo(self) -> torch.Tensor:
        return self.clipped((self.logp - self.old).mean().exp(), 0.03, 0.05).expand(len(self.logp))

    def cispo(self) -> torch.Tensor:
        return -(self.logp - self.old).exp().clamp(max=5.0).detach() * self.advantage * self.logp

    def ppo_with_kl(self) -> torch.Tensor:
        gap = self.ref - self.logp
        return self.ppo() + 0.05 * (gap.exp() - gap - 1)


def token_mean(losses: list[torch.Tensor], longest: int) -> torch.Tensor:
    return torch.cat(losses).mean()


def sequence_mean(losses: list[torch.Tensor], longest: int) -> torch.Tensor:
    return torch.stack([loss.mean() for loss in losses]).mean()


def sum_mean(losses: list[torch.Tensor], longest: int) -> torch.Tensor:
    return torch.stack([loss.sum() for loss in losses]).mean()


def constant_mean(losses: list[torch.Tensor], longest: int) -> torch.Tensor:
    return sum_mean(losses, longest) / longest


FORMULAS = {
    "dapo": (Sequence.ppo, token_mean),
    "grpo": (Sequence.ppo, sequence_mean),
    "bnpo": (Sequence.ppo, token_mean),
    "dr_grpo": (Sequence.ppo, constant_mean),
    "dapo-delta": (lambda one: one.ppo(3.0), token_mean),
    "grpo-kl": (Sequence.ppo_with_kl, sequence_mean),
    "dapo-entropy": (lambda one: one.ppo() - 0.01 * one.entropy, token_mean),
    "gspo": (Sequence.gspo, sequence_mean),
    "gspo-token-mean": (Sequence.gspo, token_mean),
    "luspo": (Sequence.gspo, sum_mean),
    "cispo": (Sequence.cispo, token_mean),
}


@pytest.fixture(scope="module")
def reference(folder, frozen) -> tuple[torch.nn.Module, list[Sequence]]:
    """A float64 model, and each sequence run through it alone, without padding or packing."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    sequences = []
    for row in frozen.rows():
        logits = model(torch.from_numpy(row.tokens).long()[None]).logits[0, :-1]
        mask = torch.from_numpy(row.action_mask[1:])
        log_probs = logits.log_softmax(-1)[mask]
        targets = torch.from_numpy(row.tokens[1:]).long()[mask]
        sequences.append(
            Sequence(
                logp=log_probs.gather(1, targets[:, None])[:, 0],
                entropy=-(log_probs.exp() * log_probs).sum(-1),
                old=torch.from_numpy(row.old_logp[1:]).double()[mask],
                ref=torch.from_numpy(row.ref_logp[1:]).double()[mask],
                advantage=float(row.advantages[row.action_mask][0]),
            )
        )
    return model, sequences


def expected(reference, frozen: Frozen, loss: str) -> Gradients:
    model, sequences = reference
    formula, mean = FORMULAS[loss]
    value = mean([formula(one) for one in sequences], frozen.longest_completion)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    return Gradients(value.item(), dict(zip(names, gradients, strict=True)))


def test_every_bound_of_the_losses_is_in_force_on_the_batch(reference):
    tokens = [((one.logp - one.old).exp().detach(), one.advantage) for one in reference[1]]
    sequences = [((one.logp - one.old).mean().exp().item(), one.advantage) for one in reference[1]]
    assert any((ratio > 1.28).any() for ratio, advantage in tokens if advantage > 0)
    assert any((ratio < 0.8).any() for ratio, advantage in tokens if advantage < 0)
    assert any((ratio > 3.0).any() for ratio, advantage in tokens if advantage < 0)
    assert any((ratio > 5.0).any() for ratio, _ in tokens)
    assert any(ratio > 1.05 and advantage > 0 for ratio, advantage in sequences)
    assert any(ratio < 0.97 and advantage < 0 for ratio, advantage in sequences)


@pytest.mark.parametrize("loss", LOSSES)
def test_our_gradients_are_those_of_a_float64_loop(folder, frozen, reference, loss):
    trainer = OurTrainer(Job(folder, frozen, LOSSES[loss], "cpu").unclipped())
    gate = distances(trainer.gradients(), expected(reference, frozen, loss))
    assert max(gate["loss"], gate["gradient"], gate["worst_gradient"]) < ROUNDING, gate


@pytest.mark.parametrize("loss", LOSSES)
def test_trl_gradients_are_those_of_a_float64_loop(folder, frozen, reference, loss):
    pytest.importorskip("trl")
    from bench.updates.trl_trainer import TrlTrainer

    job = Job(folder, frozen, LOSSES[loss], "cpu").unclipped()
    # Splitting the batch shows whether accumulation is what `why_one_batch` says.
    trainer = TrlTrainer(job, 4 if job.loss.why_one_batch else 2)
    gate = distances(trainer.gradients(), expected(reference, frozen, loss))
    trainer.close()
    assert max(gate["loss"], gate["gradient"], gate["worst_gradient"]) < ROUNDING, gate


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path, capsys):
    pytest.importorskip("trl")
    out = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--kinds", "single", "--rows", "ours", "trl", "--no-gate"]
    assert trainer_only.main([*arguments, "--rounds", "1", "--batch-sizes", "4", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["benchmark"] == "trainer_only" and result["machine"]["packages"]["trl"]
    (case,) = result["cases"]
    assert (case["name"], case["loss"]) == ("single", "dapo")
    for name in ("ours", "trl"):
        row = case["rows"][name]
        assert row["status"] == "measured" and len(row["times_s"]) == 1 and row["median_s"] > 0
        assert 0 < row["phases_s"]["gradients"] + row["phases_s"]["optimizer"] <= row["median_s"]
        assert row["action_tokens_per_s"] == pytest.approx(case["batch"]["action_tokens"] / row["median_s"])
    assert case["rows"]["ours"]["gate"]["gradient"] < ROUNDING
    assert "| ours |" in trainer_tables.markdown(result) and "x TRL" in capsys.readouterr().out


class FakeTrainer:
    """Stands for a trainer, the faster the slower its first step; `log` collects who took how many steps."""

    def __init__(self, name: str, gradient: float, seconds: float, log: list[tuple[str, int]]) -> None:
        self.settings: dict[str, Any] = {}
        self._name, self._gradient, self._seconds, self._log = name, gradient, seconds, log

    def gradients(self) -> Gradients:
        return Gradients(1.0, {"weight": torch.full((3,), self._gradient)})

    def steps(self, count: int) -> list[dict[str, float]]:
        if self._seconds < 0:
            raise MemoryError("too large")
        self._log.append((self._name, count))
        totals = [10 - self._seconds, *[self._seconds] * (count - 1)]
        return [{"gradients": 0.5 * total, "optimizer": 0.1, "total": total} for total in totals]

    def score(self) -> float:
        return 0.1

    def close(self) -> None:
        pass


def test_only_rows_that_agree_are_timed_in_turns_with_their_best_batch_size(folder, frozen):
    log: list[tuple[str, int]] = []
    seconds = {1: 4.0, 2: 3.0, 4: -1.0}

    def missing(job, size):
        raise ImportError("no such package")

    def elsewhere(job, size):
        raise NeedsCuda("kernels")

    builds = {
        "ours": lambda job, size: FakeTrainer("ours", 1.0, 1.0, log),
        "trl": lambda job, size: FakeTrainer(f"trl {size}", 1.0, seconds[size], log),
        "wrong": lambda job, size: FakeTrainer("wrong", 1.1, 0.1, log),
        "absent": missing,
        "elsewhere": elsewhere,
    }
    job = Job(folder, frozen, LOSSES["dapo"], "cpu")
    entries = compare(job, builds, 2)
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "ours": "passed", "trl": "passed", "wrong": "refused", "absent": "not installed",
        "elsewhere": "needs CUDA",
    }  # fmt: skip
    measure(job, builds, entries, Turns(rounds=2, repeats=2, batch_sizes=(1, 2, 3, 4)))
    assert log == [("trl 1", 2), ("trl 2", 2), ("ours", 3), ("trl 2", 3), ("trl 2", 3), ("ours", 3)]
    assert "too large" in entries["trl"]["tried_batch_sizes"]["4"]
    assert entries["ours"]["speedup"] == 3.0 and entries["ours"]["times_s"] == [1.0] * 4
    assert "median_s" not in entries["wrong"] and "gradient off by 0.1" in entries["wrong"]["reason"]


def test_without_a_reference_nothing_passes(folder, frozen):
    entries = compare(
        Job(folder, frozen, LOSSES["dapo"], "cpu"), {"ours": lambda job, size: FakeTrainer("", 1.0, 1.0, [])}, 4
    )
    assert entries["ours"]["status"] == "refused"


@pytest.mark.parametrize("of", [{"weight": torch.tensor([float("nan")])}, {}, {"other": torch.ones(1)}])
def test_missing_and_nan_gradients_are_never_right(of):
    assert complaint(distances(Gradients(1.0, of), Gradients(1.0, {"weight": torch.ones(1)})), "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_seeded_and_shaped_as_their_kind_says(kind):
    shape = SHAPES["cpu"][kind]
    batch = freeze(shape, no_model, VOCAB, seed=1)
    again, other = freeze(shape, no_model, VOCAB, seed=1), freeze(shape, no_model, VOCAB, seed=2)
    assert np.array_equal(batch.tokens, again.tokens) and not np.array_equal(batch.lengths, other.lengths)
    facts = describe(batch)
    assert facts["sequences"] == shape.groups * shape.group_size and batch.group_size == shape.group_size
    completions = batch.lengths - batch.prompt_lengths
    assert completions.max() <= shape.longest and completions.max() > 1.5 * np.median(completions), "a long tail"
    dead = batch.advantages.reshape(shape.groups, shape.group_size) == 0
    assert dead.all(1).sum() == shape.dead_groups and 0 < facts["live_action_tokens"] < facts["action_tokens"]
    others = int((completions.sum()) - batch.num_action_tokens)
    assert (others == 0) == (kind == "single")


def test_a_file_gives_back_what_was_written(frozen, tmp_path):
    for batch in (frozen, replace(frozen, ref_logp=None)):
        write(batch, tmp_path / "batch.safetensors")
        found = read(tmp_path / "batch.safetensors")
        for name, value in vars(batch).items():
            same = np.array_equal(getattr(found, name), value) if isinstance(value, np.ndarray) else None
            assert json.dumps(getattr(found, name)) == json.dumps(value) if same is None else same, name


def test_rows_can_be_frozen(frozen):
    found = from_rows(frozen.rows(), name=frozen.name, vocab_size=VOCAB)
    for name in ("tokens", "action_mask", "sampler_logp", "ref_logp", "advantages", "group_ids", "prompt_lengths"):
        assert np.array_equal(getattr(found, name), getattr(frozen, name)), name
    rows = frozen.rows()
    rows[0].advantages[-1] += 1
    with pytest.raises(FrozenError, match="uid=0 has different advantages"):
        from_rows(rows, name="", vocab_size=VOCAB)


def edited(array: np.ndarray, place: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("tokens", lambda array: edited(array, 5, VOCAB)),
        ("tokens", lambda array: edited(array, 5, -1)),
        ("tokens", lambda array: array.astype(np.int64)),
        ("action_mask", lambda array: edited(array, 0, True)),
        ("action_mask", lambda array: np.zeros_like(array)),
        ("action_mask", lambda array: array[:-1]),
        ("sampler_logp", lambda array: edited(array, 3, np.nan)),
        ("sampler_logp", lambda array: edited(array, -1, 0.5)),
        ("advantages", lambda array: edited(array, 1, np.inf)),
        ("rewards", lambda array: array[:, None]),
        ("lengths", lambda array: array[:0]),
        ("lengths", lambda array: array + 1),
        ("prompt_lengths", lambda array: edited(array, 0, 0)),
        ("prompt_lengths", lambda array: edited(array, 0, 10_000)),
        ("group_ids", lambda array: array.astype(np.float32)),
        ("temperature", lambda value: 0.0),
        ("vocab_size", lambda value: "1024"),
    ],
)
def test_fields_that_do_not_fit_are_named(frozen, field, change):
    # Longer sequences leave the arrays of tokens too short, so the first of those is named.
    named = "tokens" if field == "lengths" and len(change(frozen.lengths)) else field
    with pytest.raises(FrozenError, match=f"^{named} of frozen rollouts 'gate' is "):
        replace(frozen, **{field: change(getattr(frozen, field))})


def test_files_of_another_kind_are_refused(frozen, tmp_path):
    path = tmp_path / "batch.safetensors"
    with pytest.raises(FrozenError, match="is not a file"):
        read(path)
    path.write_bytes(pickle.dumps({"tokens": 1}))
    with pytest.raises(FrozenError, match="not a safetensors file"):
        read(path)
    write(frozen, path)
    with safe_open(path, "numpy") as file:
        names = list(file.keys())
        arrays = {name: file.get_tensor(name) for name in names}
        header = json.loads(file.metadata()["spear_frozen"])
    rest = {name: array for name, array in arrays.items() if name != "advantages"}
    for some, metadata, word in (
        (arrays, {}, "no metadata"),
        (arrays, {"spear_frozen": "[]"}, "no metadata"),
        (arrays, {"spear_frozen": json.dumps({**header, "version": 9})}, "version 9"),
        (arrays, {"spear_frozen": json.dumps({**header, "tokens": 3})}, "metadata has"),
        (rest, {"spear_frozen": json.dumps(header)}, "lacks advantages"),
    ):
        save_file(some, path, metadata)
        with pytest.raises(FrozenError, match=word):
            read(path)


def test_groups_of_different_sizes_and_a_missing_reference_are_named(frozen):
    odd = replace(frozen, group_ids=np.array([0, 0, 0, 1]), ref_logp=None)
    with pytest.raises(FrozenError, match="one size"):
        _ = odd.group_size
    with pytest.raises(FrozenError, match="ref_logp"):
        odd.split("ref_logp")


def test_trl_gets_prompts_on_the_left_of_completions(frozen):
    from bench.updates.trl_trainer import padded

    batch = padded(frozen, torch.device("cpu"), reference=True)
    for index, row in enumerate(frozen.rows()):
        prompt = batch["prompt_ids"][index][batch["prompt_mask"][index].bool()]
        rest = batch["completion_ids"][index][batch["completion_mask"][index].bool()]
        assert torch.cat([prompt, rest]).tolist() == row.tokens.tolist()
        actions = (batch["completion_mask"] * batch["tool_mask"])[index].bool()
        assert torch.equal(
            batch["completion_ids"][index][actions], torch.from_numpy(row.tokens[row.action_mask]).long()
        )
        for name, values in (("old_per_token_logps", row.old_logp), ("ref_per_token_logps", row.ref_logp)):
            assert torch.equal(batch[name][index][actions], torch.from_numpy(values[row.action_mask]))
    assert batch["prompt_mask"][:, -1].all() and batch["completion_mask"][:, 0].all()
    assert batch["num_items_in_batch"] == frozen.num_action_tokens
