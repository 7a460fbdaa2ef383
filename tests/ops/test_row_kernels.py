"""Triton row kernels: statistics, partials and gradient of rows of logits, against float64 and the shipped-bug list."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from spear_kernels import tile
from spear_kernels.linear_policy_loss.kernel import sweep_kernel
from spear_kernels.logprob import launch, logprob_reference
from spear_kernels.logprob.kernel import row_gradient_kernel, row_reduce_kernel
from spear_kernels.logprob.launch import row_gradient, row_partials, row_statistics
from spear_kernels.testing import assert_close_to_truth

BLOCK = 128
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks so small that a few hundred columns take several."""
    monkeypatch.setattr(tile, "LARGEST_BLOCK", {1: BLOCK, 2: BLOCK})


def random_case(num_rows=5, width=389, dtype=torch.float32, seed=0, scale=3.0):
    """logits [n, width] that are exact in `dtype`, ids and temperatures [n]."""
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_rows, width, generator=random) * scale).to(dtype)
    return logits, torch.randint(width, (num_rows,), generator=random), 0.4 + torch.rand(num_rows, generator=random)


def scaled(logits, temperature, softcap, vocab_size):
    """The definition of the scaled logits in the type of `logits`."""
    real = logits[:, :vocab_size]
    capped = softcap * torch.tanh(real / softcap) if softcap else real
    return capped / (temperature[:, None].to(capped.dtype) if isinstance(temperature, torch.Tensor) else temperature)


def plain_statistics(logits, ids, temperature, softcap, vocab_size):
    """logp, entropy, peak, log total [4, n] in the type of `logits`."""
    z = scaled(logits, temperature, softcap, vocab_size)
    peak = z.amax(1)
    logp, entropy = logprob_reference(z, ids)
    return torch.stack([logp, entropy, peak, (z - peak[:, None]).exp().sum(1).log()])


def plain_gradient(logits, ids, temperature, softcap, vocab_size, d_logp, d_entropy):
    """Autograd through the definition, [n, width] in the type of `logits`."""
    leaf = logits.detach().clone().requires_grad_()
    out = logprob_reference(scaled(leaf, temperature, softcap, vocab_size), ids)
    loss = (d_logp * out.logp).sum() if d_entropy is None else (d_logp * out.logp + d_entropy * out.entropy).sum()
    return torch.autograd.grad(loss, leaf)[0]


def launch_arguments(temperature, softcap, vocab_size):
    per_row = isinstance(temperature, torch.Tensor)
    return temperature if per_row else None, 1.0 if per_row else temperature, softcap, vocab_size


def gradient(logits, ids, d_logp, d_entropy, temperature=1.0, softcap=0.0, vocab_size=None, out=None):
    """`row_gradient` from `row_statistics`, into new memory unless `out` is given."""
    arguments = launch_arguments(temperature, softcap, vocab_size or logits.shape[1])
    _, entropy, peak, log_total = row_statistics(logits, ids, *arguments)
    out = torch.full_like(logits, math.nan) if out is None else out
    row_gradient(logits, ids, entropy, peak, log_total, d_logp, d_entropy, *arguments, out)
    return out


def check_statistics(logits, ids, temperature=1.0, softcap=0.0, vocab_size=None):
    vocab_size = vocab_size or logits.shape[1]
    actual = row_statistics(logits, ids, *launch_arguments(temperature, softcap, vocab_size))
    truth = plain_statistics(logits.double(), ids, temperature, softcap, vocab_size)
    naive = plain_statistics(logits.float(), ids, temperature, softcap, vocab_size)
    for values, exact, plain in zip(actual, truth, naive, strict=True):
        assert_close_to_truth(values, exact, plain)


