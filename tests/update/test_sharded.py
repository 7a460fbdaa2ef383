"""The policy over gloo ranks with FSDP2: losses, metrics, gradients and weights are those of a single process.

Each world size is started once and runs its cases; the single process runs the same ones here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from spear_fast.config.machine import ParallelConfig
from spear_fast.dist import Ranks, start_ranks
from spear_fast.types import Row
from spear_fast.update import flex
from spear_fast.update.flex import block_mask
from spear_fast.update.lora import add_adapters
from spear_fast.update.model import PackedModel, load_model, probe_isolation
from spear_fast.update.offload import move
from spear_fast.update.optimizer import OptimizerSettings
from spear_fast.update.policy_update import PolicyUpdate
from spear_fast.update.scoring import Scorer, fill_ref_logp
from spear_fast.update.sharding import shard
from spear_fast.update.state import training_tensors
from spear_fast.update.step import LossGroup, Updater
from spear_kernels import PolicyLossConfig
from spear_kernels.testing import run_ranks
from tests.update.conftest import make_policy, make_rows

LENGTHS = [12, 7, 30, 18, 5, 22, 9, 14]
TOKEN_BUDGET = 32
SEED = 5
TARGETS = ("q_proj", "o_proj", "down_proj")

Result = dict[str, Any]


def config(kind: str = "ppo", **changes: Any) -> PolicyLossConfig:
    settings = {"dual_clip": 3.0, "clip_high": 0.28, "cov_ratio": 0.2, "cov_lower": 0.5, "cov_upper": 6.0}
    return PolicyLossConfig(kind=kind, aggregation="token-mean", **{**settings, **changes})


class Trial:
    """A fresh policy with rows whose old log-probs lie around its own, spread over the ranks if there are any."""

    def __init__(
        self,
        ranks: Ranks | None,
        *,
        tie: bool = True,
        dtype: torch.dtype = torch.float32,
        lora: bool = False,
        lr: float = 1e-3,
        share_prompts: bool = False,
        dump_folder: Path | None = None,
        **parallel: Any,
    ) -> None:
        self.policy = make_policy(tie=tie)
        self.rows = self.off_policy(LENGTHS)
        self.more = self.off_policy([8, 25, 11], first_uid=900)
        fill_ref_logp(self.rows, Scorer(self.policy, 10_000))
        if lora:
            add_adapters(self.policy.model, rank=3, alpha=6.0, targets=TARGETS, seed=3)
        settings = ParallelConfig(**parallel)
        shard(self.policy, ranks or Ranks(0, 1, torch.device("cpu")), settings, dtype)
        self.updater = Updater(
            self.policy,
            OptimizerSettings(lr=lr, grad_clip=1.0, weight_decay=0.1),
            token_budget=TOKEN_BUDGET,
            temperature=1.3,
            reduce_gradients=settings.reduce_gradients,
            share_prompts=share_prompts,
            dump_folder=dump_folder,
        )

    def off_policy(self, lengths: list[int], first_uid: int = 100) -> list[Row]:
        rows = make_rows(lengths, first_uid=first_uid)
        noise = np.random.default_rng(first_uid)
        for row, logp in zip(rows, Scorer(self.policy, 10_000, temperature=1.3).score(rows), strict=True):
            row.old_logp = (logp + noise.normal(0, 0.3, len(logp))).astype(np.float32)
        return rows

    def gradients(self, *groups: LossGroup) -> Result:
        """Whole gradients and metrics of a step that leaves the weights."""
        found: dict[str, torch.Tensor] = {}
        self.updater.optimizer.step = lambda: found.update(
            {name: whole(p.grad) for name, p in self.policy.model.named_parameters() if p.requires_grad}
        )
        metrics = self.updater.optimizer_step(groups, SEED)
        return {"gradients": found, "metrics": metrics}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(tensor) for name, tensor in self.policy.export_parameters()}


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(ranks: Ranks | None, cfg: PolicyLossConfig, num_rows: int = len(LENGTHS), **settings: Any) -> Result:
    trial = Trial(ranks, **settings)
    return trial.gradients(LossGroup(trial.rows[:num_rows], cfg))


class Operators(TorchDispatchMode):
    """Notes the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def reductions(ranks: Ranks, when: str) -> int:
    """Messages that reduce the gradients of a step of two loss groups."""
    with Operators() as seen:
        joint(ranks, reduce_gradients=when)
    return sum(name.startswith("c10d._reduce_scatter") for name in seen.names)


