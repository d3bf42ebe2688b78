"""Sections on prices of rows: what they save and cost, and which rows are read at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tda_export.calibration.file import Calibration
from tda_export.calibration.price_file import Priced
from tda_export.errors import UsageError
from tda_export.float_kl import float_kl_cells, float_kl_columns, float_kl_text, integers_kl
from tda_export.packing import THRESHOLDS, Packing
from tda_export.pricing import PriceRow, PriceTable
from tda_export.report.axes import Axis, around
from tda_export.report.charts import line_chart
from tda_export.report.drawing import MARKS, Series
from tda_export.report.page import Figure, Section, Table
from tda_export.report.quality import KL, LINEAR_BYTES
from tda_export.weights.plan import HEAD

DENSITY = "rows read (share of a matrix)"


@dataclass(frozen=True)
class LayerDensities:
    """Shares of rows that a token reads at a measured price, by part: L numbers each, for one packing."""

    packing: Packing
    row: PriceRow
    parts: Mapping[str, Sequence[float]]


def budget_prices(calibration: Calibration, priced: Priced) -> dict[Packing, float | None]:
    """Return the price for a calibration's own budget, by packing; None where there is no price, or beyond the
    table."""
    budget = {name: calibration.provenance["budget"].get(name) for name in ("sparsity", "max_kl")}
    if sum(value is not None for value in budget.values()) != 1:  # a budget only for prompt masks
        budget = {}
    return {packing: _chosen(table, budget) for packing, table in priced.tables().items()}


def calibration_prices(calibration: Calibration, priced: Priced) -> list[Section]:
    """Show the rows that a calibration's own budget reads, and all measurements."""
    tables, prices = priced.tables(), budget_prices(calibration, priced)
    densities = [layer_densities(priced, packing, prices[packing]) for packing in tables]
    integers = integers_kl(calibration.provenance["model"].get("quantization"))
    measured = list(tables.values())
    return [densities_section(measured, densities), prices_section(measured, prices, integers)]


def artifact_prices(
    table: PriceTable, price: float, priced: Priced | None, integers: float | None = None
) -> list[Section]:
    """Show the rows that an artifact reads by default, and what its prices save and cost.

    Args:
        table: The artifact's own table, for its dtype.
        price: The artifact's price.
        priced: The calibration's measurements by layer; None where the artifact carries none for this packing.
        integers: The KL of its integers to the float model, where known.
    """
    found = []
    if priced is not None and table.packing in priced.measured:
        # A price is per byte, and the measurements are for rows of another size.
        measured = price * table.element_bytes / priced.row_bytes.element_bytes
        found.append(layer_densities(priced, table.packing, measured))
    return [densities_section([table], found), prices_section([table], {table.packing: price}, integers)]


def _chosen(table: PriceTable, budget: Mapping[str, float | None]) -> float | None:
    """Return the price for the budget stored in the file; None where the table cannot meet it."""
    try:
        return table.price_for(**budget) if budget else None
    except UsageError:  # the error's hint is about an option, which a reader of a report did not give
        return None


def layer_densities(priced: Priced, packing: Packing, price: float | None) -> LayerDensities:
    """Take the densities at the measured price whose share of bytes is nearest to that of `price`, or to one half for
    None."""
    table, measured = priced.table(packing), priced.measured[packing]
    within = price is not None and price <= table.most_price
    share = table.predicted(price).share if price is not None and within else 0.5 if price is None else 0.0
    nearest = min(range(len(table.rows)), key=lambda i: abs(table.rows[i].share - share))
    densities = measured.densities(priced.linears)
    parts = {part: values[nearest].tolist() for part, values in densities.items() if part != HEAD}
    return LayerDensities(packing, table.rows[nearest], parts)


def prices_section(
    tables: Sequence[PriceTable], chosen: Mapping[Packing, float | None], integers: float | None = None
) -> Section:
    """List tables of prices of one model, one for each packing.

    Args:
        tables: The measured tables.
        chosen: The prices for a budget.
        integers: The KL of the model's integers to the float model, in nats per token; None for floats, or if not
            measured.
    """
    notes = []
    for table in tables:
        price = chosen.get(table.packing)
        if price is not None and price <= table.most_price:
            row = table.predicted(price)
            notes.append(
                f"{THRESHOLDS[table.packing].capitalize()}: the budget asks for price {price:.4g}, which reads "
                f"{row.share:.3f} of the linears' bytes (FFN {row.ffn_share:.3f}, attention {row.attention_share:.3f})"
                f"{_of_head(table, row)} "
                f"at a predicted KL of {row.kl:.4f} nats a token."
                + ("" if integers is None else f" {float_kl_text(integers, row.kl)}.")
            )
        else:
            notes.append(f"{THRESHOLDS[table.packing].capitalize()}: no price of this table was chosen.")
    notes.append(
        f"A price is of a byte, for {tables[0].element_bytes} bytes an element, and grows with the number of tokens "
        f"after a token: calibration had {tables[0].continuation_tokens}."
    )
    return Section(
        "Prices of rows",
        [
            "A row of a linear, what leaves one input channel, is read by a token only if it is worth its bytes: if "
            "x² times the row's price reaches the price of a byte, λ, which is one number for the whole model. Each "
            "line is one λ, measured on sequences that gave no price."
            + (
                ""
                if integers is None
                else " KL is to the same integers, all of them read; what they lost to the float model, "
                f"{integers:.4f} nats a token, comes on top of it."
            )
        ],
        tables=[_price_table(table, integers) for table in tables],
        notes=notes,
    )


