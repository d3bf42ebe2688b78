"""Tables that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tda_export.calibration.budgets import Allocation
    from tda_export.graph.verify import Check


def print_table(title: str, columns: list[str], rows: list[list[Any]], footer: list[str] | None = None) -> None:
    """Print a table to standard output; the first column is text, the others are numbers."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(title)
    table = Table(show_footer=footer is not None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", footer=footer[number] if footer else "")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(highlight=False, markup=False).print(table)


def print_allocation(allocation: Allocation, title: str) -> None:
    """Print threshold, density and CETT of each layer, and the totals."""
    layers = len(allocation.thresholds)
    rows = [
        [str(layer), f"{threshold:.6f}", f"{density:.3f}", f"{cett:.3f}"]
        for layer, (threshold, density, cett) in enumerate(
            zip(allocation.thresholds, allocation.density, allocation.cett, strict=True)
        )
    ]
    footer = ["all", "", f"{1 - allocation.sparsity:.3f}", f"{sum(allocation.cett) / layers:.3f}"]
    print_table(title, ["layer", "threshold", "density", "CETT"], rows, footer)
    if allocation.recrossing:
        names = ", ".join(map(str, allocation.recrossing))
        Console(highlight=False, markup=False).print(
            f"The CETT curve crosses the budget more than once in layer {names}; the largest threshold within counts."
        )


def print_checks(checks: list[Check]) -> None:
    """Print every check with its largest difference and whether it passed."""
    rows = [
        [
            check.name,
            "" if check.difference is None else f"{check.difference:.2e}",
            "" if check.allowed is None else f"{check.allowed:.1e}",
            "ok" if check.passed else "FAILED",
        ]
        for check in checks
    ]
    print_table("Verification", ["check", "largest difference", "allowed", "result"], rows)
    for check in checks:
        if check.problem:
            Console(highlight=False, markup=False, soft_wrap=True).print(f"{check.name}: {check.problem}")
