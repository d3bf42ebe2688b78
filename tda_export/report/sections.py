"""Sections on the content of a calibration and on the allocation chosen from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import tda_export
from tda_export.calibration.budgets import Allocation, Budget
from tda_export.calibration.file import Calibration
from tda_export.calibration.kl_table import FITTED, HELD_OUT
from tda_export.errors import UsageError
from tda_export.report.curves import (
    Chosen,
    Curves,
    allocation_chart,
    cett_chart,
    density_chart,
    trade_chart,
)
from tda_export.report.page import Figure, Section, Table
from tda_export.report.quality import (
    QualityData,
    joint_chart,
    quality_data,
    sensitivity_chart,
    sum_scatter,
)
from tda_export.runtime.artifact import Artifact

PROVENANCE = "Provenance"


def stored_allocation(calibration: Calibration, budget: Budget, refresh_tokens: int = 0) -> Allocation | None:
    """Choose the thresholds for the budget stored in the file; None where the calibration cannot meet it."""
    try:
        return calibration.allocate(budget, refresh_tokens)
    except UsageError:  # the error's hint is about an option, which a reader of a report did not give
        return None


def curves_of(calibration: Calibration) -> Curves:
    """Take the mean curves out of a calibration."""
    sums = calibration.sums
    return Curves(calibration.grid.numpy(), sums.mean_cett.numpy(), sums.mean_density.numpy())


def calibration_provenance(calibration: Calibration) -> Section:
    """Describe what a calibration was made from."""
    rows = list(_flat(calibration.provenance))
    return Section(
        PROVENANCE,
        tables=[Table("The calibration", ("what", "value"), rows, texts=2)],
        notes=[f"Report by tda-export {tda_export.__version__}."],
    )


def artifact_provenance(artifact: Artifact) -> Section:
    """Describe an artifact: what it is, what it was made from, and its files."""
    manifest = artifact.manifest
    names = ("model", "layout", "method", "packing", "price", "budget", "shape", "versions")
    parts: dict[str, Any] = {name: manifest[name] for name in names if name in manifest}
    files = [[name, f"{entry['size']:,}", entry["sha256"]] for name, entry in manifest["files"].items()]
    tables = [Table("The artifact", ("what", "value"), list(_flat(parts)), texts=2)]
    if isinstance(manifest.get("calibration"), dict):
        rows = list(_flat(manifest["calibration"]))
        tables.append(Table("Its calibration", ("what", "value"), rows, texts=2))
    tables.append(Table("Its files, by the manifest", ("file", "bytes", "sha256"), files))
    return Section(
        PROVENANCE,
        tables=tables,
        notes=[
            "Sizes were compared with the files; 'tda-export verify' compares the hashes.",
            f"Report by tda-export {tda_export.__version__}.",
        ],
    )


def curves_section(curves: Curves, allocation: Allocation | None) -> Section:
    """Draw the curves of every layer, with the chosen thresholds where they are known."""
    chosen = None
    if allocation is not None:
        chosen = Chosen(allocation.thresholds, allocation.density, allocation.cett, allocation.token_density)
    paragraph = (
        "A prompt's mask keeps the neurons whose score reaches the layer's threshold. Density is the share that is "
        "kept, CETT the mean length of what is dropped relative to the whole FFN output. Each line is a layer, by its "
        "scores alone"
        + ("." if allocation is None else "; its point is what was chosen for it, as the table of the allocation says.")
    )
    charts = [
        (cett_chart(curves, chosen), "CETT by threshold."),
        (density_chart(curves, chosen), "Density by threshold."),
        (trade_chart(curves, chosen), "CETT against density. Lower is better."),
    ]
    notes = ("", "", "") if allocation is None else _about_points(allocation)
    figures = [Figure(chart, f"{title} {note}".rstrip()) for (chart, title), note in zip(charts, notes, strict=True)]
    return Section("Curves", [paragraph], figures)


def _about_points(allocation: Allocation) -> tuple[str, str, str]:
    """Explain the points of each of the three charts, and why they may lie off their curves."""
    missing = "" if all(allocation.thresholds) else " A threshold of 0 keeps every neuron, and has no place here."
    if not allocation.token_density:
        points = "Points: the chosen thresholds."
        return points + missing, points + missing, points
    blended = (
        [f"scores are blended with a prior of {allocation.prior_tokens:g} tokens"] if allocation.prior_tokens else []
    )
    both = [*blended, "that CETT is of what mask and token thresholds drop together"]

    def beside(reasons: list[str]) -> str:
        return f" They may lie beside the curves, since {' and '.join(reasons)}." if reasons else ""

    return (
        f"Points: the chosen threshold of the mask, and the CETT of the allocation.{beside(both)}{missing}",
        f"Points: the chosen threshold of the mask, and its density in the allocation.{beside(blended)}{missing}",
        "Circles: the mask's density; squares: the share of neurons whose up and down rows a token reads; both at the "
        f"CETT of the allocation.{beside(both)}",
    )


def allocation_section(allocation: Allocation, budget: dict[str, Any], refresh_tokens: int = 0) -> Section:
    """Show the allocation of each layer, at both levels where there are two."""
    second = allocation.token_density or None
    density = allocation.density
    asked = _budget_text(budget) + (f", with a refresh every {refresh_tokens} tokens" if refresh_tokens else "")
    between = " between refreshes" if refresh_tokens else ""
    rows: list[list[object]] = [
        [layer, f"{threshold:.6f}", f"{density[layer]:.3f}", f"{allocation.cett[layer]:.3f}"]
        for layer, threshold in enumerate(allocation.thresholds)
    ]
    if second is not None:
        rows = [[*row, f"{second[layer]:.3f}"] for layer, row in enumerate(rows)]
    columns = ["layer", "threshold", "density", "CETT", *(["density of up and down"] if second is not None else [])]
    layers = len(density)
    notes = [
        f"Budget: {asked}. Mean density {sum(density) / layers:.3f}, FFN sparsity{between} {allocation.sparsity:.3f}, "
        f"mean CETT {sum(allocation.cett) / layers:.3f} on the calibration data."
    ]
    if allocation.kl is not None:
        notes.append(
            f"Predicted KL to dense: {allocation.kl:.3f} nats a token, by sequences that the path was not fitted on."
        )
    return Section(
        "Allocation",
        notes,
        [Figure(allocation_chart(density, second), "Density that was chosen for each layer.")],
        [Table("Thresholds, layer by layer", columns, rows, folded=True)],
    )


def unmet_section(calibration: Calibration, budget: dict[str, Any]) -> Section:
    """Say that the calibration cannot meet its own budget, and which budgets it can meet."""
    if calibration.kl is None:
        reach = "it holds CETT curves alone, without the KL path that this budget is chosen from"
        others = "--cett, or --sparsity with --allocation uniform"
    else:
        reach = f"its KL path ends at sparsity {1 - float(calibration.kl.share[-1]):.3f}"
        others = "a lower --sparsity, or --max-kl"
    asked = _budget_text(budget)
    return Section(
        "Allocation",
        [
            f"The stored budget ({asked}) cannot be met with this calibration: {reach}. So no thresholds are shown. "
            f"'tda-export build' takes another budget: {others}."
        ],
    )


def sensitivity_section(calibration: Calibration) -> Section:
    """Show the cost of masking: all layers together at the settings of the KL path, and each layer alone."""
    title, data = "Sensitivity of layers", quality_data(calibration)
    if data is None:
        return Section(title, ["This calibration contains no measurements of KL."])
    return Section(
        title,
        [
            "The KL of masking one layer alone, at the settings of the KL path, says how much it matters. Beside the "
            "sum of these stands the KL of masking all together: on the sequences that the path was fitted on, "
            "and on the others, which it never saw. Predicted KL is the latter, here as in 'build' and '--max-kl'."
        ],
        [
            Figure(
                sensitivity_chart(data.layer_kl, data.layer_share), "KL of masking one layer, by the bytes it reads."
            ),
            Figure(joint_chart(data), "KL of masking all layers, by sparsity. Bars: one standard error."),
            Figure(
                sum_scatter(data),
                "KL of all layers against the sum of single layers. Points above the dashed line lose more than the "
                "sum. Bars: one standard error.",
            ),
        ],
        [_kl_table(data)],
        ["The calibration read one sequence, so both columns are of it."]
        if np.array_equal(data.joint[FITTED], data.joint[HELD_OUT])
        else [],
    )


def _kl_table(data: QualityData) -> Table:
    """List the KL of every setting of the path; a half with only one sequence has no standard error."""

    def measured(half: int, setting: int) -> str:
        error = data.joint_stderr[half, setting]
        return f"{data.joint[half, setting]:.4f}" + (f" ± {error:.4f}" if error > 0 else "")

    rows = [
        [f"{share:.3f}", measured(FITTED, i), measured(HELD_OUT, i), f"{data.sum_of_layers[i]:.4f}"]
        for i, share in enumerate(data.share)
    ]
    columns = ("share of FFN bytes", "fitted sequences", "other sequences (predicted KL)", "sum of single layers")
    return Table("KL of masking all layers, nats a token ± one standard error over sequences", columns, rows)


def _budget_text(budget: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in budget.items())


def _flat(content: dict[str, Any], before: str = "") -> Iterator[list[object]]:
    """List plain data as rows of name and value; nested names are joined by spaces."""
    for name, value in content.items():
        label = f"{before} {name}".strip()
        if isinstance(value, dict):
            yield from _flat(value, label)
        else:
            yield [label, "–" if value is None else value]