def check_gradient(logits, ids, temperature=1.0, softcap=0.0, vocab_size=None, with_entropy=True, out=None):
    vocab_size = vocab_size or logits.shape[1]
    d_logp = torch.linspace(-1.5, 2.0, len(ids))
    d_entropy = torch.linspace(0.7, -0.4, len(ids)) if with_entropy else None
    wide = (t if t is None else t.double() for t in (d_logp, d_entropy))
    truth = plain_gradient(logits.double(), ids, temperature, softcap, vocab_size, *wide)
    naive = plain_gradient(logits.float(), ids, temperature, softcap, vocab_size, d_logp, d_entropy)
    actual = gradient(logits, ids, d_logp, d_entropy, temperature, softcap, vocab_size, out)
    assert_close_to_truth(actual, truth, naive.to(actual.dtype))
    assert (actual[:, vocab_size:] == 0).all()


# 389 and 131 leave a part of a block, 384 and 128 none, 1 and 5 are less than one lane of a load.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [389, 384, 131, 128, 5, 1])
def test_statistics_and_gradient_for_vocabularies_that_blocks_do_not_divide(dtype, width):
    logits, ids, temperature = random_case(3, width, dtype)
    check_statistics(logits, ids, temperature)
    check_gradient(logits, ids, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6, "per row"])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("vocab_size", [389, 140])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_temperature_softcap_and_padding(temperature, softcap, vocab_size, with_entropy):
    logits, ids, per_row = random_case(scale=6.0)
    temperature = per_row if temperature == "per row" else temperature
    ids = ids % vocab_size
    logits[:, vocab_size:] = 1e9
    check_statistics(logits, ids, temperature, softcap, vocab_size)
    check_gradient(logits, ids, temperature, softcap, vocab_size, with_entropy)


def test_padding_may_hold_nan():
    logits, ids, temperature = random_case()
    expected = row_statistics(logits[:, :301], ids % 301, temperature, 1.0, 0.0, 301)
    logits[:, 301:] = math.nan
    assert torch.equal(row_statistics(logits, ids % 301, temperature, 1.0, 0.0, 301), expected)
    out = gradient(logits, ids % 301, torch.ones(5), torch.ones(5), temperature, vocab_size=301)
    assert (out[:, 301:] == 0).all()
    assert not out.isnan().any()


def test_production_blocks_give_the_same_result_on_a_small_vocabulary(monkeypatch):
    monkeypatch.undo()
    logits, ids, temperature = random_case(3, 5000, torch.bfloat16)
    check_statistics(logits, ids, temperature)
    check_gradient(logits, ids, temperature)


def test_blocks_shrink_with_the_vocabulary(monkeypatch):
    monkeypatch.undo()
    assert tile.row_launch(152064, 2).block == 4096
    assert tile.row_launch(152064, 4, passes=2).block == tile.row_launch(152064, 2, passes=2).block == 16384
    assert tile.row_launch(1000, 4).block == 1024
    assert tile.row_launch(3, 4).block == 256
    small = {"passes": 2, "shared_bytes": tile.SMALL_SHARED_BYTES}
    assert (tile.row_launch(152064, 4, **small).block, tile.row_launch(152064, 2, **small).block) == (8192, 16384)
    assert (tile.row_launch(3, 4).width, tile.row_launch(3, 2).width) == (4, 8)


@pytest.mark.parametrize("shift", [-3e4, -300.0, 3e4])
def test_all_logits_far_from_zero(shift):
    """A running maximum that starts at 0 gives exp(-104) = 0 everywhere; the shift itself must cost no precision."""
    logits, ids, temperature = random_case()
    check_statistics(logits + shift, ids, temperature)
    check_gradient(logits + shift, ids, temperature)


def test_big_logits_keep_probabilities_exact():
    logits = torch.tensor([[1e4, 1e4 + 1.0, 1e4 - 2.0]])
    ids = torch.tensor([0])
    exact = plain_gradient(logits.double(), ids, 1.0, 0.0, 3, 1.0, None)
    assert (gradient(logits, ids, torch.ones(1), None) - exact).abs().max() < 1e-6


