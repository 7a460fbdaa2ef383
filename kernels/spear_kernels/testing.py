"""Tools to test operators: random problems, a tolerance that is derived and not chosen, and memory probes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from spear_kernels.checks import host_may_wait
from spear_kernels.cov_select import covariance_select
from spear_kernels.linear_logprob.reference import linear_logprob_reference
from spear_kernels.logprob.reference import logprob_reference
from spear_kernels.policy_loss import PolicyLossConfig


@dataclass
class PolicyProblem:
    """Packed tokens of a few sequences, float64, some masked out; sequences are shuffled into each other."""

    logits: torch.Tensor  # [N, V]
    ids: torch.Tensor  # int64 [N]
    logp: torch.Tensor  # [N], of `ids` under `logits`
    entropy: torch.Tensor  # [N]
    old_logp: torch.Tensor  # [N]
    ref_logp: torch.Tensor  # [N]
    advantages: torch.Tensor  # [N], one value per sequence
    mask: torch.Tensor  # bool [N]
    seq_ids: torch.Tensor  # int64 [N]
    positions: torch.Tensor  # int64 [N], rank among the action tokens of the sequence
    row_weight: torch.Tensor  # [N]

    def selection(self, cfg: PolicyLossConfig, seed: int = 0) -> torch.Tensor | None:
        """The tokens `cfg` acts on by covariance, bool [N]; None for kinds that choose none."""
        if not cfg.uses_covariance:
            return None
        return covariance_select(
            self.logp,
            self.old_logp,
            self.advantages,
            self.mask,
            cfg,
            self.seq_ids,
            seed,
            positions=self.positions,
            row_weight=self.row_weight,
        )


@dataclass
class HeadProblem:
    """Hidden states and a head, float64."""

    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor  # [V]
    ids: torch.Tensor  # int64 [N]
    temperature: torch.Tensor  # [N]


def head_problem(num_rows: int = 23, width: int = 8, vocab: int = 37, seed: int = 0) -> HeadProblem:
    """A head whose logits have a standard deviation near 2."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    temperature = 0.5 + torch.rand(num_rows, generator=random, dtype=torch.float64)
    ids = torch.randint(vocab, (num_rows,), generator=random)
    weight = normal(vocab, width) * 2 / width**0.5
    return HeadProblem(normal(num_rows, width), weight, normal(vocab), ids, temperature)


