"""Tables that several commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tda_export.float_kl import float_kl_cells, float_kl_columns
from tda_export.packing import THRESHOLDS

if TYPE_CHECKING:
    from tda_export.calibration.budgets import Allocation
    from tda_export.graph.verify import Check
    from tda_export.pricing import PriceTable


def print_table(title: str, columns: list[str], rows: list[list[Any]], footer: list[str] | None = None) -> None:
    """Print a table to standard output. The first column is text; the others are numbers."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(title)
    table = Table(show_footer=footer is not None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", footer=footer[number] if footer else "")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(highlight=False, markup=False).print(table)


def print_allocation(allocation: Allocation, title: str) -> None:
    """Print thresholds, densities and CETT of each layer, and the totals."""
    layers = len(allocation.thresholds)
    columns: dict[str, tuple[list[str], str]] = {
        "threshold": ([f"{value:.6f}" for value in allocation.thresholds], ""),
        "density": (
            [f"{value:.3f}" for value in allocation.density],
            f"{sum(allocation.density) / layers:.3f}",
        ),
    }
    if allocation.token_density:
        columns["token threshold"] = ([f"{value:.6f}" for value in allocation.token_thresholds], "")
        columns["up/down density"] = (
            [f"{value:.3f}" for value in allocation.token_density],
            f"{sum(allocation.token_density) / layers:.3f}",
        )
    columns["CETT"] = ([f"{value:.3f}" for value in allocation.cett], f"{sum(allocation.cett) / layers:.3f}")
    rows = [[str(layer), *(values[layer] for values, _ in columns.values())] for layer in range(layers)]
    print_table(title, ["layer", *columns], rows, ["all", *(total for _, total in columns.values())])
    if allocation.recrossing:
        names = ", ".join(map(str, allocation.recrossing))
        Console(highlight=False, markup=False).print(
            f"The CETT curve crosses the budget more than once in layer {names}; the largest threshold within counts."
        )


def print_measurements(measurements: list[dict[str, float]]) -> None:
    """Print the bytes and KL of each setting of a KL path (`KlTable.measurements`), with known standard errors."""

    def measured(row: dict[str, float], half: str) -> str:
        error = row[f"{half}_kl_stderr"]
        return f"{row[f'{half}_kl']:.3f}" + (f" ± {error:.3f}" if error else "")

    rows = [
        [
            f"{row['ffn_share']:.3f}",
            measured(row, "fitted"),
            measured(row, "held_out"),
            f"{row['single_layers_kl']:.3f}",
        ]
        for row in measurements
    ]
    columns = ["FFN bytes", "fitted sequences", "other sequences", "sum of single layers"]
    print_table("KL to dense along the path, nats a token", columns, rows)


def print_prices(table: PriceTable, integers: float | None = None) -> None:
    """Print the bytes and KL of each price, with standard errors where known.

    Args:
        table: The measurements.
        integers: The KL of the model's integers to the float model, where it is known (`float_kl.integers_kl`).
    """
    rows = [
        [
            f"{row.price:.3e}" if row.price else "0 (dense)",
            f"{row.share:.3f}",
            f"{row.ffn_share:.3f}",
            f"{row.attention_share:.3f}",
            *([f"{row.head_share:.3f}"] if table.prices_head else []),
            row.kl_text,
            *float_kl_cells(integers, row.kl),
            f"{row.agreement:.3f}",
        ]
        for row in table.rows
    ]
    head = ["head"] if table.prices_head else []
    columns = ["price", "linears", "FFN", "attention", *head, "KL to dense", *float_kl_columns(integers), "top-1"]
    print_table(
        f"Prices with {THRESHOLDS[table.packing]} ({table.packing}): shares of bytes read, nats a token", columns, rows
    )
    if table.short is not None:
        after = table.after(table.short.prompt_tokens).rows
        print_table(
            f"After prompts of {table.short.prompt_tokens} tokens in place of {table.short.table_prompt_tokens}",
            ["price", "KL to dense"],
            [[f"{row.price:.3e}", row.kl_text] for row in after[1:]],
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