def test_minus_infinity_logits_have_no_probability_gradient_or_entropy():
    logits, ids, temperature = random_case()
    forbidden = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    forbidden[torch.arange(5), ids] = False
    logits[forbidden] = -INF
    check_statistics(logits, ids, temperature)
    d_logp, d_entropy = torch.linspace(-1, 1, 5), torch.linspace(0.5, 1, 5)
    grad = gradient(logits, ids, d_logp, d_entropy, temperature)
    assert (grad[forbidden] == 0).all()
    for row in range(5):
        keep = ~forbidden[row]
        place = keep[: ids[row]].sum()[None]
        pair = d_logp[row : row + 1], d_entropy[row : row + 1]
        packed = logits[row : row + 1, keep]
        exact = plain_gradient(packed.double(), place, temperature[row].item(), 0.0, packed.shape[1], *pair)
        plain = plain_gradient(packed, place, temperature[row].item(), 0.0, packed.shape[1], *pair)
        assert_close_to_truth(grad[row : row + 1, keep], exact, plain)


@pytest.mark.parametrize("blocks", [[0], [1], [0, 1], [2], [3], [0, 1, 2]])
def test_whole_blocks_of_minus_infinity(blocks):
    logits, ids, temperature = random_case()
    for block in blocks:
        logits[:, block * BLOCK : (block + 1) * BLOCK] = -INF
    ids[:] = torch.isfinite(logits[0]).nonzero()[3, 0]
    check_statistics(logits, ids, temperature)
    grad = gradient(logits, ids, torch.ones(5), torch.ones(5), temperature)
    assert not grad.isnan().any()
    assert (grad[logits == -INF] == 0).all()


def test_row_of_minus_infinity_is_no_nan():
    logits, ids, temperature = random_case()
    logits[2] = -INF
    partials = row_partials(logits, ids, temperature, 1.0, 0.0, 389)
    assert partials[:, 2].tolist() == [-INF, 0.0, 0.0, -INF]
    statistics = row_statistics(logits, ids, temperature, 1.0, 0.0, 389)
    assert statistics[:, 2].tolist() == [-INF, 0.0, -INF, -INF]
    assert not statistics.isnan().any()
    assert (gradient(logits, ids, torch.ones(5), torch.ones(5), temperature)[2] == 0).all()


def test_nan_shows_in_its_row_alone():
    logits, ids, temperature = random_case()
    logits[2, 200] = math.nan
    statistics = row_statistics(logits, ids, temperature, 1.0, 0.0, 389)
    grad = gradient(logits, ids, torch.ones(5), torch.ones(5), temperature)
    assert statistics.isnan().any(0).tolist() == grad.isnan().any(1).tolist() == [False, False, True, False, False]


def test_impossible_token_has_logp_minus_infinity():
    logits = torch.tensor([[0.0, -INF, 1.0]])
    assert row_statistics(logits, torch.tensor([1]), None, 1.0, 0.0, 3)[0].item() == -INF


def test_probability_near_one():
    logits = torch.zeros(1, 389)
    logits[0, 222] = 60.0
    ids = torch.tensor([222])
    logp, entropy, _, _ = row_statistics(logits, ids, None, 1.0, 0.0, 389)
    assert logp.item() == pytest.approx(0.0, abs=1e-7)
    assert entropy.item() == pytest.approx(0.0, abs=1e-7)
    assert gradient(logits, ids, torch.ones(1), torch.ones(1)).abs().max() < 1e-6


def test_zero_rows():
    logits, ids, empty = torch.zeros(0, 389), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    assert row_statistics(logits, ids, None, 1.0, 0.0, 389).shape == (4, 0)
    assert row_partials(logits, ids, None, 1.0, 0.0, 389).shape == (4, 0)
    row_gradient(logits, ids, empty, empty, empty, empty, empty, None, 1.0, 0.0, 389, logits)