def joint(ranks: Ranks | None, **settings: Any) -> Result:
    trial = Trial(ranks, **settings)
    return trial.gradients(
        LossGroup(trial.rows, config("clip_cov")),
        LossGroup(trial.more, config("clip_cov", cov_ratio=0.4), coef=0.3, prefix="sil"),
    )


def no_advantage(ranks: Ranks | None) -> Result:
    """Rows that only the entropy bonus moves, beside one whose rank has nothing else to do."""
    trial = Trial(ranks)
    for row in trial.rows:
        row.advantages = np.zeros_like(row.advantages)
    return trial.gradients(LossGroup(trial.rows, config()), LossGroup(trial.more[:1], config(), prefix="sil"))


def shared_prompts(ranks: Ranks | None) -> Result:
    """Rows of two prompts, each computed once for all its rows in a micro-batch; alone every row computes it."""
    trial = Trial(ranks, share_prompts=ranks is not None)
    rows = trial.off_policy([18, 18, 18, 12, 12, 12])
    for number, row in enumerate(rows):
        start = row.num_tokens // 3
        row.tokens = np.concatenate([rows[number - number % 3].tokens[:start], row.tokens[start:]])
    return trial.gradients(LossGroup(rows, config("clip_cov")))


def training(ranks: Ranks | None, mode: str, **settings: Any) -> Result:
    """Two training steps of several optimizer steps, with scores between them."""
    trial = Trial(ranks, **settings)
    update = PolicyUpdate(trial.updater, config("clip_cov"), config("kl_cov"), "minibatch", mode, 5, 1)  # type: ignore[arg-type]
    metrics = [update.run(trial.rows, trial.more, 0.5, seed) for seed in (1, 2)]
    return {"metrics": metrics[-1], "weights": trial.weights(), "scores": trial.updater.score(trial.rows)}


def bad_row(ranks: Ranks | None, folder: Path) -> Result:
    trial = Trial(ranks, dump_folder=folder / ("alone" if ranks is None else f"of_{ranks.size}"))
    before = trial.weights()
    bad = trial.rows[4]
    bad = dataclasses.replace(bad, advantages=np.where(bad.action_mask, np.nan, 0).astype(np.float32))
    skipped = trial.updater.optimizer_step([LossGroup([*trial.rows[:4], bad], config())], 0)["update/skipped_steps"]
    kept = all(torch.equal(tensor, before[name]) for name, tensor in trial.weights().items())
    good = trial.updater.optimizer_step([LossGroup(trial.rows, config())], 0)
    return {"skipped": skipped, "kept": kept, "metrics": good, "weights": trial.weights()}


def half_precision(ranks: Ranks | None) -> Result:
    """bfloat16 passes with steps far below bfloat16's resolution."""
    trial = Trial(ranks, dtype=torch.bfloat16, lr=1e-6)
    before = trial.weights()
    for _ in range(3):
        trial.updater.optimizer_step([LossGroup(trial.rows, config())], 0)
    after = trial.weights()
    moved = {name: (after[name] - before[name]).abs().mean().item() for name in before}
    rounded = sum(torch.equal(after[name].bfloat16(), before[name].bfloat16()) for name in before)
    gradient = gradients(ranks, config(), dtype=torch.bfloat16)["gradients"]
    return {
        "seen": trial.policy.whole(lambda: trial.policy.head[0].dtype),
        "dtypes": {tensor.dtype for tensor in after.values()},
        "moved": moved,
        "rounded": rounded,
        "near": gradient,
    }


