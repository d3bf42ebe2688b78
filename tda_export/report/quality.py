"""Charts of what dropping neurons costs: sensitivities of layers, predicted and measured KL, methods compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from tda_export.ffn_share import two_level_share
from tda_export.report.axes import around
from tda_export.report.charts import line_chart
from tda_export.report.drawing import Series
from tda_export.report.results import Result

if TYPE_CHECKING:
    from tda_export.calibration.file import Calibration

KL = "KL to dense (nats a token, log scale)"
BYTES = "FFN bytes read (share of dense)"


@dataclass(frozen=True)
class QualityData:
    """What a calibration knows of KL, in nats a token; N sparsities (shares of FFN bytes not read).

    `layer_kl` float [L, K] is the KL of masking one layer alone at each of K levels, `layer_share` float [L, K] the
    share of the layer's FFN bytes that is read there. `predicted` float [N] is the sum of single-layer sensitivities,
    `measured` float [2, N] the KL of masking all layers, on either half of the sequences.
    """

    layer_kl: np.ndarray
    layer_share: np.ndarray
    sparsity: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray


def quality_data(calibration: Calibration) -> QualityData | None:
    """Take the KL measurements out of a calibration; None where only curves were calibrated."""
    table = calibration.kl
    if table is None:
        return None
    return QualityData(
        layer_kl=table.sensitivity.T.numpy(),
        layer_share=two_level_share(table.mask_density, table.token_density, calibration.ffn_matrices).T.numpy(),
        sparsity=1 - table.share.numpy(),
        predicted=table.sensitivity.sum(dim=1).numpy(),
        measured=table.kl.T.numpy(),
    )


def sensitivity_chart(layer_kl: np.ndarray, layer_share: np.ndarray) -> Markup:
    """Draw the KL of masking one layer alone against the bytes that the layer still reads.

    Args:
        layer_kl: Nats a token, float [L, K]; values that are not positive have no place on the log axis.
        layer_share: Share of the layer's FFN bytes, float [L, K].
    """
    layers = len(layer_kl)
    series = []
    for i in range(layers):
        order = np.argsort(layer_share[i], kind="stable")
        label = f"layer {i}"
        series.append(
            Series(label, layer_share[i, order].tolist(), layer_kl[i, order].tolist(), marks=False, ramp=(i, layers))
        )
    x = around("FFN bytes of the layer that are read (share)", layer_share.ravel())
    y = around(KL, layer_kl.ravel(), log=True)
    return line_chart("KL of masking one layer", series, x, y, ramp=("layer 0", f"layer {layers - 1}"))


def prediction_chart(sparsity: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> Markup:
    """Draw predicted and measured KL of all layers together against sparsity.

    Args:
        sparsity: Share of FFN bytes not read, float [N].
        predicted: Sum of single-layer sensitivities, nats a token, float [N].
        measured: KL on either half of the sequences, nats a token, float [2, N].
    """
    order = np.argsort(sparsity, kind="stable")
    lines = (
        ("predicted: sum over layers", predicted),
        ("measured, first half", measured[0]),
        ("measured, second half", measured[1]),
    )
    series = [
        Series(label, sparsity[order].tolist(), kl[order].tolist(), style=style)
        for style, (label, kl) in enumerate(lines)
    ]
    x = around("sparsity (share of FFN bytes not read)", sparsity)
    y = around(KL, [*predicted, *measured.ravel()], log=True)
    return line_chart("Predicted and measured KL against sparsity", series, x, y)


def prediction_scatter(sparsity: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> Markup:
    """Draw measured against predicted KL, with the diagonal where they are equal; arguments as `prediction_chart`."""
    names = [f"sparsity {value:g}" for value in sparsity]
    values = [*predicted, *measured.ravel()]
    series = [
        Series(
            f"{half} half of the sequences",
            predicted.tolist(),
            measured[style].tolist(),
            style=style + 1,
            line=False,
            names=names,
        )
        for style, half in enumerate(("first", "second"))
    ]
    x = around("predicted KL: sum over layers (nats a token, log scale)", values, log=True)
    y = around("measured KL (nats a token, log scale)", values, log=True)
    return line_chart("Measured against predicted KL", series, x, y, diagonal=True)


def methods_chart(results: Sequence[Result]) -> Markup | None:
    """Draw KL against the share of FFN bytes read, one line for each method, with bars of one standard error.

    Results without loss (dense, but for rounding) have no place on a logarithmic axis. None where nothing is left.
    """
    lines: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda one: one.share):
        if not result.lossless:
            lines.setdefault(result.line, []).append(result)
    if not lines:
        return None
    series = [
        Series(
            label,
            [one.share for one in points],
            [one.kl for one in points],
            style=style,
            errors=[one.kl_stderr for one in points],
            names=[f"{one.line} {one.budget_text}" for one in points],
        )
        for style, (label, points) in enumerate(sorted(lines.items()))
    ]
    drawn = [one for points in lines.values() for one in points]
    x = around(BYTES, [one.share for one in drawn])
    y = around(
        KL, [bound for one in drawn for bound in (one.kl, one.kl + one.kl_stderr, one.kl - one.kl_stderr)], log=True
    )
    return line_chart("KL against FFN bytes, by method", series, x, y)
