"""The first section of a report: what is read, what is lost and what is gained, in a line and a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tda_export.calibration.budgets import Allocation, Budget
from tda_export.calibration.file import Calibration
from tda_export.calibration.kl_table import HELD_OUT
from tda_export.errors import UsageError
from tda_export.packing import THRESHOLDS, Packing
from tda_export.pricing import PriceTable
from tda_export.report.axes import around
from tda_export.report.charts import line_chart
from tda_export.report.drawing import Series
from tda_export.report.page import Figure, Section, Table
from tda_export.report.priced_sections import price_chart
from tda_export.report.quality import BYTES, HALVES, KL, quality_data
from tda_export.report.speeds import SPEED_COLUMNS, Speed, nearest_speed, speed_chart, speed_rows
from tda_export.runtime.deployment import Refresh

TITLE = "In short"
MIB = 2**20
CETT_BUDGETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Answer:
    """The result of one way of skipping bytes: a sentence or two, the share of bytes read if known, a chart."""

    lead: str
    share: float | None = None
    figure: Figure | None = None
    notes: Sequence[str] = ()


def answer_section(answers: Sequence[Answer], model: str, speeds: Sequence[Speed]) -> Section:
    """Make the first section of a report.

    Args:
        answers: One answer for each way of skipping bytes.
        model: The model's name; only speeds with this name are used.
        speeds: The speeds that `bench` measured.
    """
    lead, own = [], [one for one in speeds if one.model == model]
    for answer in answers:
        near = None if answer.share is None else nearest_speed(own, answer.share, model)
        gained = "" if near is None else f" {_gained(near)}"
        lead.append(answer.lead + gained)
    figures = [answer.figure for answer in answers if answer.figure is not None]
    figures += [
        Figure(speed_chart(of_run), f"Speed against bytes: {run}. Lower is better.")
        for run, of_run in _by_run(speeds).items()
    ]
    tables = [Table("Speeds", SPEED_COLUMNS, speed_rows(speeds), folded=True, texts=2)] if speeds else []
    notes = [note for answer in answers for note in answer.notes]
    if not speeds:
        notes.append("No speed is shown: give what 'tda-export bench DIR --json' prints with --results.")
    return Section(TITLE, figures=figures, tables=tables, notes=notes, lead=lead)


def _gained(speed: Speed) -> str:
    return (
        f"At {speed.share:.0%} of those bytes it takes {speed.ms:.2f} ms a token, {speed.speedup:.2f} times as fast as "
        "dense."
    )


def _by_run(speeds: Sequence[Speed]) -> dict[str, list[Speed]]:
    runs: dict[str, list[Speed]] = {}
    for one in speeds:
        runs.setdefault(one.run, []).append(one)
    return runs


def priced_answer(
    tables: Sequence[PriceTable],
    chosen: Mapping[Packing, float | None],
    *,
    integers: float | None,
    linear_bytes: int | None = None,
) -> Answer:
    """Describe the result of prices of rows.

    Args:
        tables: The measured tables, one for each packing.
        chosen: The prices of a budget, by packing.
        integers: The KL of the model's integers to the float model, in nats per token; None for floats, or if not
            measured.
        linear_bytes: The bytes of the layers' linears, if known.
    """
    sentences, share = [], None
    for table in tables:
        price = chosen.get(table.packing)
        which = f" ({THRESHOLDS[table.packing]})" if len(tables) > 1 else ""
        if price is None or price > table.most_price:
            sentences.append(f"No price of the table was chosen{which}.")
            continue
        row = table.predicted(price)
        share = row.share if share is None else share
        which += f" and {row.head_share:.0%} of the head's" if table.prices_head else ""
        sentences.append(_reads("the layers' linears", row.share, linear_bytes, which) + _loses(row.kl, integers))
    figure = Figure(
        price_chart(tables, chosen),
        "Quality against bytes: KL to the same weights, all of them read, by the bytes that a token reads. Lower is "
        "better. Each point is a price, measured on text that gave no price. Bars: one standard error over sequences.",
    )
    return Answer(" ".join(sentences), share, figure)


def unmeasured_prices(price: float, linear_bytes: int) -> Answer:
    """Describe a priced artifact without a table."""
    if price == 0:
        return Answer(_reads("the layers' linears", 1.0, linear_bytes) + " and leaves nothing out (price 0).", 1.0)
    return Answer(
        f"A token reads the rows that are worth price {price:.4g} a byte. What that saves and costs was not measured."
    )


def mask_answer(
    calibration: Calibration,
    allocation: Allocation | None,
    *,
    refresh: Refresh,
    ffn_bytes: int | None = None,
) -> Answer:
    """Describe the result of prompt masks.

    Args:
        calibration: A calibration with curves.
        allocation: The chosen allocation; None where the calibration cannot meet the budget.
        refresh: The artifact's refresh.
        ffn_bytes: The bytes of all FFNs, if known.
    """
    if allocation is None:
        lead, share = "The stored budget cannot be met with this calibration, so no masks are chosen.", None
    else:
        share = refresh.ffn_share(1 - allocation.sparsity)
        lead = _reads("the FFN", share, ffn_bytes)
        if allocation.kl is not None:
            lead += _loses(allocation.kl, None)
        else:
            error = sum(allocation.cett) / len(allocation.cett)
            lead += f", and an FFN's output is off by {error:.2f} of its length (CETT, mean over layers). "
            lead += "KL was not measured."
    figure = (
        kl_by_bytes(calibration, allocation) if calibration.kl is not None else cett_by_bytes(calibration, allocation)
    )
    return Answer(lead, share, figure)


def unmeasured_masks(sparsity: float | None, ffn_bytes: int) -> Answer:
    """Describe prompt masks without a calibration, such as Griffin's: only the share of skipped bytes is known."""
    if sparsity is None:
        return Answer("A token reads the FFN neurons of the prompt's mask. What that saves and costs was not measured.")
    return Answer(_reads("the FFN", 1 - sparsity, ffn_bytes) + ". What that costs was not measured.", 1 - sparsity)