def adapters(ranks: Ranks | None, folder: Path) -> Result:
    trial = Trial(ranks, lora=True, lr=1e-2)
    frozen = whole(trial.policy.model.get_parameter("model.layers.0.self_attn.q_proj.base_layer.weight"))
    metrics = [trial.updater.optimizer_step([LossGroup(trial.rows, config("clip_cov"))], 0) for _ in range(3)][-1]
    place = folder / ("adapters_alone" if ranks is None else f"adapters_of_{ranks.size}")
    trial.policy.save_full(place)
    scores = trial.updater.score(trial.rows)
    still = whole(trial.policy.model.get_parameter("model.layers.0.self_attn.q_proj.base_layer.weight"))
    return {"metrics": metrics, "weights": trial.weights(), "scores": scores, "frozen": torch.equal(frozen, still)}


def half_precision_adapters(ranks: Ranks) -> Result:
    """Types at rest of weights with and without a gradient, type of those that leave, and gradients."""
    trial = Trial(ranks, dtype=torch.bfloat16, lora=True)
    types = {(parameter.requires_grad, parameter.dtype) for parameter in trial.policy.model.parameters()}
    left = {tensor.dtype for _, tensor in trial.policy.export_parameters()}
    return {"types": types, "left": left, "near": trial.gradients(LossGroup(trial.rows, config()))["gradients"]}


def moved_away(ranks: Ranks | None) -> Result:
    """A step, tensors elsewhere and back, another step."""
    trial = Trial(ranks)
    for _ in range(2):
        trial.updater.optimizer_step([LossGroup(trial.rows, config())], 0)
        if ranks is not None:
            move(trial.policy, trial.updater.optimizer, lambda tensor: tensor.clone())
    return {"metrics": {}, "weights": trial.weights()}


def enlarge_masters(trial: Trial) -> None:
    masters = [group["params"] for group in trial.updater.optimizer.torch_optimizer.param_groups]
    with torch.no_grad():
        for parameter in chain(*masters):
            parameter.mul_(1.1)


def changed_after_a_score(ranks: Ranks | None) -> Result:
    """Weights that are replaced after they were gathered for a score, as a resumed run does."""
    trial = Trial(ranks)
    trial.updater.score(trial.rows)
    enlarge_masters(trial)
    probe_isolation(trial.policy)
    return {"metrics": {}, "scores": trial.updater.score(trial.rows)}


def changed_while_gathered(ranks: Ranks | None) -> Result:
    """Weights that leave the trainer after a pass that no backward pass followed, which leaves them gathered."""
    trial = Trial(ranks)
    trial.policy.whole(lambda: None)
    enlarge_masters(trial)
    kept = {name: whole(tensor) for name, tensor in training_tensors(trial.policy, trial.updater.optimizer).items()}
    trial.policy.whole(lambda: None)
    enlarge_masters(trial)
    return {"metrics": {}, "weights": kept | trial.weights()}


ALL_TERMS = config(kl_coef=0.1, entropy_coef=0.01)
SAME: dict[str, Callable[[Ranks | None], Result]] = {
    "grpo": partial(gradients, cfg=ALL_TERMS),
    "untied": partial(gradients, cfg=ALL_TERMS, tie=False),
    "reduced_once": partial(gradients, cfg=ALL_TERMS, reduce_gradients="step"),
    "kept_whole": partial(gradients, cfg=ALL_TERMS, reshard_after_forward=False),
    "offloaded": partial(gradients, cfg=ALL_TERMS, cpu_offload=True),
    "recomputed": partial(gradients, cfg=ALL_TERMS, activation_checkpointing=True),
    "clip_cov": partial(gradients, cfg=config("clip_cov")),
    "kl_cov": partial(gradients, cfg=config("kl_cov")),
    "gspo": partial(gradients, cfg=config("gspo")),
    "three_rows": partial(gradients, cfg=config("clip_cov"), num_rows=3),
    "one_row": partial(gradients, cfg=config("clip_cov"), num_rows=1, reduce_gradients="step", tie=False),
    "no_advantage": no_advantage,
    "shared_prompts": shared_prompts,
    "joint": joint,
    "joint_reduced_once": partial(joint, reduce_gradients="step"),
    "train_joint": partial(training, mode="joint"),
    "train_separate": partial(training, mode="separate_step", cpu_offload=True),
    "moved_away": moved_away,
    "changed_after_a_score": changed_after_a_score,
    "changed_while_gathered": changed_while_gathered,
}
"""Cases with the same results on ranks as alone."""
UNEVEN = ("clip_cov", "three_rows", "one_row", "no_advantage", "shared_prompts", "joint_reduced_once")
"""Those that four ranks run too, where the work is spread more thinly."""
CASES = {2: tuple(SAME), 4: UNEVEN}


