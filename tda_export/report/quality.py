"""Charts of what dropping neurons costs: sensitivities of layers, KL of all layers, methods compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from tda_export.calibration.kl_table import FITTED, HELD_OUT
from tda_export.ffn_share import two_level_share
from tda_export.report.axes import around
from tda_export.report.charts import line_chart
from tda_export.report.drawing import Series
from tda_export.report.results import Result

if TYPE_CHECKING:
    from tda_export.calibration.file import Calibration

KL = "KL to dense (nats a token, log scale)"
SUM = "sum of single layers"
HALVES = ("fitted sequences", "other sequences (predicted KL)")
BYTES = "FFN bytes read (share of dense)"
LINEARS = "bytes of the layers' linears"
LINEAR_BYTES = f"{LINEARS} read (share of dense)"


@dataclass(frozen=True)
class QualityData:
    """A calibration's KL measurements, in nats per token, at N settings of the KL path.

    `layer_kl` float [L, N] is the KL of masking one layer alone, `layer_share` float [L, N] the share of the layer's
    FFN bytes that is read there. `share` float [N] is the share of all FFN bytes. `joint` float [2, N] is the KL of
    masking all layers, on the sequences that the path was fitted on and on the others; the latter is the predicted KL;
    `joint_stderr` float [2, N] is over sequences, 0 for a single one.
    """

    layer_kl: np.ndarray
    layer_share: np.ndarray
    share: np.ndarray
    joint: np.ndarray
    joint_stderr: np.ndarray

    @property
    def sum_of_layers(self) -> np.ndarray:
        """Return the sum of the KL of single layers, float [N]."""
        return np.asarray(self.layer_kl.sum(axis=0))


def quality_data(calibration: Calibration) -> QualityData | None:
    """Take the KL measurements out of a calibration; None where only curves were calibrated."""
    table = calibration.kl
    if table is None:
        return None
    return QualityData(
        layer_kl=table.sensitivity.T.numpy(),
        layer_share=two_level_share(table.mask_density, table.token_density, calibration.ffn_matrices).T.numpy(),
        share=table.share.numpy(),
        joint=table.kl[:, [FITTED, HELD_OUT]].T.numpy(),
        joint_stderr=table.kl_stderr[:, [FITTED, HELD_OUT]].T.numpy(),
    )


def sensitivity_chart(layer_kl: np.ndarray, layer_share: np.ndarray) -> Markup:
    """Draw the KL of masking one layer alone against the bytes that the layer still reads.

    Args:
        layer_kl: In nats per token, float [L, K]; values that are not positive cannot be shown on the log axis.
        layer_share: The share of the layer's FFN bytes, float [L, K].
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


def joint_chart(data: QualityData) -> Markup:
    """Draw the KL of masking all layers against sparsity, on both halves, and the sum of single layers."""
    sparsity = 1 - data.share
    order = np.argsort(sparsity, kind="stable")
    series = [
        Series(
            half,
            sparsity[order].tolist(),
            data.joint[index][order].tolist(),
            style=index + 1,
            errors=data.joint_stderr[index][order].tolist(),
        )
        for index, half in enumerate(HALVES)
    ]
    series.insert(0, Series(SUM, sparsity[order].tolist(), data.sum_of_layers[order].tolist()))
    x = around("sparsity (share of FFN bytes not read)", sparsity)
    y = around(KL, _extent(data), log=True)
    return line_chart("KL of masking all layers against sparsity", series, x, y)


def sum_scatter(data: QualityData) -> Markup:
    """Draw the KL of all layers on both halves against the sum of single layers, and the diagonal where they agree."""
    names = [f"sparsity {1 - share:.3g}" for share in data.share]
    series = [
        Series(
            half,
            data.sum_of_layers.tolist(),
            data.joint[index].tolist(),
            style=index + 1,
            line=False,
            errors=data.joint_stderr[index].tolist(),
            names=names,
        )
        for index, half in enumerate(HALVES)
    ]
    x = around(f"{SUM} (nats a token, log scale)", _extent(data), log=True)
    y = around("KL of all layers (nats a token, log scale)", _extent(data), log=True)
    return line_chart("KL of all layers against the sum of single layers", series, x, y, diagonal=True)


def _extent(data: QualityData) -> list[float]:
    bounds = [data.joint + sign * data.joint_stderr for sign in (-1, 1)]
    return [float(value) for values in (data.sum_of_layers, data.joint, *bounds) for value in values.ravel()]


def methods_chart(results: Sequence[Result], *, linears: bool = False) -> Markup | None:
    """Draw KL against the share of bytes read, one line for each method, with bars of one standard error.

    Results without loss (dense, except for rounding) are left out, since a logarithmic axis cannot show them, and so
    are those with unknown bytes. None if nothing is left.

    Args:
        results: The results of one chart.
        linears: Whether to count the bytes of the layers' linears instead of the FFN's.
    """

    def share(one: Result) -> float:
        found = one.linear_share if linears else one.share
        assert found is not None
        return found

    known = [one for one in results if not one.lossless and (not linears or one.linear_share is not None)]
    lines: dict[str, list[Result]] = {}
    for result in sorted(known, key=share):
        lines.setdefault(result.line, []).append(result)
    if not lines:
        return None
    series = [
        Series(
            label,
            [share(one) for one in points],
            [one.kl for one in points],
            style=style,
            errors=[one.kl_stderr for one in points],
            names=[f"{one.line} {one.budget_text}" for one in points],
        )
        for style, (label, points) in enumerate(sorted(lines.items()))
    ]
    drawn = [one for points in lines.values() for one in points]
    x = around(LINEAR_BYTES if linears else BYTES, [share(one) for one in drawn])
    y = around(
        KL, [bound for one in drawn for bound in (one.kl, one.kl + one.kl_stderr, one.kl - one.kl_stderr)], log=True
    )
    title = f"KL against {LINEARS if linears else 'FFN bytes'}, by method"
    return line_chart(title, series, x, y)
