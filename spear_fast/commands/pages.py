"""How commands print plans, tables, success and where the curves are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spear_fast.errors import MissingDependencyError

if TYPE_CHECKING:
    from spear_fast.config.schema import RunConfig
    from spear_fast.planning import Section
    from spear_fast.run_folder import RunFolder


def print_plan(title: str, rows: Sequence[tuple[str, str]], config: RunConfig, file: Path) -> None:
    """Print what a run would do: the plan's rows, its memory on this machine and the resolved configuration."""
    from spear_fast.config.load import dump_config
    from spear_fast.planning import Section, here

    print_sections([Section(title, [("", ""), *rows]), *here(config, file)])
    print(dump_config(config), end="")


def print_sections(sections: Sequence[Section]) -> None:
    """Print tables, and notes as whole lines."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for section in sections:
        if section.rows:
            header, *rows = section.rows
            table = Table(*header, title=section.title, show_header=any(header), title_justify="left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        for index, note in enumerate(section.notes):
            prefix = f"{section.title}: " if not section.rows and index == 0 else ""
            # Not rich's own printing, which would break lines at the terminal's width and read brackets as markup.
            print(prefix + note)


def success_text(stats: Mapping[str, float]) -> str:
    """Return a success rate with its interval, e.g. "85.2% (95 % interval 80.3% to 89.0%, 256 tasks)"."""
    return (
        f"{stats['eval/success_rate']:.1%} (95 % interval {stats['eval/success_low']:.1%} to "
        f"{stats['eval/success_high']:.1%}, {stats['eval/num_tasks']:.0f} tasks)"
    )


def print_curves(folder: RunFolder) -> None:
    """Draw the curves of a run into its folder and print where."""
    from spear_fast.log.plot import plot_runs

    try:
        print(f"curves: {plot_runs([folder.path], folder.curves)}")
    except MissingDependencyError as error:
        print(f"no curves drawn: {error}")