def work(rank: int, folder: Path) -> Result:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    ranks = Ranks(rank, size, torch.device("cpu"), dist.group.WORLD, mesh)
    found = {name: SAME[name](ranks) for name in CASES[size]}
    found["bad_row"] = bad_row(ranks, folder)
    if size == 2:
        found |= {"bfloat16": half_precision(ranks), "lora": adapters(ranks, folder)}
        found["bfloat16_lora"] = half_precision_adapters(ranks)
        found["reductions"] = [reductions(ranks, when) for when in ("micro_batch", "step")]
    else:
        copies = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found["hsdp"] = SAME["train_separate"](dataclasses.replace(ranks, mesh=copies))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def on_ranks(folder: Path) -> Callable[[int], list[Result]]:
    """Results of each rank of a world of this size."""

    @cache
    def run(size: int) -> list[Result]:
        (folder / f"start_{size}").mkdir()
        return run_ranks(partial(work, folder=folder), size, folder / f"start_{size}")

    return run


@cache
def alone(name: str) -> Result:
    return SAME[name](None)


def assert_same(actual: Result, expected: Result) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected["metrics"].items():
        if name != "update/micro_batches":
            assert actual["metrics"][name] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    assert actual["metrics"].keys() == expected["metrics"].keys()
    for name, grad in expected.get("gradients", {}).items():
        torch.testing.assert_close(
            actual["gradients"][name], grad, atol=3e-5 * grad.abs().max().item() + 1e-9, rtol=1e-3, msg=name
        )
    # Adam turns rounding of a near-zero gradient into a step of up to lr; all but a few entries must agree closely.
    for name, weight in expected.get("weights", {}).items():
        gap = (actual["weights"][name] - weight).abs()
        assert gap.max() < 1e-2 and gap.quantile(0.97) < 2e-5, name
    for logp, other in zip(actual.get("scores", []), expected.get("scores", []), strict=True):
        np.testing.assert_allclose(logp, other, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in CASES.items() for name in names])
def test_ranks_give_the_numbers_of_a_single_process(on_ranks: Any, size: int, name: str) -> None:
    for rank in on_ranks(size):
        assert_same(rank[name], alone(name))


def test_cases_can_tell_wrong_from_right() -> None:
    """Guards the cases above against comparing zeros with zeros."""
    assert alone("clip_cov")["metrics"]["update/selected_frac"] == pytest.approx(0.2, abs=0.02)
    assert "update/cov_p99" in alone("clip_cov")["metrics"] and "sil/cov_max" in alone("joint")["metrics"]
    for name in ("grpo", "clip_cov", "one_row", "joint", "shared_prompts"):
        assert min(grad.norm() for grad in alone(name)["gradients"].values()) > 0, name
    assert alone("train_separate")["metrics"]["update/optimizer_steps"] == 3
    start = Trial(None).weights()
    assert all((weight - start[name]).abs().max() > 1e-3 for name, weight in alone("train_joint")["weights"].items())


