"""Triton sweep kernel: statistics, derivatives of the policy loss and gradient of the logits in one launch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from spear_kernels import linear_logprob, linear_policy_loss, logprob, policy_loss, tile
from spear_kernels.linear_policy_loss import launch
from spear_kernels.linear_policy_loss.kernel import sweep_kernel
from spear_kernels.linear_policy_loss.launch import sweep_rows
from spear_kernels.logprob import launch as logprob_launch
from spear_kernels.logprob import logprob_reference
from spear_kernels.logprob.kernel import row_gradient_kernel, row_reduce_kernel
from spear_kernels.policy_loss import PolicyLossConfig, policy_loss_reference
from spear_kernels.policy_loss.config import KINDS, KL_KINDS
from spear_kernels.policy_loss.kernel import policy_loss_kernel
from spear_kernels.testing import assert_close_to_truth, policy_config

LOCAL_KINDS = [kind for kind in KINDS if kind != "gspo"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks so small that a few hundred columns take several."""
    monkeypatch.setattr(tile, "LARGEST_BLOCK", {1: 128, 2: 128})


@dataclass
class Rows:
    """Logits and the inputs of a policy loss for each row; numbers are exact in float32."""

    logits: torch.Tensor  # [n, V]
    ids: torch.Tensor
    temperature: torch.Tensor | float
    old_logp: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    row_weight: torch.Tensor | None
    ref_logp: torch.Tensor | None
    selected: torch.Tensor | None
    softcap: float = 0.0
    vocab_size: int = 301

    @property
    def aggregation_weight(self) -> torch.Tensor:
        """1 / number of action tokens, as token-mean."""
        return self.mask.float() / self.mask.sum()

    def take(self, index: torch.Tensor | slice) -> Rows:
        """Some of the rows."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: v[index] for k, v in values.items() if isinstance(v, torch.Tensor)})

    def reference(self, leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logp and entropy of `leaf` [n, V] by the definition."""
        z = leaf[:, : self.vocab_size]
        z = self.softcap * torch.tanh(z / self.softcap) if self.softcap else z
        return logprob_reference(z, self.ids, self.temperature)


