"""Sections on what a calibration holds, what was chosen from it, and how methods compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tda_export
from tda_export.calibration.budgets import Allocation, Budget
from tda_export.calibration.file import Calibration
from tda_export.report.axes import Axis
from tda_export.report.curves import (
    DENSITY,
    Curves,
    allocation_chart,
    cett_axis,
    curve_chart,
    trade_chart,
)
from tda_export.report.page import Figure, Section, Table
from tda_export.report.quality import (
    methods_chart,
    prediction_chart,
    prediction_scatter,
    quality_data,
    sensitivity_chart,
)
from tda_export.report.results import Result, grouped
from tda_export.runtime.artifact import Artifact

MIB = 2**20


def calibrated_allocation(calibration: Calibration) -> Allocation:
    """Choose the thresholds of the budget that a calibration was made with."""
    return calibration.allocate(Budget(**calibration.provenance["budget"]))


def curves_of(calibration: Calibration) -> Curves:
    """Take the mean curves out of a calibration."""
    sums = calibration.sums
    return Curves(calibration.grid.numpy(), sums.mean_cett.numpy(), sums.mean_density.numpy())


def calibration_summary(calibration: Calibration) -> Section:
    """Say what a calibration was made of."""
    rows = list(_flat(calibration.provenance))
    return Section(
        "Summary",
        tables=[Table("The calibration", ("what", "value"), rows, texts=2)],
        notes=[f"Report by tda-export {tda_export.__version__}."],
    )


def artifact_summary(artifact: Artifact) -> Section:
    """Say what an artifact is, what it was made of, and which files it has."""
    manifest = artifact.manifest
    names = ("model", "method", "budget", "shape", "versions")
    parts: dict[str, Any] = {name: manifest[name] for name in names if name in manifest}
    files = [[name, f"{entry['size']:,}", entry["sha256"]] for name, entry in manifest["files"].items()]
    tables = [Table("The artifact", ("what", "value"), list(_flat(parts)), texts=2)]
    if isinstance(manifest.get("calibration"), dict):
        rows = list(_flat(manifest["calibration"]))
        tables.append(Table("Its calibration", ("what", "value"), rows, texts=2))
    tables.append(Table("Its files, by the manifest", ("file", "bytes", "sha256"), files))
    return Section(
        "Summary",
        tables=tables,
        notes=[
            "Sizes were compared with the files; 'tda-export verify' compares the hashes.",
            f"Report by tda-export {tda_export.__version__}.",
        ],
    )


def curves_section(curves: Curves, thresholds: Sequence[float] | None) -> Section:
    """Draw the curves of every layer."""
    density = Axis(DENSITY, 0.0, 1.0)
    cett = cett_axis(curves)
    paragraph = (
        "A prompt's mask keeps the neurons whose score reaches the layer's threshold. Density is the share that is "
        "kept, CETT the mean length of what is dropped relative to the whole FFN output. Each line is a layer"
        + ("." if thresholds is None else "; its point is the threshold that was chosen.")
    )
    return Section(
        "Curves",
        [paragraph],
        [
            Figure(curve_chart(curves, curves.cett, cett, "CETT by threshold", thresholds), "CETT by threshold."),
            Figure(
                curve_chart(curves, curves.density, density, "Density by threshold", thresholds),
                "Density by threshold.",
            ),
            Figure(trade_chart(curves, thresholds), "CETT against density. Lower is better."),
        ],
    )


def allocation_section(allocation: Allocation, budget: dict[str, Any]) -> Section:
    """Show what was chosen for each layer, at both levels where there are two."""
    second = allocation.token_density or None
    density = allocation.density
    asked = ", ".join(f"{name} {value}" for name, value in budget.items())
    rows: list[list[object]] = [
        [layer, f"{threshold:.6f}", f"{density[layer]:.3f}", f"{allocation.cett[layer]:.3f}"]
        for layer, threshold in enumerate(allocation.thresholds)
    ]
    if second is not None:
        rows = [[*row, f"{second[layer]:.3f}"] for layer, row in enumerate(rows)]
    columns = ["layer", "threshold", "density", "CETT", *(["density of up and down"] if second is not None else [])]
    layers = len(density)
    notes = [
        f"Budget: {asked}. Mean density {sum(density) / layers:.3f}, FFN sparsity {allocation.sparsity:.3f}, mean CETT "
        f"{sum(allocation.cett) / layers:.3f} on the calibration data."
    ]
    if allocation.kl is not None:
        notes.append(f"Predicted KL to dense: {allocation.kl:.3f} nats a token.")
    return Section(
        "Allocation",
        notes,
        [Figure(allocation_chart(density, second), "Density that was chosen for each layer.")],
        [Table("Thresholds, layer by layer", columns, rows, folded=True)],
    )


def sensitivity_section(calibration: Calibration) -> Section:
    """Show KL sensitivities of layers and how well their sum predicts the KL of all."""
    title, data = "Sensitivity of layers", quality_data(calibration)
    if data is None:
        return Section(title, ["This calibration carries no measurements of KL."])
    return Section(
        title,
        [
            "The KL of masking one layer alone, at the settings of the KL path, says how much it matters. Beside their "
            "sum stands the KL of masking all layers together: on the half of the sequences that the path was "
            "fitted on, and on the other half, which it never saw and which predictions are taken from."
        ],
        [
            Figure(
                sensitivity_chart(data.layer_kl, data.layer_share), "KL of masking one layer, by the bytes it reads."
            ),
            Figure(
                prediction_chart(data.sparsity, data.predicted, data.measured), "KL of masking all layers, by sparsity."
            ),
            Figure(
                prediction_scatter(data.sparsity, data.predicted, data.measured),
                "Measured against predicted KL. Points above the dashed line lose more than predicted.",
            ),
        ],
    )


def methods_section(results: Sequence[Result]) -> Section:
    """Compare methods by results of `tda-export eval`, one chart for each model, text and prompt length."""
    figures, rows, lossless = [], [], False
    for (model, text, prompt, continuation), group in grouped(results).items():
        chart = methods_chart(group)
        if chart is not None:
            caption = (
                f"{model} on {text}, prompts of {prompt} tokens and {continuation} decoded. Bars: one standard error."
            )
            figures.append(Figure(chart, caption))
        lossless = lossless or any(one.lossless for one in group)
        rows += [
            [
                model,
                text,
                f"{prompt}\u00a0+\u00a0{continuation}",
                one.line,
                one.budget_text,
                f"{one.share:.3f}",
                f"{one.ffn_bytes / MIB:,.1f}",
                f"{one.density:.3f}",
                f"{one.kl:.4f} ± {one.kl_stderr:.4f}",
                f"{one.perplexity:.3f}",
                f"{one.dense_perplexity:.3f}",
                f"{one.agreement:.4f}",
            ]
            for one in group
        ]
    columns = (
        "model",
        "text",
        "tokens",
        "method",
        "budget",
        "FFN bytes, share of dense",
        "MiB a token",
        "density",
        "KL, nats a token",
        "perplexity",
        "dense perplexity",
        "top-1 agreement",
    )
    return Section(
        "Quality against FFN bytes",
        ["KL(dense || sparse) of the tokens decoded after a prompt, against the FFN weight bytes that a token reads."],
        figures,
        [Table("All results", columns, rows, texts=5)],
        ["Results without loss (KL of 0 but for rounding, as dense has) have no place on a logarithmic axis."]
        if lossless
        else [],
    )


def _flat(content: dict[str, Any], before: str = "") -> Iterator[list[object]]:
    """List plain data as rows of name and value; nested names are joined by spaces."""
    for name, value in content.items():
        label = f"{before} {name}".strip()
        if isinstance(value, dict):
            yield from _flat(value, label)
        else:
            yield [label, "–" if value is None else value]