def test_copies_of_the_sharded_model_give_the_same_too(on_ranks: Any) -> None:
    for rank in on_ranks(4):
        assert_same(rank["hsdp"], alone("train_separate"))


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_skip_a_step_that_is_not_finite(on_ranks: Any, folder: Path, size: int) -> None:
    expected = bad_row(None, folder)
    for rank in on_ranks(size):
        assert rank["bad_row"]["skipped"] == 1 and rank["bad_row"]["kept"]
        assert_same(rank["bad_row"], expected)
    for place in ("alone", f"of_{size}"):
        with np.load(folder / place / "skipped_after_step_000000.npz") as dump:
            uids = dump["uid"].tolist()
        assert 128 in uids and len(uids) < 5


def test_gradients_are_reduced_once_per_step_if_asked_for(on_ranks: Any) -> None:
    for rank in on_ranks(2):
        each, once = rank["reductions"]
        assert once == 3 and each == 3 * once, "two blocks and the rest; two micro-batches on each rank and one more"


def assert_masters_are_float32(found: Result) -> None:
    assert found["seen"] == torch.bfloat16 and found["dtypes"] == {torch.float32}
    assert all(0 < moved < 1e-5 for moved in found["moved"].values())
    assert found["rounded"] > 0, "the steps must be too small for bfloat16"
    assert_near(found["near"], gradients(None, config()))


def assert_near(found: dict[str, torch.Tensor], exact: Result) -> None:
    assert found.keys() == exact["gradients"].keys()
    for name, grad in exact["gradients"].items():
        if grad.any():
            assert torch.nn.functional.cosine_similarity(found[name].ravel(), grad.ravel(), dim=0) > 0.98, name


def test_bfloat16_passes_keep_float32_masters(on_ranks: Any) -> None:
    for rank in on_ranks(2):
        assert_masters_are_float32(rank["bfloat16"])


def test_a_single_process_has_float32_masters_too() -> None:
    one = start_ranks("cpu", ParallelConfig(), shard=True)
    try:
        assert_masters_are_float32(half_precision(one))
        assert_same(joint(one), alone("joint"))
    finally:
        one.close()


def test_blocks_that_are_sharded_share_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP hands copies of arguments to each block; masks would be made and sent to the GPU layer by layer."""
    made: list[int | None] = []
    monkeypatch.setattr(flex, "block_mask", lambda plan, window: made.append(window) or block_mask(plan, window))
    one = start_ranks("cpu", ParallelConfig(), shard=True)
    try:
        trial = Trial(one)
        trial.policy.attention = "flex"
        trial.updater.score(trial.rows[:3])
        assert len(trial.policy.model.model.layers) == 2
        assert made == [None] * len(trial.updater.scorer.share(trial.rows[:3])[0])
    finally:
        one.close()


def test_frozen_weights_beside_adapters_rest_in_the_type_of_the_passes(on_ranks: Any) -> None:
    exact = gradients(None, config(), lora=True)
    for rank in on_ranks(2):
        found = rank["bfloat16_lora"]
        assert found["types"] == {(True, torch.float32), (False, torch.bfloat16)}
        assert found["left"] == {torch.bfloat16}
        assert_near(found["near"], exact)


def test_adapters_train_alone_and_leave_merged(on_ranks: Any, folder: Path) -> None:
    expected, rows = adapters(None, folder), Trial(None).rows
    changed = {
        name for name, weight in make_policy().model.named_parameters() if not weight.equal(expected["weights"][name])
    }
    assert {name.split(".")[-2] for name in changed} == set(TARGETS) and len(changed) == 2 * len(TARGETS)
    for place, found in [("alone", expected), *(("of_2", rank["lora"]) for rank in on_ranks(2))]:
        assert found["frozen"]
        assert_same(found, expected)
        loaded = PackedModel(load_model(str(folder / f"adapters_{place}"), torch.float32))
        for logp, other in zip(Scorer(loaded, 10_000, temperature=1.3).score(rows), found["scores"], strict=True):
            np.testing.assert_allclose(logp, other, atol=2e-4, rtol=0)
