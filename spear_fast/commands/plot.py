"""`spear-fast plot`: the curves of runs."""

from __future__ import annotations

import argparse


def plot(args: argparse.Namespace) -> int:
    """Draw them and print where."""
    from spear_fast.log.plot import plot_runs

    print(plot_runs(args.runs, args.out or args.runs[0] / "curves.png"))
    return 0
