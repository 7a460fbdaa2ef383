"""Covariance selection over gloo ranks: the union of the ranks' choices is what one process chooses from all rows.

Four processes are started once; they run every case as a group of four and, in pairs, as groups of two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from spear_kernels import PolicyLossConfig, covariance_select
from spear_kernels.cov_select import covariance, covariance_metrics, covariance_select_reference, select_by_covariance
from spear_kernels.testing import policy_problem, run_ranks

WORLD = 4
PAIRS = ((0, 1), (3, 2))
NUM_ROWS = 241


@dataclass
class Case:
    """Rows of all ranks, and how the loss chooses among them."""

    rows: dict[str, torch.Tensor]
    cfg: PolicyLossConfig
    seed: int = 5
    hidden: tuple[str, ...] = field(default=())  # arguments that are not passed

    def select(self, rows, group=None):
        rows = {**rows, **dict.fromkeys(self.hidden)}
        return covariance_select(cfg=self.cfg, seed=self.seed, group=group, **rows)

    def covariance(self, rows, group=None):
        mask = None if "mask" in self.hidden else rows["mask"]
        cov = covariance(rows["logp"], rows["advantages"], mask, group=group)
        return cov, covariance_metrics(rows["logp"], rows["advantages"], mask, group=group)


def config(kind, ratio=0.1, **bounds):
    return PolicyLossConfig(kind=kind, cov_ratio=ratio, **{"cov_lower": -0.3, "cov_upper": 0.8, **bounds})


def rows_of(num_rows=NUM_ROWS, seed=0, dtype=torch.float32, **changes):
    p = policy_problem(num_rows, seed=seed)
    rows = {name: getattr(p, name).to(dtype) for name in ("logp", "old_logp", "advantages", "row_weight")}
    return {**rows, "mask": p.mask, "seq_ids": p.seq_ids, "positions": p.positions, **changes}


def on_the_bounds(rows):
    """Bounds that are covariances of tokens: one unit in the last place of a mean would let them in."""
    cov = covariance(rows["logp"], rows["advantages"], rows["mask"])[rows["mask"]].sort().values
    return {"cov_lower": float(cov[len(cov) // 3]), "cov_upper": float(cov[-3])}


def cases():
    rows, doubles = rows_of(), rows_of(dtype=torch.float64)
    nothing = torch.zeros(NUM_ROWS, dtype=torch.bool)
    whole = rows_of(seq_ids=torch.arange(NUM_ROWS) // 20)
    some_weightless = rows_of(row_weight=(torch.arange(NUM_ROWS) % 3).float())
    huge = rows_of(advantages=rows["advantages"] * 1e30)
    constant_logp = rows_of(logp=torch.full((NUM_ROWS,), -0.3), old_logp=torch.full((NUM_ROWS,), -0.3))
    duplicates = {"seq_ids": torch.zeros(NUM_ROWS).long(), "positions": torch.arange(NUM_ROWS) // 60}
    one_name = {"seq_ids": torch.zeros(NUM_ROWS).long(), "positions": torch.zeros(NUM_ROWS).long()}
    same = {**constant_logp, **one_name, "advantages": torch.ones(NUM_ROWS)}
    broken = rows["logp"].clone()
    broken[[5, 130]] = torch.tensor([torch.nan, -torch.inf])
    made = {"no_tokens": Case(rows_of(mask=nothing), config("kl_cov"))}
    for kind in ("clip_cov", "kl_cov"):
        made |= {
            f"{kind}_float32": Case(rows, config(kind)),
            f"{kind}_float64": Case(doubles, config(kind)),
            f"{kind}_few": Case(rows, config(kind, 0.002)),
            f"{kind}_none": Case(rows, config(kind, 0.0)),
            f"{kind}_all": Case(rows, config(kind, 1.0)),
            f"{kind}_on_the_bounds": Case(rows, config(kind, 1.0, **on_the_bounds(rows))),
            f"{kind}_huge": Case(huge, config(kind, cov_lower=-1e30, cov_upper=1e30)),
            f"{kind}_constant_logp": Case(constant_logp, config(kind)),
            f"{kind}_duplicate_names": Case(rows_of(**duplicates), config(kind)),
            f"{kind}_all_tied": Case(same, config(kind, 0.37)),
            f"{kind}_one_name": Case(rows_of(**one_name), config(kind)),
            f"{kind}_not_finite": Case(rows_of(logp=broken), config(kind)),
            f"{kind}_weightless": Case(some_weightless, config(kind, 0.5)),
            f"{kind}_no_mask": Case(rows, config(kind), hidden=("mask", "row_weight")),
            f"{kind}_own_positions": Case(whole, config(kind), hidden=("positions",)),
        }
    return made


CASES = cases()


def run_case(group, case, bounds):
    mine = slice(*list(pairwise(bounds))[group.rank()])
    rows = {key: value[mine] for key, value in case.rows.items()}
    return (case.select(rows, group), *case.covariance(rows, group))


# Where each rank's rows end. Whole sequences of 20 rows, so that default positions can be made; ranks without rows.
CUTS = {2: (0, 20, NUM_ROWS), WORLD: (0, 0, 100, 120, NUM_ROWS)}
LOPSIDED = {2: (0, NUM_ROWS, NUM_ROWS), WORLD: (0, 60, 60, NUM_ROWS, NUM_ROWS)}


def run_scattered(group):
    """Row i lies on rank (i * 7) % 13 % size, so that no rank holds a contiguous part."""
    case = CASES["kl_cov_float32"]
    mine = torch.arange(NUM_ROWS) * 7 % 13 % group.size() == group.rank()
    return mine, case.select({key: value[mine] for key, value in case.rows.items()}, group)


def run_compiled(group):
    """One compilation with a group, two sizes: whether the results equal those of the eager call."""
    compiled = torch.compile(covariance_select, fullgraph=True, dynamic=True, backend="aot_eager")
    same = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_rows in (50 + group.rank(), 90 + group.rank()):
            case = Case(rows_of(num_rows, seed=group.rank()), config("kl_cov"))
            same.append(torch.equal(compiled(cfg=case.cfg, group=group, **case.rows), case.select(case.rows, group)))
    return same


def sent_elements(group, num_rows):
    """Elements of each message of one selection."""
    sent, all_reduce = [], dist.all_reduce

    def recording(tensor, **options):
        sent.append(tensor.numel())
        return all_reduce(tensor, **options)

    dist.all_reduce = recording
    try:
        case = Case(rows_of(num_rows), config("kl_cov"))
        case.select(case.rows, group)
    finally:
        dist.all_reduce = all_reduce
    return sent


def refusal(group):
    case = Case(rows_of(), config("clip_cov"), hidden=("seq_ids", "positions"))
    with pytest.raises(ValueError, match="seq_ids=None") as refused:
        case.select(case.rows, group)
    return str(refused.value)


def work(rank):
    pairs = [dist.new_group(list(ranks), sort_ranks=False) for ranks in PAIRS]
    pair = next(group for group, ranks in zip(pairs, PAIRS, strict=True) if rank in ranks)
    found = {}
    for group in (dist.group.WORLD, pair):
        cut, lopsided = CUTS[group.size()], LOPSIDED[group.size()]
        found[group.size()] = {
            "cases": {name: run_case(group, case, cut) for name, case in CASES.items()},
            "lopsided": run_case(group, CASES["kl_cov_duplicate_names"], lopsided),
            "scattered": run_scattered(group),
        }
    if rank in PAIRS[0]:
        found["compiled"] = run_compiled(pair)
    found["sent"] = [sent_elements(pair, num_rows) for num_rows in (40, 400)]
    found["refusal"] = refusal(pair)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(work, WORLD, tmp_path_factory.mktemp("ranks"))


def members(ranks, size):
    """The results of the ranks of each group of `size`, in the order of their ranks in the group."""
    groups = [range(WORLD)] if size == WORLD else PAIRS
    return [[ranks[rank][size] for rank in group] for group in groups]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_parts_make_up_the_whole(parts, case):
    cov, metrics = case.covariance(case.rows)
    assert torch.equal(torch.cat([part[0] for part in parts]), case.select(case.rows))
    assert_same(torch.cat([part[1] for part in parts]), cov)
    for part in parts:
        assert part[2].keys() == metrics.keys()
        assert_same(torch.stack(list(part[2].values())), torch.stack(list(metrics.values())))


@pytest.mark.parametrize("size", [2, WORLD])
@pytest.mark.parametrize("name", CASES)
def test_union_of_ranks_is_the_choice_of_one_process(ranks, size, name):
    for group in members(ranks, size):
        assert_parts_make_up_the_whole([rank["cases"][name] for rank in group], CASES[name])


@pytest.mark.parametrize("size", [2, WORLD])
def test_ranks_without_rows_take_part(ranks, size):
    for group in members(ranks, size):
        assert_parts_make_up_the_whole([rank["lopsided"] for rank in group], CASES["kl_cov_duplicate_names"])


@pytest.mark.parametrize("size", [2, WORLD])
def test_rows_may_lie_anywhere(ranks, size):
    case = CASES["kl_cov_float32"]
    expected = case.select(case.rows)
    for group in members(ranks, size):
        union = torch.zeros(NUM_ROWS, dtype=torch.bool)
        for rank in group:
            mine, chosen = rank["scattered"]
            union[mine] = chosen
        assert torch.equal(union, expected)


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_one_process_agrees_with_the_definition(kind):
    case = CASES[f"{kind}_float64"]
    named = {name: case.rows[name] for name in ("logp", "old_logp", "advantages", "mask", "seq_ids", "positions")}
    assert torch.equal(case.select(case.rows), covariance_select_reference(cfg=case.cfg, seed=case.seed, **named))


def test_cases_choose_what_they_are_named_for():
    """Guards the cases above against comparing empty choices with empty choices."""
    empty = {name for name, case in CASES.items() if not case.select(case.rows).any()}
    no_candidates = {"clip_cov_not_finite"}
    assert empty == {"no_tokens", "clip_cov_none", "kl_cov_none"} | no_candidates
    tied = CASES["kl_cov_all_tied"]
    num_tokens = int(tied.rows["mask"].sum())
    assert tied.select(tied.rows).sum() == int(num_tokens * 0.37)
    on_bounds = CASES["clip_cov_on_the_bounds"]
    cov, _ = on_bounds.covariance(on_bounds.rows)
    assert (cov == on_bounds.cfg.cov_lower).any()
    assert (cov == on_bounds.cfg.cov_upper).any()


def test_compiled_call_with_a_group_equals_eager(ranks):
    assert [ranks[rank]["compiled"] for rank in PAIRS[0]] == [[True, True]] * 2


def test_messages_do_not_grow_with_the_rows(ranks):
    for rank in ranks:
        few, many = rank["sent"]
        assert few == many
        assert sum(few) * 8 < 600 * 1024


def test_nameless_tokens_of_several_ranks_are_refused(ranks):
    assert all("unique over the ranks" in rank["refusal"] for rank in ranks)


def test_a_group_of_one_and_no_group_communicate_nothing(tmp_path, monkeypatch):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "all_reduce", None)
        case = CASES["clip_cov_float32"]
        assert torch.equal(case.select(case.rows, dist.group.WORLD), case.select(case.rows))
        rows = case.rows
        cov = covariance(rows["logp"], rows["advantages"], rows["mask"], group=dist.group.WORLD)
        assert torch.equal(
            select_by_covariance(cov, seed=case.seed, cfg=case.cfg, group=dist.group.WORLD, **rows),
            case.select(rows),
        )
    finally:
        dist.destroy_process_group()