def price_chart(tables: Sequence[PriceTable], chosen: Mapping[Packing, float | None] | None = None) -> Markup:
    """Draw KL against the share of the linears' bytes; dense has no loss and cannot be shown on a logarithmic axis.

    Args:
        tables: The tables, one line each.
        chosen: The prices to mark, by packing.
    """
    series = [
        Series(
            THRESHOLDS[table.packing],
            [row.share for row in table.rows],
            [row.kl for row in table.rows],
            style=style,
            errors=[row.kl_stderr for row in table.rows],
            names=[f"price {row.price:.4g}" for row in table.rows],
        )
        for style, table in enumerate(tables)
    ]
    prices = [(chosen or {}).get(table.packing) for table in tables]
    points = [
        table.predicted(price)
        for table, price in zip(tables, prices, strict=True)
        if price and price <= table.most_price
    ]
    if points:
        names = [f"chosen: price {row.price:.4g}" for row in points]
        shares, kls = [row.share for row in points], [row.kl for row in points]
        series.append(Series("chosen", shares, kls, style=len(MARKS) - 1, line=False, names=names))
    rows = [row for row in (*(row for table in tables for row in table.rows), *points) if row.kl > 0]
    y = around(KL, [kl for row in rows for kl in (row.kl, row.kl - row.kl_stderr, row.kl + row.kl_stderr)], log=True)
    return line_chart(
        "KL against bytes of the layers' linears, by price",
        series,
        around(LINEAR_BYTES, [row.share for row in rows]),
        y,
    )


def parts_chart(table: PriceTable) -> Markup:
    """Draw the share of rows read of each matrix against the share of the layers' linears' bytes."""
    shares = [row.share for row in table.rows]
    parts = together({part: [row.parts[part] for row in table.rows] for part in table.rows[0].parts})
    series = [Series(name, shares, values, style=style) for style, (name, values) in enumerate(parts.items())]
    return line_chart("Rows read by matrix", series, around(LINEAR_BYTES, shares), Axis(DENSITY, 0.0, 1.0))


def densities_section(tables: Sequence[PriceTable], found: Sequence[LayerDensities]) -> Section:
    """Show which rows a token reads: of each layer's matrices at one price, and of each matrix at all prices.

    Args:
        tables: The tables of prices, one for each packing.
        found: The densities by layer, for packings that were measured by layer.
    """
    figures, listed = [], []
    for one in found:
        thresholds = THRESHOLDS[one.packing]
        at = f"{thresholds}, price {one.row.price:.4g}, which reads {one.row.share:.3f} of the linears' bytes"
        figures.append(Figure(layers_chart(one), f"Rows read in each layer: {at}."))
        layers = len(next(iter(one.parts.values())))
        rows = [[layer, *(f"{values[layer]:.3f}" for values in one.parts.values())] for layer in range(layers)]
        listed.append(Table(f"Rows read, layer by layer: {at}", ("layer", *one.parts), rows, folded=True))
    figures += [
        Figure(parts_chart(table), f"Rows read of each matrix, {THRESHOLDS[table.packing]}; means over its layers.")
        for table in tables
    ]
    of_layers = " Layers are shown at the measured price whose bytes are nearest to those of the budget."
    return Section(
        "Densities of rows",
        [
            "The price is one for the whole model, so matrices and layers that matter more keep more of their rows."
            + (of_layers if found else "")
        ],
        figures,
        listed,
    )


def _of_head(table: PriceTable, row: PriceRow) -> str:
    return f" and {row.head_share:.3f} of the head's" if table.prices_head else ""


def together(parts: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Join parts with identical lines, such as those of a site with one threshold: "q, k, v"."""
    names: dict[tuple[float, ...], list[str]] = {}
    for part, values in parts.items():
        names.setdefault(tuple(values), []).append(part)
    return {", ".join(joined): list(values) for values, joined in names.items()}


def layers_chart(one: LayerDensities) -> Markup:
    """Draw the share of rows read of each matrix in each layer."""
    series = [
        Series(name, list(range(len(values))), values, style=style)
        for style, (name, values) in enumerate(together(one.parts).items())
    ]
    x = Axis("layer", 0.0, float(max(len(series[0].x) - 1, 1)))
    return line_chart("Rows read by layer and matrix", series, x, Axis(DENSITY, 0.0, 1.0))


def _price_table(table: PriceTable, integers: float | None) -> Table:
    parts = list(table.rows[0].parts)
    rows = [
        [
            f"{row.price:.4g}",
            f"{row.share:.3f}",
            f"{row.ffn_share:.3f}",
            f"{row.attention_share:.3f}",
            *(f"{row.parts[part]:.3f}" for part in parts),
            row.kl_text,
            *short,
            *float_kl_cells(integers, row.kl),
            f"{row.agreement:.3f}",
        ]
        for row, short in zip(table.rows, table.short_kl_texts, strict=True)
    ]
    after = [] if table.short is None else [f"after {table.short.prompt_tokens} tokens"]
    kls = ("KL, nats a token", *after, *float_kl_columns(integers))
    columns = ("price", "layers' linears", "FFN", "attention", *parts, *kls, "top-1 agreement")
    return Table(f"Prices, {THRESHOLDS[table.packing]}: shares of bytes read", columns, rows, texts=0)
