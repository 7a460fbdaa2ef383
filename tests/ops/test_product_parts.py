"""Products over counted rows that are cut along their depth, and the padding between rows, against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from spear_kernels.linear_logprob import launch
from spear_kernels.linear_logprob.counted_kernel import divide_last_wave
from spear_kernels.linear_logprob.launch import live_rows_outer, live_rows_product, padded_width, part_slots
from spear_kernels.linear_logprob.tile import HOPPER_TILE, PART_BYTES, SMALL_TILE, Tile
from spear_kernels.testing import OperationRecorder, assert_close_to_truth

SMALL = Tile(block_m=16, block_n=32, block_k=16, slices=2, num_warps=4, num_stages=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_ROWS, DEPTH, WIDTH = 37, 901, 75
NAN = float("nan")


@pytest.fixture
def cut(monkeypatch):
    """Let small products be cut too."""
    monkeypatch.setattr(launch, "PART_DEPTH", 0)


def int32(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def in_padding(matrix: torch.Tensor, filler: float = NAN) -> torch.Tensor:
    """The matrix in rows of a multiple of 32 elements, with `filler` between them."""
    wide = torch.full((len(matrix), -(-matrix.shape[1] // 32) * 32), filler, dtype=matrix.dtype)
    wide[:, : matrix.shape[1]] = matrix
    return wide[:, : matrix.shape[1]]


def padding_of(matrix: torch.Tensor) -> torch.Tensor:
    """The elements between the rows of a matrix."""
    rows = matrix.as_strided((len(matrix), matrix.stride(0)), matrix.stride())
    return rows[:, matrix.shape[1] :]


@triton.jit
def division_kernel(out, tiles, steps, num_processors, num_slots):
    alone, parts = divide_last_wave(tiles, steps, num_processors, num_slots)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out, alone)
    tl.store(out + 1, parts)


def division(tiles: int, steps: int, num_processors: int, num_slots: int) -> tuple[int, int]:
    out = torch.zeros(2, dtype=torch.int32)
    division_kernel[(1,)](out, tiles, steps, num_processors, num_slots)
    return int(out[0]), int(out[1])


@pytest.mark.parametrize("num_processors", [2, 7, 12])
@pytest.mark.parametrize("count", [0, 1, 33])
def test_cut_products_match_float64_and_leave_other_rows_alone(num_processors, count, cut):
    a, b, bias = torch.randn(NUM_ROWS, DEPTH), torch.randn(DEPTH, WIDTH), torch.randn(WIDTH)
    order, out = torch.randperm(NUM_ROWS), torch.full((NUM_ROWS, WIDTH), 7.0)
    live_rows_product(a, b, order, int32(count), out, bias=bias, tile=SMALL, num_processors=num_processors)
    rows = order[:count]
    if count:
        assert_close_to_truth(out[rows], a[rows].double() @ b.double() + bias.double(), a[rows] @ b + bias)
    assert (out[order[count:]] == 7.0).all()


def test_these_products_are_cut_and_some_tiles_are_not():
    steps, column_blocks = -(-DEPTH // SMALL.block_k), -(-WIDTH // SMALL.block_n)
    kinds = set()
    for row_blocks in (1, 2, 3):
        for num_processors in (2, 7, 12):
            slots = 3 * num_processors
            alone, parts = division(row_blocks * column_blocks, steps, num_processors, slots)
            kinds.add((alone > 0, parts > 1 and alone < row_blocks * column_blocks))
    assert kinds >= {(True, True), (False, True), (True, False)}


@pytest.mark.parametrize(
    ("dtype", "gather", "scatter"), list(zip(DTYPES, (True, True, False), (True, False, True), strict=True)), ids=str
)
def test_cut_products_of_every_type_and_order_match_float64(dtype, gather, scatter, cut):
    count = 21
    a, b = torch.randn(NUM_ROWS, DEPTH).to(dtype), torch.randn(DEPTH, WIDTH).to(dtype)
    order, out = torch.randperm(NUM_ROWS), torch.zeros(NUM_ROWS, WIDTH, dtype=dtype)
    options = {"gather": gather, "scatter": scatter, "tile": SMALL, "num_processors": 5}
    live_rows_product(in_padding(a), b, order, int32(count), out, **options)
    left = a[order[:count]] if gather else a[:count]
    written = order[:count] if scatter else torch.arange(count)
    assert_close_to_truth(out[written], left.double() @ b.double(), (left.float() @ b.float()).to(dtype))


@pytest.mark.parametrize("tile", [HOPPER_TILE, SMALL_TILE], ids=["large", "small"])
def test_cut_products_with_production_tiles_match_float64(tile, cut):
    a, b = torch.randn(150, 2500).bfloat16(), torch.randn(2500, 72).bfloat16()
    order, out = torch.randperm(150), torch.zeros(150, 72, dtype=torch.bfloat16)
    assert division(2, -(-2500 // tile.block_k), 40, 120)[1] > 1
    live_rows_product(in_padding(a), b, order, int32(133), out, tile=tile, num_processors=40)
    rows = order[:133]
    assert_close_to_truth(out[rows], a[rows].double() @ b.double(), (a[rows].float() @ b.float()).bfloat16())
    assert (out[order[133:]] == 0).all()


def test_cut_products_are_bitwise_the_same_in_every_run_and_wait_for_nothing(cut):
    a, b, order = torch.randn(NUM_ROWS, DEPTH), torch.randn(DEPTH, WIDTH), torch.randperm(NUM_ROWS)
    results = [torch.zeros(NUM_ROWS, WIDTH) for _ in range(2)]
    with OperationRecorder() as recorder:
        for out in results:
            live_rows_product(a, b, order, int32(30), out, tile=SMALL, num_processors=7)
    assert torch.equal(*results)
    assert not recorder.host_syncs


@pytest.mark.parametrize("tiles", [1, 6, 14, 20, 60, 90, 120, 131, 132, 133, 140, 200, 280, 400])
def test_parts_fill_the_processors_of_an_h100_within_the_memory(tiles):
    steps, num_processors = 2376, 132
    slots = part_slots(tiles, 152064, num_processors, HOPPER_TILE)
    assert slots * 4 * HOPPER_TILE.block_m * HOPPER_TILE.block_n <= PART_BYTES
    alone, parts = division(tiles, steps, num_processors, slots)
    rest = tiles - alone
    assert rest < num_processors
    assert rest * parts <= slots
    waves = alone / num_processors + -(-rest * parts // num_processors) / parts
    assert waves <= tiles / num_processors + 0.26
    assert waves <= -(-tiles // num_processors)


@pytest.mark.parametrize(("depth", "num_processors"), [(8192, 132), (152064, 1)])
def test_products_that_gain_nothing_stay_uncut(depth, num_processors):
    assert part_slots(60, depth, num_processors, HOPPER_TILE) == 0


def test_memory_bounds_the_parts_of_a_device_with_many_processors():
    slots = part_slots(60, 152064, 1000, HOPPER_TILE)
    assert slots == 512
    assert division(60, 2376, 1000, slots) == (0, 8)
    assert division(600, 2376, 1000, slots) == (0, 1)


@pytest.mark.parametrize("width", [64, 75, 80, 95, 96])
@pytest.mark.parametrize("num_processors", [1, 5], ids=["whole", "cut"])
def test_nan_between_the_rows_of_a_gradient_reaches_no_result(width, num_processors, cut):
    dz, x, weight = torch.randn(23, width), torch.randn(23, 40), torch.randn(width, 40)
    order, count = torch.randperm(23), int32(19)
    padded, total, hidden = in_padding(dz), torch.ones(width, 40), torch.zeros(23, 40)
    live_rows_product(padded, weight, order, count, hidden, tile=SMALL, num_processors=num_processors)
    live_rows_outer(padded, x, order, count, total, tile=SMALL)
    rows = order[:19]
    assert_close_to_truth(hidden[rows], dz[rows].double() @ weight.double(), dz[rows] @ weight)
    assert_close_to_truth(total, 1 + dz[rows].double().T @ x[rows].double(), 1 + dz[rows].T @ x[rows])
    assert torch.isnan(padding_of(padded)).all()


@pytest.mark.parametrize("width", [75, 96])
def test_padding_of_logits_is_written_only_on_request(width):
    x, weight, order = torch.randn(9, 16), torch.randn(width, 16), torch.arange(9)
    for overwrite in (False, True):
        out = in_padding(torch.zeros(9, width), 7.0)
        live_rows_product(x, weight.t(), order, int32(5), out, overwrite_padding=overwrite, tile=SMALL)
        assert_close_to_truth(out[:5], x[:5].double() @ weight.double().T, x[:5] @ weight.T)
        changed = padding_of(out) != 7.0
        assert not changed[5:].any()
        assert int(changed[:5].sum()) == (5 * (-width % 16) if overwrite else 0)


def test_padding_is_taken_for_readable_only_where_the_memory_has_it():
    assert padded_width(in_padding(torch.zeros(3, 75))) == 80
    assert padded_width(torch.zeros(3, 75)) == 75
    assert padded_width(torch.zeros(3, 80)) == 80
    assert padded_width(torch.zeros(4, 75)[:3]) == 75  # What follows a row is the next row.
    ends_early = torch.zeros(2 * 96 + 75).as_strided((3, 75), (96, 1))
    assert padded_width(ends_early) == 75
    assert padded_width(ends_early[:2]) == 80
    assert padded_width(torch.zeros(3, 96)[:, 21:]) == 75