def kl_by_bytes(calibration: Calibration, allocation: Allocation | None) -> Figure:
    """Draw the predicted KL of prompt masks against the share of FFN bytes, with the chosen point."""
    data = quality_data(calibration)
    assert data is not None
    order = np.argsort(data.share, kind="stable")
    kl, errors = data.joint[HELD_OUT][order], data.joint_stderr[HELD_OUT][order]
    series = [Series(HALVES[HELD_OUT], data.share[order].tolist(), kl.tolist(), errors=errors.tolist())]
    drawn = [*kl, *(kl - errors), *(kl + errors)]
    if allocation is not None and allocation.kl is not None:
        series.append(_chosen(1 - allocation.sparsity, allocation.kl))
        drawn.append(allocation.kl)
    x = around(BYTES, [x for one in series for x in one.x])
    chart = line_chart("KL against FFN bytes", series, x, around(KL, drawn, log=True))
    return Figure(
        chart, "Quality against bytes: predicted KL to dense by the FFN bytes that a token reads. Lower is better."
    )


def cett_by_bytes(calibration: Calibration, allocation: Allocation | None) -> Figure:
    """Draw CETT against the share of FFN bytes, with equal CETT in every layer, and the chosen point."""
    points = [(1 - one.sparsity, budget) for budget, one in _equal_cett(calibration)]
    series = [Series("the same CETT in every layer", [x for x, _ in points], [y for _, y in points])]
    if allocation is not None:
        series.append(_chosen(1 - allocation.sparsity, sum(allocation.cett) / len(allocation.cett)))
    x = around(BYTES, [x for one in series for x in one.x])
    y = around("CETT (mean over layers)", [y for one in series for y in one.y], zero=True)
    return Figure(
        line_chart("CETT against FFN bytes", series, x, y),
        "Quality against bytes: the error of an FFN's output by the FFN bytes that a token reads. Lower is better. "
        "This calibration holds curves alone, so the KL to dense is not known.",
    )


def _equal_cett(calibration: Calibration) -> list[tuple[float, Allocation]]:
    found = []
    for budget in CETT_BUDGETS:
        try:
            found.append((budget, calibration.allocate(Budget(cett=budget))))
        except UsageError:
            continue
    return found


def _chosen(share: float, loss: float) -> Series:
    return Series("chosen", [share], [loss], style=1, line=False)


def _reads(what: str, share: float, size: int | None, which: str = "") -> str:
    of_size = "" if size is None else f" ({share * size / MIB:,.0f} of {size / MIB:,.0f} MiB)"
    return f"A token reads {share:.0%} of the bytes of {what}{of_size}{which}"


def _loses(kl: float, integers: float | None) -> str:
    text = f", and loses {kl:.3f} nats a token (predicted KL to reading all of them)"
    if integers is None:
        return f"{text}."
    return (
        f"{text}; the integers themselves lost {integers:.3f} to the float model, about {integers + kl:.3f} together."
    )
