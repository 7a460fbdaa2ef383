"""Settings of the whole test run: interpreted Triton, one thread per worker, and an order that keeps workers busy.

Triton's kernels run in its interpreter, unless TRITON_INTERPRET=0 asks for a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
from hypothesis import settings

# Triton reads it when it is first imported, which any test may do, through transformers for one.
os.environ.setdefault("TRITON_INTERPRET", "1")
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    # Every core has its worker: threads of OpenMP that wait for each other beside other processes take far longer than
    # one does. Torch reads it when it is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline would be an assertion about time, which a busy machine breaks.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LONG_FILES = (
    "tests/integrations/",
    "tests/end_to_end/test_vllm_run.py",
    "tests/end_to_end/test_training.py",
    "tests/rollout/test_vllm_engine.py",
    "tests/end_to_end/test_ranks.py",
    "tests/ops/test_compiled_kernels.py",
    "tests/update/test_sharded.py",
    "tests/ops/test_triton_backend.py",
    "tests/ops/test_vocab_parallel.py",
    "tests/end_to_end/test_every_task.py",
    "tests/test_cli.py",
    "tests/test_sft.py",
    "tests/test_environments_page.py",
    "tests/envs/test_adapter",
    "tests/envs/sandbox/",
    "tests/sync/test_vllm_families.py",
    "tests/test_bench",
    "tests/rollout/test_vllm_process.py",
    "tests/end_to_end/test_two_nodes.py",
    "tests/update/test_optimizer_step.py",
    "tests/ops/test_policy_compile.py",
    "tests/rollout/test_hf_engine.py",
    "tests/rollout/test_vllm_again.py",
    "tests/ops/test_cov_select_ranks.py",
)
"""Files and folders that take longest, in the order in which workers shall take them up."""

SLOW_IMPORTS = ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2")
"""What collecting the tests imports sooner or later in every worker."""


def pytest_configure(config: pytest.Config) -> None:
    # By default xdist hands out the files with the most tests first: those with few tests, which are the longest, would
    # come last, where nothing is left for the other worker to do.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    if IS_WORKER:
        _import_untraced()


def _import_untraced() -> None:
    """Import what is not ours while nobody records the lines: recording makes imports several times as slow."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        for name in SLOW_IMPORTS:
            if importlib.util.find_spec(name.partition(".")[0]):
                importlib.import_module(name)
    finally:
        sys.settrace(tracer)


def _turn(item: pytest.Item) -> int:
    return next((turn for turn, name in enumerate(LONG_FILES) if item.nodeid.startswith(name)), len(LONG_FILES))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