def test_entropy_gradient_is_not_dropped():
    logits, ids, temperature = random_case()
    grad = gradient(logits, ids, torch.zeros(5), torch.ones(5), temperature)
    assert (grad.abs().amax(1) > 0.01).all()
    zero, one = torch.zeros(5), torch.ones(5)
    exact = plain_gradient(logits.double(), ids, temperature, 0.0, 389, zero, one)
    assert_close_to_truth(grad, exact, plain_gradient(logits, ids, temperature, 0.0, 389, zero, one))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_two_shards_combine_to_the_whole(softcap):
    """Each shard sees ids outside it; their targets are -inf there and their one-hot is not added."""
    logits, ids, temperature = random_case(6)
    ids[:2] = torch.tensor([0, 388])
    shards = [(logits[:, :171].contiguous(), ids), (logits[:, 171:].contiguous(), ids - 171)]
    parts = torch.stack([row_partials(z, i, temperature, 1.0, softcap, z.shape[1]) for z, i in shards])
    peaks, totals, weighted, targets = parts.unbind(1)
    for (z, i), target in zip(shards, targets, strict=True):
        assert ((target == -INF) == ((i < 0) | (i >= z.shape[1]))).all()
    peak = peaks.amax(0)
    fall = peaks - peak
    total = (totals * fall.exp()).sum(0)
    log_total = total.log()
    entropy = log_total - ((weighted + totals * fall) * fall.exp()).sum(0) / total
    combined = torch.stack([targets.amax(0) - peak - log_total, entropy, peak, log_total])
    exact = plain_statistics(logits.double(), ids, temperature, softcap, 389)
    plain = plain_statistics(logits, ids, temperature, softcap, 389)
    for values, truth, naive in zip(combined, exact, plain, strict=True):
        assert_close_to_truth(values, truth, naive)
    ones, halves = torch.ones(6), torch.full((6,), 0.5)
    pieces = []
    for z, i in shards:
        pieces.append(torch.full_like(z, math.nan))
        arguments = launch_arguments(temperature, softcap, z.shape[1])
        row_gradient(z, i, entropy, peak, log_total, ones, halves, *arguments, pieces[-1])
    exact = plain_gradient(logits.double(), ids, temperature, softcap, 389, 1.0, 0.5)
    plain = plain_gradient(logits, ids, temperature, softcap, 389, 1.0, 0.5)
    assert_close_to_truth(torch.cat(pieces, 1), exact, plain)


@pytest.mark.parametrize("token", [-1, 301, 389, 2**40, -(2**40)])
def test_id_outside_the_shard_is_not_read(token):
    logits, _, temperature = random_case()
    partials = row_partials(logits, torch.full((5,), token), temperature, 1.0, 0.0, 301)
    assert (partials[3] == -INF).all()
    grad = gradient(logits, torch.full((5,), token), torch.ones(5), None, temperature, vocab_size=301)
    assert (grad <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_place(dtype):
    logits, ids, temperature = random_case(dtype=dtype)
    pair = torch.linspace(-1, 2, 5), torch.linspace(1, -1, 5)
    expected = gradient(logits, ids, *pair, temperature)
    assert torch.equal(gradient(logits, ids, *pair, temperature, out=logits), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_another_type(dtype):
    logits, ids, temperature = random_case()
    check_gradient(logits, ids, temperature, out=torch.full(logits.shape, math.nan, dtype=dtype))


def test_rows_without_coefficient_are_zeros_and_not_read():
    logits, ids, temperature = random_case()
    logits[1], logits[3] = math.nan, INF
    coefficient = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0])
    grad = gradient(logits, ids, coefficient, torch.zeros(5), temperature)
    assert (grad[1:4] == 0).all()
    assert (grad[0] != 0).any()
    assert torch.equal(grad, gradient(logits, ids, coefficient, None, temperature))