def policy_problem(num_rows: int = 64, num_seqs: int = 7, seed: int = 0, spread: float = 0.4) -> PolicyProblem:
    """Tokens whose log-ratio has the standard deviation `spread`, in nats; about a third are masked out."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    logits, ids = normal(num_rows, 11), torch.randint(11, (num_rows,), generator=random)
    logp, entropy = logprob_reference(logits, ids)
    seq_ids = torch.randint(num_seqs, (num_rows,), generator=random) * 1000 + 17
    mask = torch.rand(num_rows, generator=random) < 0.7
    same_earlier = (seq_ids[:, None] == seq_ids[None, :]).tril(-1)
    return PolicyProblem(
        logits,
        ids,
        logp,
        entropy,
        logp + spread * normal(num_rows),
        logp + spread * normal(num_rows),
        normal(num_seqs)[(seq_ids - 17) // 1000],
        mask,
        seq_ids,
        (same_earlier & mask[None, :]).sum(1),
        0.5 + torch.rand(num_rows, generator=random, dtype=torch.float64),
    )


def policy_config(kind: str = "ppo", aggregation: str = "token-mean", **changes: Any) -> PolicyLossConfig:
    """A configuration with every term on, whose bounds bind for some tokens of a `policy_problem`."""
    terms = {"dual_clip": 2.0, "entropy_coef": 0.03, "kl_coef": 0.2, "norm_length": 12}
    bounds = {"clip_low": 0.2, "clip_high": 0.28, "cov_ratio": 0.2, "cov_lower": -0.3, "cov_upper": 0.8}
    return PolicyLossConfig(kind=kind, aggregation=aggregation, **{**terms, **bounds, **changes})


def head_with_logp(problem: PolicyProblem, width: int = 6, seed: int = 0) -> HeadProblem:
    """A head with the rows and ids of `problem`; its log-probs replace logp and shift old_logp and ref_logp with it."""
    head = head_problem(len(problem.ids), width, problem.logits.shape[1], seed)
    head.ids = problem.ids
    logp, entropy = linear_logprob_reference(head.hidden, head.weight, head.ids, head.temperature, head.bias)
    problem.old_logp = problem.old_logp - problem.logp + logp
    problem.ref_logp = problem.ref_logp - problem.logp + logp
    problem.logp, problem.entropy = logp, entropy
    return head


def assert_close_to_truth(actual: torch.Tensor, truth: torch.Tensor, naive: torch.Tensor, factor: float = 2.0) -> None:
    """Assert that `actual` errs from float64 `truth` at most `factor` times as much as `naive` torch of its dtype.

    A floor of 16 roundings of the computing type at the largest magnitude covers the case of a lucky `naive`.
    """
    assert not torch.isnan(actual).any(), "NaN in the result"
    error = (actual.double() - truth).abs().max().item()
    naive_error = (naive.double() - truth).abs().max().item()
    floor = 16 * torch.finfo(actual.dtype).eps * max(truth.abs().max().item(), torch.finfo(actual.dtype).tiny)
    assert error <= factor * naive_error + floor, f"error {error:.3e}, naive torch {naive_error:.3e}, floor {floor:.3e}"


class OperationRecorder(TorchDispatchMode):
    """Watches the operations inside the context, also inside our operators: names, largest result, matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest_numel = 0
        self.matrix_flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        own = OPDEFS.get(func.name().removesuffix(".default")) if func.namespace == "spear_kernels" else None
        if own is not None:
            # A dispatch mode is off inside the operator it was called for, which is opaque to it otherwise.
            with self:
                return own._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and _holds_mask(args[1]):
            self.names.add("index by a mask")
        if name in ("mm", "addmm", "addmm_"):
            left, right = [argument for argument in args if isinstance(argument, torch.Tensor)][-2:]
            self.matrix_flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.largest_numel = max(self.largest_numel, tensor.numel())
        return result

    @property
    def host_syncs(self) -> set[str]:
        """Operations seen that make the host wait for a device."""
        waiting = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim", "equal"}
        return self.names & (waiting | {"bincount", "repeat_interleave", "index by a mask"})


def _holds_mask(indices: Any) -> bool:
    masks = (torch.bool, torch.uint8)
    return any(isinstance(index, torch.Tensor) and index.dtype in masks for index in indices)


PLANNING_MODULES = ("spear_kernels.linear_logprob.plan", "spear_kernels.linear_policy_loss.op")
"""Where masks and advantages are looked at, which may lie on the host beside hidden states on a device."""


@contextmanager
def as_if_on_a_device(plan_on_host: bool = False) -> Iterator[None]:
    """Let tensors on the CPU pass for tensors whose values the host would have to wait for.

    With `plan_on_host` only those that a batch is planned by, its mask and advantages, can be looked at.
    """
    original = host_may_wait
    patched = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("spear_kernels") and hasattr(module, "host_may_wait")
        if not (plan_on_host and name in PLANNING_MODULES)
    ]
    for module in patched:
        module.host_may_wait = lambda tensor: False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for module in patched:
            module.host_may_wait = original  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory from torch.empty with NaN, so that reading an element nobody wrote shows."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


SLOW_IMPORTS = ["torch._dynamo", "torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2"]
"""Modules that test processes share. The first call of a process decides, so they are the same for all tests."""


def run_ranks(work: Callable[[int], Any], world_size: int, folder: Path) -> list[Any]:
    """What `work(rank)`, a function of a module, returns in each of `world_size` processes that form a gloo group."""
    # A fork server imports what takes long once for all processes, as far as it is installed, and holds no thread that
    # a fork could lose. It does not know this process's sys.path, so what is tested must not be preloaded.
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)
    arguments = (work, world_size, str(folder))
    start = torch.multiprocessing.start_processes  # pyright: ignore[reportPrivateImportUsage]
    start(_run_rank, arguments, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_rank(rank: int, work: Callable[[int], Any], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
