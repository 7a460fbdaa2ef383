"""The Triton kernels of the linear head, in the interpreter, against float64."""

from __future__ import annotations

import mmap

import pytest
import torch

from spear_kernels.linear_logprob.launch import choose_splits, fused_partials, live_rows_outer, live_rows_product
from spear_kernels.linear_logprob.tile import Tile, forward_tile, outer_tile, product_tile_of
from spear_kernels.testing import OperationRecorder, assert_close_to_truth, head_problem

SMALL = Tile(block_m=16, block_n=32, block_k=16, slices=2, num_warps=4, num_stages=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")
MAP_NORESERVE = 0x4000  # Linux; the module mmap does not name it in Python 3.11.


def int32(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def scaled_logits(hidden, weight, bias, temperature, softcap, vocab_size):
    """float64 logits [n, vocab_size] of inputs of any type."""
    z = hidden.double() @ weight[:vocab_size].double().T
    z = z if bias is None else z + bias[:vocab_size].double()
    z = z if not softcap else softcap * torch.tanh(z / softcap)
    return z / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)


def joined(partials: torch.Tensor) -> dict[str, torch.Tensor]:
    """logp, entropy, peak, total [n] of partials [S, 4, n], in float64."""
    peaks, totals, weighted, targets = partials.double().unbind(1)
    peak = peaks.amax(0)
    shift = (peaks - peak).nan_to_num(nan=0.0, neginf=-1e9)
    total = (totals * shift.exp()).sum(0)
    mean = ((weighted + totals * shift) * shift.exp()).sum(0) / total
    return {
        "logp": targets.amax(0) - peak - total.log(),
        "entropy": total.log() - mean,
        "peak": peak,
        "total": total,
    }


def truth_and_naive(z: torch.Tensor, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same statistics of logits [n, V], by the definition in float64, and in float32."""

    def statistics(z: torch.Tensor) -> dict[str, torch.Tensor]:
        logp = z.log_softmax(1)
        entropy = -(logp.exp() * logp.clamp(min=-1e9)).sum(1)
        return {"logp": logp.gather(1, ids[:, None])[:, 0], "entropy": entropy, "peak": z.amax(1)}

    return statistics(z), statistics(z.float())


def assert_statistics(partials: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> None:
    truth, naive = truth_and_naive(z, ids)
    actual = joined(partials)
    for name, value in truth.items():
        assert_close_to_truth(actual[name].float(), value, naive[name])


def head(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32):
    problem = head_problem(rows, width, vocab)
    return problem.hidden.to(dtype), problem.weight.to(dtype), problem.bias.to(dtype), problem.ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["uncapped", "soft-cap"])
def test_fused_statistics_with_bias_and_temperatures_match_float64(dtype, softcap):
    hidden, weight, bias, ids = head(37, 40, 151, dtype)
    temperature = torch.linspace(0.4, 1.7, 37)
    partials = fused_partials(hidden, weight, bias, ids, temperature, 1.0, softcap, 151, 3, SMALL)
    assert partials.shape == (3, 4, 37)
    assert_statistics(partials, scaled_logits(hidden, weight, bias, temperature, softcap, 151), ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_statistics_with_production_tiles_match_float64(dtype):
    hidden, weight, _, ids = head(140, 72, 530, dtype)
    partials = fused_partials(hidden, weight, None, ids, None, 0.7, 0.0, 530)
    assert_statistics(partials, scaled_logits(hidden, weight, None, 0.7, 0.0, 530), ids)


@pytest.mark.parametrize("num_splits", [1, 2, 5])
def test_any_number_of_splits_gives_the_same_statistics(num_splits):
    hidden, weight, bias, ids = head(17, 16, 133)
    partials = fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 133, num_splits, SMALL)
    assert partials.shape == (num_splits, 4, 17)
    assert_statistics(partials, scaled_logits(hidden, weight, bias, 1.0, 0.0, 133), ids)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 64, 100])
def test_padded_columns_count_for_nothing_whatever_they_hold(vocab_size):
    hidden, weight, bias, ids = head(9, 16, 100)
    weight[vocab_size:], bias[vocab_size:], ids = float("nan"), float("nan"), ids % vocab_size
    partials = fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, vocab_size, 1, SMALL)
    assert_statistics(partials, scaled_logits(hidden, weight, bias, 1.0, 0.0, vocab_size), ids)


def test_logits_far_below_zero_lose_nothing():
    hidden, weight, _, ids = head(9, 16, 70)
    bias = torch.full((70,), -1e4)
    partials = fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 70, 2, SMALL)
    z = (hidden @ weight.T + bias).double()
    truth, _ = truth_and_naive(z, ids)
    actual = joined(partials)
    # The logits themselves are rounded to float32 at 1e4 in both.
    torch.testing.assert_close(actual["entropy"], truth["entropy"], atol=2e-3, rtol=0)
    torch.testing.assert_close(actual["logp"], truth["logp"], atol=2e-3, rtol=0)
    assert actual["peak"].max() < -9e3


def test_tokens_of_logit_minus_infinity_have_probability_and_entropy_zero():
    hidden, weight, bias, ids = head(9, 16, 100)
    bias[:70] = -INF  # Two whole blocks and a part of the third.
    ids = ids % 30 + 70
    partials = fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 100, 1, SMALL)
    assert_statistics(partials, scaled_logits(hidden, weight[70:], bias[70:], 1.0, 0.0, 30), ids - 70)


def test_a_row_of_minus_infinity_alone_gives_zero_sums_and_no_nan():
    hidden, weight, bias, ids = head(9, 16, 70)
    bias[:] = -INF
    peak, total, weighted, target = fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 70, 2, SMALL).unbind(1)
    assert (peak == -INF).all() and (target == -INF).all()
    assert (total == 0).all() and (weighted == 0).all()


def test_a_target_outside_the_shard_is_minus_infinity_and_changes_no_sum():
    hidden, weight, _, ids = head(6, 16, 100)
    outside = torch.tensor([-1, 90, 100, 2**40, -(2**40), 2**32])
    here = fused_partials(hidden, weight, None, ids % 90, None, 1.0, 0.0, 90, 1, SMALL)
    elsewhere = fused_partials(hidden, weight, None, outside, None, 1.0, 0.0, 90, 1, SMALL)
    assert (elsewhere[:, 3] == -INF).all()
    assert (here[:, 3] > -INF).all()
    torch.testing.assert_close(elsewhere[:, :3], here[:, :3], atol=0, rtol=0)


@pytest.mark.parametrize("token", [0, 31, 32, 63, 64, 99])
def test_a_target_is_found_in_whichever_block_holds_it(token):
    hidden, weight, bias, _ = head(32, 16, 100)
    ids = torch.full((32,), token)
    partials = fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 100, 2, SMALL)
    assert_statistics(partials, scaled_logits(hidden, weight, bias, 1.0, 0.0, 100), ids)


def test_a_certain_token_has_log_probability_zero_and_never_above():
    hidden, weight, _, ids = head(9, 16, 70)
    bias = torch.zeros(70)
    bias[3] = 200.0
    actual = joined(fused_partials(hidden, weight, bias, torch.full_like(ids, 3), None, 1.0, 0.0, 70, 2, SMALL))
    assert (actual["logp"] == 0).all()
    assert (actual["entropy"] >= 0).all() and (actual["entropy"] < 1e-20).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_a_nan_in_one_row_stays_in_that_row():
    hidden, weight, bias, ids = head(20, 16, 70)
    hidden[4] = float("nan")
    actual = joined(fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 70, 2, SMALL))
    assert torch.isnan(actual["logp"]).nonzero()[:, 0].tolist() == [4]


def test_more_rows_than_a_second_grid_axis_could_number():
    hidden, weight, bias, ids = head(65_553, 3, 5)
    partials = fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 5, 1, Tile(4096, 16, 16, 1, 4, 2))
    assert_statistics(partials, scaled_logits(hidden, weight, bias, 1.0, 0.0, 5), ids)


def test_no_rows_give_empty_partials():
    hidden, weight, bias, ids = head(0, 16, 70)
    assert fused_partials(hidden, weight, bias, ids, None, 1.0, 0.0, 70, 2, SMALL).shape == (2, 4, 0)


def gathered(values: torch.Tensor, order: torch.Tensor, count: int, gather: bool) -> torch.Tensor:
    return values[order[:count]] if gather else values[:count]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "compact-in"])
@pytest.mark.parametrize("scatter", [True, False], ids=["scatter", "compact-out"])
def test_live_product_matches_float64_and_leaves_other_rows_alone(dtype, gather, scatter):
    count, num_rows = 21, 37
    a, weight, bias, _ = head(num_rows, 40, 75, dtype)
    order = torch.randperm(num_rows)
    out = torch.full((num_rows, 75), 7.0)
    assert (
        live_rows_product(
            a, weight.t(), order, int32(count), out, bias=bias, gather=gather, scatter=scatter, tile=SMALL
        ).data_ptr()
        == out.data_ptr()
    )
    exact = gathered(a, order, count, gather).double() @ weight.double().T + bias.double()
    naive = gathered(a, order, count, gather).float() @ weight.float().T + bias.float()
    rows = order[:count] if scatter else torch.arange(count)
    assert_close_to_truth(out[rows], exact, naive)
    others = torch.ones(num_rows, dtype=torch.bool)
    others[rows] = False
    assert (out[others] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_gradient_of_live_rows_with_production_tiles_matches_float64(dtype):
    dz, weight = torch.randn(150, 530).to(dtype), torch.randn(530, 72).to(dtype)
    order, out = torch.randperm(150), torch.zeros(150, 72, dtype=dtype)
    live_rows_product(dz, weight, order, int32(133), out)
    rows = order[:133]
    assert_close_to_truth(out[rows], dz[rows].double() @ weight.double(), (dz[rows].float() @ weight.float()).to(dtype))
    assert (out[order[133:]] == 0).all()


@pytest.mark.parametrize("count", [0, 1, 16, 23])
def test_order_beyond_the_count_is_never_read(count):
    a, weight, _, _ = head(23, 16, 40)
    order = torch.randperm(23)
    a[order[count:]] = float("nan")
    live = order[:count].clone()
    order[count:] = 2**50
    out = torch.full((23, 40), 7.0)
    total = torch.ones(40, 16)
    live_rows_product(a, weight.t(), order, int32(count), out, tile=SMALL)
    live_rows_outer(out, a, order, int32(count), total, tile=SMALL)
    assert ((out != 7.0).any(1).nonzero()[:, 0]).tolist() == sorted(live.tolist())
    exact = 1 + out[live].double().T @ a[live].double()
    assert_close_to_truth(total, exact, 1 + out[live].T @ a[live])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gather_dz", [True, False], ids=["gather-dz", "compact-dz"])
@pytest.mark.parametrize("gather_x", [True, False], ids=["gather-x", "compact-x"])
def test_outer_product_is_added_in_float32(dtype, gather_dz, gather_x):
    dz, x = torch.randn(45, 75).to(dtype), torch.randn(45, 40).to(dtype)
    order, total = torch.randperm(45), torch.randn(75, 40)
    left, right = gathered(dz, order, 37, gather_dz), gathered(x, order, 37, gather_x)
    exact = total.double() + left.double().T @ right.double()
    naive = total + left.float().T @ right.float()
    live_rows_outer(dz, x, order, int32(37), total, gather_dz=gather_dz, gather_x=gather_x, tile=SMALL)
    assert_close_to_truth(total, exact, naive)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer_product_with_production_tiles_matches_float64(dtype):
    dz, x = torch.randn(150, 300).to(dtype), torch.randn(150, 72).to(dtype)
    order, total = torch.randperm(150), torch.zeros(300, 72)
    live_rows_outer(dz, x, order, int32(131), total)
    left, right = dz[order[:131]], x[order[:131]]
    assert_close_to_truth(total, left.double().T @ right.double(), left.float().T @ right.float())


def test_small_half_precision_gradients_are_not_lost_in_a_large_sum():
    # Each addition lies below half a unit in the last place of a bfloat16 total of 1024.
    total, ones = torch.full((16, 16), 1024.0), torch.ones(16, 16, dtype=torch.bfloat16)
    for _ in range(8):
        live_rows_outer(ones / 64, ones, torch.arange(16), int32(16), total, tile=SMALL)
    assert (total == 1026.0).all()


def test_the_outer_product_is_bitwise_the_same_in_every_run():
    dz, x, order = torch.randn(70, 40), torch.randn(70, 24), torch.randperm(70)
    first, second = (live_rows_outer(dz, x, order, int32(61), torch.ones(40, 24), tile=SMALL) for _ in range(2))
    assert torch.equal(first, second)


def distant_rows(width: int) -> torch.Tensor:
    """Zeros float16 [3, width] whose rows start 2**30 elements apart, in memory that is never touched.

    There is as much room before the first row, where a row number times stride that wraps at 2**31 would land.
    """
    stride, start = 2**30, 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    space = mmap.mmap(-1, 2 * (start + 2 * stride + width), flags=flags)
    return torch.frombuffer(space, dtype=torch.float16).as_strided((3, width), (stride, 1), start)


@pytest.fixture
def far_and_near():
    far, near = distant_rows(16), torch.randn(3, 16).half()
    return far.copy_(near), near


def test_head_rows_beyond_two_to_the_31_elements_are_read(far_and_near):
    far, near = far_and_near
    ids = torch.arange(3)
    expected = fused_partials(near, near, None, ids, None, 1.0, 0.0, 3, 1, SMALL)
    for hidden, weight in ((far, near), (near, far)):
        actual = fused_partials(hidden, weight, None, ids, None, 1.0, 0.0, 3, 1, SMALL)
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_live_rows_beyond_two_to_the_31_elements_are_read(far_and_near):
    far, near = far_and_near
    order, count = torch.arange(3), int32(3)
    for left, right in ((far, near), (near, far)):
        product = live_rows_product(left, right.t(), order, count, torch.zeros(3, 3), tile=SMALL)
        torch.testing.assert_close(product, near.float() @ near.float().T)
        compact = live_rows_product(left, right.t(), order, count, torch.zeros(3, 3), gather=False, tile=SMALL)
        torch.testing.assert_close(compact, product, atol=0, rtol=0)
        total = live_rows_outer(left, right, order, count, torch.zeros(16, 16), tile=SMALL)
        torch.testing.assert_close(total, near.float().T @ near.float())
        kept = {"gather_dz": False, "gather_x": False}
        compact = live_rows_outer(left, right, order, count, torch.zeros(16, 16), tile=SMALL, **kept)
        torch.testing.assert_close(compact, total, atol=0, rtol=0)


def test_live_rows_beyond_two_to_the_31_elements_are_written(far_and_near):
    far, near = far_and_near
    square = torch.randn(16, 16).half()
    live_rows_product(near, square, torch.arange(3), int32(3), far, tile=SMALL)
    torch.testing.assert_close(far.clone(), (near.float() @ square.float()).half(), atol=2e-3, rtol=2e-3)


def test_matrices_need_not_be_contiguous():
    wide, order, count = torch.randn(21, 80), torch.randperm(21), int32(13)
    hidden, weight = wide[:, ::2], torch.randn(40, 50).t()
    z = hidden.double() @ weight.double().T
    partials = fused_partials(hidden, weight, None, torch.arange(21), None, 1.0, 0.0, 50, 2, SMALL)
    assert_statistics(partials, z, torch.arange(21))
    padded = torch.full((21, 64), 7.0)
    live_rows_product(hidden, weight.t(), order, count, padded[:, :50], tile=SMALL)
    rows = order[:13]
    assert_close_to_truth(padded[rows, :50], z[rows], (hidden @ weight.t())[rows])
    assert (padded[:, 50:] == 7.0).all()
    total = live_rows_outer(padded[:, :50], hidden, order, count, torch.zeros(50, 40), tile=SMALL)
    left, right = padded[rows, :50], hidden[rows]
    assert_close_to_truth(total, left.double().T @ right.double(), left.T @ right)


def test_no_launch_waits_for_the_device():
    hidden, weight, bias, ids = head(20, 16, 40)
    order, out, total = torch.randperm(20), torch.zeros(20, 40), torch.zeros(40, 16)
    with OperationRecorder() as recorder:
        fused_partials(hidden, weight, bias, ids, torch.ones(20), 1.0, 0.0, 40, 1, SMALL)
        live_rows_product(hidden, weight.t(), order, int32(9), out, tile=SMALL)
        live_rows_outer(out, hidden, order, int32(9), total, tile=SMALL)
    assert not recorder.host_syncs


@pytest.mark.parametrize(("row_blocks", "blocks"), [(1, 594), (2, 594), (64, 594), (512, 594), (1, 1), (3, 5)])
def test_splits_fill_the_device_and_never_exceed_the_blocks(row_blocks, blocks):
    splits = choose_splits(row_blocks, blocks, 132)
    assert 1 <= splits <= blocks
    waves = -(-row_blocks * splits // 132)
    share = row_blocks * blocks / (waves * 132 * -(-blocks // splits))
    assert share > 0.85 or splits == blocks


def test_few_rows_still_use_most_of_the_device():
    assert choose_splits(1, 594, 132) > 99


@pytest.mark.parametrize("tile_of", [forward_tile, product_tile_of, outer_tile])
def test_double_precision_is_refused_with_the_remedy(tile_of):
    with pytest.raises(ValueError, match=r"float64.*backend='torch'"):
        tile_of(torch.float64, 90)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("tile_of", [forward_tile, product_tile_of, outer_tile])
def test_operands_of_all_stages_fit_shared_memory(tile_of, arch):
    tile = tile_of(torch.bfloat16, arch)
    room = {80: 163, 90: 227, 100: 227, 103: 227}.get(arch, 99)
    assert tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * 2 <= room << 10


def test_bad_arguments_are_named():
    hidden, weight, _, ids = head(5, 16, 40)
    order, out = torch.arange(5), torch.zeros(5, 40)
    with pytest.raises(ValueError, match=r"hidden is torch\.float32, weight torch\.bfloat16"):
        fused_partials(hidden, weight.bfloat16(), None, ids, None, 1.0, 0.0, 40)
    with pytest.raises(ValueError, match="vocab_size=41"):
        fused_partials(hidden, weight, None, ids, None, 1.0, 0.0, 41)
    with pytest.raises(ValueError, match="num_splits=0"):
        fused_partials(hidden, weight, None, ids, None, 1.0, 0.0, 40, 0)
    with pytest.raises(ValueError, match="transposition of b"):
        live_rows_product(hidden, weight, order, int32(1), out)
    with pytest.raises(ValueError, match=r"order is torch\.int32"):
        live_rows_product(hidden, weight.t(), order.int(), int32(1), out)
    with pytest.raises(ValueError, match=r"count is torch\.int64"):
        live_rows_product(hidden, weight.t(), order, torch.tensor([1]), out)
    with pytest.raises(ValueError, match="expected contiguous float32"):
        live_rows_outer(out, hidden, order, int32(1), torch.zeros(40, 16).half())