@pytest.mark.parametrize("padding", [0, 3, 11])
def test_rows_with_any_stride(padding):
    """Rows that start at odd addresses cannot be loaded 16 bytes at a time."""
    logits, ids, temperature = random_case()
    wide = torch.full((5, 389 + padding), math.nan)
    wide[:, :389] = logits
    assert launch.aligned(wide) == ((389 + padding) % 4 == 0)
    check_statistics(wide[:, :389], ids, temperature)
    out = torch.full_like(wide, 7.0)
    check_gradient(wide[:, :389], ids, temperature, out=out[:, :389])
    assert (out[:, 389:] == 7.0).all()


def test_offsets_beyond_32_bits(monkeypatch):
    """Row 2 starts 2**31 + 32 elements after row 0; in 32 bits that is an address inside the storage, of zeros."""
    # The interpreter copies each storage onto itself, which would touch every page of this one.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    start, stride = 2**31, 2**30 + 16
    # Pages of an anonymous mapping come into being when they are written; torch.zeros would write them all.
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (start + 2 * stride + 150)), dtype=torch.bfloat16)
    logits = memory.as_strided((3, 150), (stride, 1), start)
    random, ids, temperature = random_case(3, 150, torch.bfloat16)
    logits.copy_(random)
    check_statistics(logits, ids, temperature)
    expected = gradient(random, ids, torch.ones(3), torch.ones(3), temperature)
    gradient(logits, ids, torch.ones(3), torch.ones(3), temperature, out=logits)
    assert torch.equal(logits, expected)


class _Recorder:
    """Stands in for a kernel and notes the grid and the keyword arguments of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((grid, args, constants))


def test_any_number_of_rows_goes_on_the_first_grid_axis_and_compiles_nothing_new(monkeypatch):
    """CUDA allows 65535 programs on the other axes; a constant that depends on the row count would recompile."""
    recorder = _Recorder()
    monkeypatch.setattr(launch, "row_reduce_kernel", recorder)
    monkeypatch.setattr(launch, "row_gradient_kernel", recorder)
    for num_rows in (1, 7, 70000):
        logits, ids, column = torch.zeros(num_rows, 4), torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows)
        row_statistics(logits, ids, None, 1.0 / num_rows, 0.0, 4)
        row_gradient(logits, ids, column, column, column, column, None, None, 1.0 / num_rows, 0.0, 4, logits)
    assert [grid for grid, _, _ in recorder.launches] == [(1,), (1,), (7,), (7,), (70000,), (70000,)]
    for first, later in zip(recorder.launches[:2], recorder.launches[-2:], strict=True):
        assert first[2] == later[2]
        assert [type(value) for value in first[1]] == [type(value) for value in later[1]]


@pytest.mark.parametrize("kernel", [row_reduce_kernel, row_gradient_kernel, sweep_kernel])
def test_no_kernel_specialises_on_row_counts_or_strides(kernel):
    varying = {name for name in kernel.arg_names if name == "num_rows" or name.endswith("stride")}
    assert varying
    assert varying == set(kernel.kwargs["do_not_specialize"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(389, 5).t()}, "logits has strides"),
        ({"logits": torch.zeros(5)}, "logits has shape"),
        ({"logits": torch.zeros(5, 389, dtype=torch.float64)}, "logits has dtype"),
        ({"vocab_size": 390}, "vocab_size=390"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_bad_logits_are_named(changes, message):
    logits, ids, _ = random_case()
    arguments = {"logits": logits, "vocab_size": 389, **changes}
    with pytest.raises(ValueError, match=message):
        row_statistics(arguments["logits"], ids, None, 1.0, 0.0, arguments["vocab_size"])


def test_bad_results_are_named():
    logits, ids, _ = random_case()
    for out, message in [
        (torch.zeros(389, 5).t(), "out has strides"),
        (torch.zeros(5, 388), "vocab_size=389"),
        (torch.zeros(4, 389), "out has shape"),
        (logits.view(torch.bfloat16)[:, :389], "out overlaps"),
    ]:
        with pytest.raises(ValueError, match=message):
            gradient(logits, ids, torch.ones(5), None, out=out)