def problem(num_rows: int = 12, width: int = 317, dtype: torch.dtype = torch.float32, seed: int = 0) -> Rows:
    """Rows whose log-ratios lie on both sides of every clip bound; a third is masked out."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    logits = (normal(num_rows, width) * 3).to(dtype)
    ids = torch.randint(min(301, width), (num_rows,), generator=random)
    temperature = 0.5 + torch.rand(num_rows, generator=random)
    nothing, weight = torch.zeros(num_rows), 0.5 + torch.rand(num_rows, generator=random)
    mask = torch.arange(num_rows) % 3 != 1
    selected = torch.arange(num_rows) % 4 == 0
    rows = Rows(logits, ids, temperature, nothing, normal(num_rows), mask, weight, None, selected)
    logp = rows.reference(logits.double())[0].float()
    return replace(rows, old_logp=logp + 0.5 * normal(num_rows), ref_logp=logp + 0.3 * normal(num_rows))


def sweep(rows: Rows, cfg: PolicyLossConfig, out: torch.Tensor | None):
    per_row = isinstance(rows.temperature, torch.Tensor)
    return sweep_rows(
        rows.logits,
        rows.ids,
        rows.temperature if per_row else None,
        1.0 if per_row else rows.temperature,
        rows.softcap,
        rows.vocab_size,
        rows.old_logp,
        rows.advantages,
        rows.aggregation_weight,
        rows.row_weight,
        rows.ref_logp,
        rows.selected,
        cfg.clip_low,
        cfg.clip_high,
        cfg.dual_clip,
        cfg.kl_cov_coef,
        cfg.kl_coef,
        cfg.entropy_coef,
        KINDS.index(cfg.kind),
        KL_KINDS.index(cfg.kl_kind),
        out,
    )


def expected(rows: Rows, cfg: PolicyLossConfig, dtype: torch.dtype):
    """logp, entropy, the loss's derivatives in them and in the logits, by autograd through the definition."""

    def cast(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.to(dtype)

    leaf = rows.logits.to(dtype, copy=True).requires_grad_()
    logp, entropy = rows.reference(leaf)
    loss = policy_loss_reference(
        logp,
        cast(rows.old_logp),
        cast(rows.advantages),
        rows.mask,
        cfg,
        torch.zeros(len(rows.ids), dtype=torch.int64),
        entropy if cfg.entropy_coef else None,
        cast(rows.ref_logp),
        cast(rows.row_weight),
        rows.selected if cfg.uses_covariance else None,
    )
    grads = torch.autograd.grad(loss, (logp, entropy, leaf), allow_unused=True, materialize_grads=True)
    return logp.detach(), entropy.detach(), *grads


def check(rows: Rows, cfg: PolicyLossConfig, out: torch.Tensor | None = None) -> torch.Tensor:
    """Compare one sweep with float64; returns the gradient, also where rows are masked out."""
    truth, naive = expected(rows, cfg, torch.float64), expected(rows, cfg, torch.float32)
    out = torch.full_like(rows.logits, math.nan) if out is None else out
    statistics, d_logp, d_entropy = sweep(rows, cfg, out)
    active = rows.mask
    for actual, exact, plain in zip((*statistics[:2], d_logp, d_entropy, out), truth, naive, strict=True):
        assert_close_to_truth(actual[active], exact[active], plain[active].to(actual.dtype))
        assert (actual[~active] == 0).all()
    assert (out[:, rows.vocab_size :] == 0).all()
    return out


@pytest.mark.parametrize("kind", LOCAL_KINDS)
@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_every_loss_with_every_term(kind, kl_kind):
    check(problem(), policy_config(kind, kl_kind=kl_kind))


@pytest.mark.parametrize("absent", ["row_weight", "ref_logp", "selected"])
def test_optional_inputs(absent):
    changes = {"kl_coef": 0.0} if absent == "ref_logp" else {}
    check(replace(problem(), **{absent: None}), policy_config("ppo", **changes))


@pytest.mark.parametrize("changes", [{"entropy_coef": 0.0}, {"dual_clip": None}, {"kl_coef": 0.0}])
def test_terms_switched_off(changes):
    check(problem(), policy_config("ppo", **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_half_precision_softcap_and_one_temperature(dtype, softcap):
    check(replace(problem(dtype=dtype), softcap=softcap, temperature=0.7), policy_config("clip_cov"))


@pytest.mark.parametrize("width", [317, 301, 640])
def test_padding_of_any_width_gets_zeros(width):
    rows = problem(width=width)
    rows.logits[:, 301:] = math.nan
    out = torch.full_like(rows.logits, math.nan)
    sweep(rows, policy_config("ppo"), out)
    assert (out[:, 301:] == 0).all()
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_may_overwrite_the_logits(dtype):
    rows, cfg = problem(dtype=dtype), policy_config("ppo")
    expected_out = check(rows, cfg)
    sweep(rows, cfg, rows.logits)
    assert torch.equal(rows.logits, expected_out)


def test_gradient_of_another_type():
    rows = problem()
    check(rows, policy_config("ppo"), out=torch.full(rows.logits.shape, math.nan, dtype=torch.bfloat16))


def test_without_a_result_the_numbers_are_the_same():
    rows, cfg = problem(), policy_config("ppo")
    before = rows.logits.clone()
    with_gradient = sweep(rows, cfg, torch.empty_like(rows.logits))
    for alone, beside in zip(sweep(rows, cfg, None), with_gradient, strict=True):
        assert torch.equal(alone, beside)
    assert torch.equal(rows.logits, before)


def test_statistics_are_those_of_the_row_kernel():
    rows = problem()
    statistics, _, _ = sweep(rows, policy_config("ppo"), None)
    alone = logprob_launch.row_statistics(rows.logits, rows.ids, rows.temperature, 1.0, 0.0, 301)
    assert torch.equal(statistics[:, rows.mask], alone[:, rows.mask])


@pytest.mark.parametrize("kind", LOCAL_KINDS)
def test_masked_rows_may_hold_anything(kind):
    rows, cfg = problem(), policy_config(kind)
    clean = check(rows, cfg)
    for values in (rows.logits, rows.old_logp, rows.advantages, rows.ref_logp, rows.row_weight, rows.temperature):
        values[~rows.mask] = math.nan
    rows.ids[~rows.mask] = 2**40
    out = torch.full_like(rows.logits, math.nan)
    statistics, d_logp, d_entropy = sweep(rows, cfg, out)
    assert torch.equal(out, clean)
    for values in (*statistics, d_logp, d_entropy):
        assert (values[~rows.mask] == 0).all()
        assert not values.isnan().any()


def test_rows_without_coefficient_are_zeros():
    """Zero advantages, and clipped or dropped tokens, give rows of zeros when no other term acts."""
    rows = problem()
    rows.advantages[::2] = 0.0
    cfg = PolicyLossConfig("clip_cov", clip_low=0.1, clip_high=0.1)
    out = check(rows, cfg)
    _, d_logp, _ = sweep(rows, cfg, None)
    assert ((d_logp == 0) == (out == 0).all(1)).all()
    assert (d_logp[rows.mask] == 0).any()
    assert (d_logp[rows.mask] != 0).any()


def test_entropy_gradient_is_not_dropped():
    rows = problem()
    rows.advantages[:] = 0.0
    out = check(rows, PolicyLossConfig("ppo", entropy_coef=0.1))
    assert (out[rows.mask].abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("gap", [-300.0, -61.0, 61.0, 300.0])
def test_extreme_log_ratios(gap):
    rows = problem()
    rows.old_logp += gap
    check(rows, policy_config("ppo"))


def test_minus_infinity_and_far_negative_logits():
    rows = problem()
    rows.logits -= 3e4
    rows.logits[:, 128:256] = -math.inf
    rows.ids %= 128
    rows.logits[torch.arange(12), 300] = -math.inf
    rows.old_logp = rows.reference(rows.logits.double())[0].float()
    rows.ref_logp = rows.old_logp + 0.1
    out = check(rows, policy_config("ppo", entropy_coef=0.0))
    assert (out[:, 128:256] == 0).all()
    sweep(rows, policy_config("ppo"), out)
    assert not out.isnan().any()
    assert (out[:, 128:256] == 0).all()


def test_probability_near_one():
    rows = problem()
    rows.logits[torch.arange(12), rows.ids] += 90.0
    rows.old_logp, rows.ref_logp = torch.zeros(12), torch.zeros(12)
    check(rows, policy_config("ppo"))


def test_zero_rows():
    rows = problem().take(slice(0, 0))
    statistics, d_logp, d_entropy = sweep(rows, policy_config("ppo"), rows.logits)
    assert (statistics.shape, d_logp.shape, d_entropy.shape) == ((4, 0), (0,), (0,))


def test_each_row_depends_on_itself_alone():
    rows, cfg, order = problem(), policy_config("ppo"), torch.arange(11, -1, -1)
    whole, turned = torch.empty_like(rows.logits), torch.empty_like(rows.logits)
    sweep(rows, cfg, whole)
    sweep(rows.take(order), cfg, turned)
    assert torch.equal(turned, whole[order])


def test_any_number_of_rows_goes_on_the_first_grid_axis_and_compiles_nothing_new(monkeypatch):
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append((grid, args, constants))

    monkeypatch.setattr(launch, "sweep_kernel", Recorder())
    for num_rows in (1, 70000):
        rows = replace(problem(num_rows, 4), vocab_size=4, softcap=1.0 / num_rows)
        sweep(rows, policy_config("ppo", clip_low=0.1 / num_rows), rows.logits)
    (few, few_args, few_constants), (many, many_args, many_constants) = launches
    assert (few, many) == ((1,), (70000,))
    assert few_constants == many_constants
    assert [type(value) for value in few_args] == [type(value) for value in many_args]


def test_blocks_fit_the_shared_memory_of_the_device(monkeypatch):
    monkeypatch.undo()
    blocks = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **constants: blocks.append(constants["BLOCK"])

    monkeypatch.setattr(launch, "sweep_kernel", Recorder())
    rows = replace(problem(1, 20000), vocab_size=20000)
    for limit in (tile.SHARED_BYTES, tile.SMALL_SHARED_BYTES):
        monkeypatch.setattr(launch, "shared_bytes", lambda _, limit=limit: limit)
        sweep(rows, policy_config("ppo"), rows.logits)
    assert blocks == [16384, 8192]


def variant(kernel, args, constants):
    """What Triton compiles a launch for: types, alignment of pointers, integers that are 1 or divisible by 16."""
    rules = kernel.kwargs

    def of(name, value):
        if isinstance(value, torch.Tensor):
            return value.dtype, name in rules["do_not_specialize_on_alignment"] or value.data_ptr() % 16 == 0
        if isinstance(value, int) and name not in rules["do_not_specialize"]:
            return value == 1, value % 16 == 0
        return type(value)

    return tuple(map(of, kernel.arg_names, args)), tuple(sorted(constants.items()))


def test_rows_and_chunks_that_start_anywhere_compile_nothing_new(monkeypatch):
    """Chunks are slices [start, stop) of per-row tensors and of tables [4, N], so N decides their alignment."""
    kernels = sweep_kernel, row_reduce_kernel, row_gradient_kernel, policy_loss_kernel
    seen = {kernel: set() for kernel in kernels}

    def record(self, *args, grid, warmup, **constants):
        seen.setdefault(self, set()).add(variant(self, args, constants))

    # Nothing runs, so results are what the memory held; no launch depends on them.
    monkeypatch.setattr(InterpretedFunction, "run", record)
    weight = torch.randn(48, 8)
    for num_rows in (96, 97, 98, 99, 128, 1):
        hidden, ids = torch.randn(num_rows, 8, requires_grad=True), torch.arange(num_rows) % 48
        old_logp, advantages, mask = torch.randn(num_rows), torch.randn(num_rows), torch.ones(num_rows).bool()
        options = {"chunk_bytes": 64 * 48 * 4, "backend": "triton"}
        tokens = (old_logp, advantages, mask, PolicyLossConfig())
        linear_policy_loss(hidden, weight, ids, *tokens, **options).loss.backward()
        logp = linear_logprob(hidden, weight, ids, **options).logp
        logp.sum().backward()
        logprob((hidden @ weight.T)[num_rows // 3 :], ids[num_rows // 3 :], backend="triton").logp.sum().backward()
        policy_loss(logp.detach()[1:], old_logp[1:], advantages[1:], mask[1:], PolicyLossConfig(), backend="triton")
    # policy_loss runs with entropy, for the metrics of linear_policy_loss, and without.
    assert [len(seen[kernel]) for kernel in kernels] == [1, 1, 1, 2]


def test_bad_arguments_are_named():
    rows, cfg = problem(), policy_config("ppo")
    for change, out, message in [
        ({"logits": rows.logits.double()}, None, "logits has dtype"),
        ({"vocab_size": 400}, None, "vocab_size=400"),
        ({}, rows.logits[:, :301], "out has shape"),
        ({}, rows.logits.view(torch.bfloat16)[:, :317], "out overlaps"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweep(replace(rows, **change), cfg, out)
