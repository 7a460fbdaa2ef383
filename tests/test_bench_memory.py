"""Memory in the kernel benchmark: what the probe sees, and that a step is measured in a process of its own."""

from __future__ import annotations

import mmap

import torch

from bench.layers.level import Case
from bench.layers.measure import resident_peak
from bench.layers.memory import peak_of
from bench.layers.problems import HEADS, Shape, make_problem
from tests.test_bench_kernels import CPU, contender_of, step_of


def test_the_memory_probe_sees_what_was_allocated_and_freed():
    def work():
        # Pages of its own: a tensor may get memory that tests before this one have left to the process.
        torch.frombuffer(mmap.mmap(-1, 64 << 20), dtype=torch.uint8).fill_(1)

    assert 60 << 20 < resident_peak(work) < 80 << 20


def test_memory_of_a_step_is_taken_in_a_process_of_its_own():
    # Large enough that pages which the process has left over from its imports do not count.
    case = Case("hidden", Shape(HEADS["tiny"], 16384))
    problem = make_problem(case.shape, CPU, seed=3)
    figure = peak_of(contender_of("naive"), step_of("naive"), problem, case, seed=3)
    logits = 16384 * 515 * 4
    assert 1.5 * logits < figure["peak_extra_bytes"] < 8 * logits
