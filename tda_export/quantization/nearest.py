"""Rounding a model's matrices to the nearest codes, one after another: no data needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tda_export.errors import TdaError
from tda_export.models.layout import Layout
from tda_export.models.spec import DecoderSpec
from tda_export.models.transfer import to_device
from tda_export.models.weights import Weights
from tda_export.quantization import nearest_on_device
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import FIELDS, Codes, round_to_nearest
from tda_export.weights.matrix import Major
from tda_export.weights.plan import EMBEDDING, HEAD

ELEMENTS_AT_ONCE = 1 << 22  # elements of a matrix that one thread or a GPU rounds at a time


def read_matrix(
    spec: DecoderSpec,
    weights: Weights,
    name: str,
    device: torch.device | str = "cpu",
    columns: slice = slice(None),
    *,
    head_major: Major = "output",
) -> torch.Tensor:
    """Read a matrix, or some columns of it, as it is stored, float32 [rows, columns]: layers' linears [in, out], the
    embedding [V, M], the head [M, V] or [V, M], as `head_major` says.

    Raises:
        TdaError: A weight is not finite.
    """
    layout = Layout(spec, weights)
    if name in (EMBEDDING, HEAD):
        module = spec.names.embedding if name == EMBEDDING or spec.tied_head else spec.names.head
        weight = layout.plain(f"{module}.weight", spec.vocab_size, spec.embedding_width).load()
        by_input = name == HEAD and head_major == "input"
        weight = to_device(weight[columns], device).T if by_input else weight[:, columns].to(device)
    else:
        _, layer, part = name.split(".")
        weight = to_device(layout.part(int(layer), part).load()[columns], device).T
    rows = weight.float().contiguous()
    _check_finite(name, bool(rows.isfinite().all()))
    return rows


def round_matrix(
    name: str,
    rows: torch.Tensor,
    format: IntegerFormat,
    *,
    symmetric: bool,
    device: torch.device | str | None = None,
) -> Codes:
    """Round a matrix to the nearest codes with searched ranges, piece by piece: on the CPU by NumPy in as many threads
    as PyTorch has, on a GPU by PyTorch. Both give the same codes (`nearest_on_device`).

    Args:
        name: The matrix's name, for messages.
        rows: float32 [rows, columns].
        format: The format of the codes.
        symmetric: Let zero points be the middle code.
        device: Where to round; None means where `rows` are.

    Raises:
        TdaError: A weight is not finite, or too large for its scale.
    """
    _check_finite(name, bool(rows.isfinite().all()))
    chosen = rows.device if device is None else torch.device(device)
    pieces = rows.split(max(1, ELEMENTS_AT_ONCE // rows.shape[1]))
    if chosen.type == "cpu":
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            blocks = list(
                threads.map(lambda piece: round_to_nearest(piece.cpu().numpy(), format, symmetric=symmetric), pieces)
            )
    else:
        blocks = [nearest_on_device.round_to_nearest(piece.to(chosen), format, symmetric=symmetric) for piece in pieces]
    codes = Codes(format, *(np.concatenate([getattr(block, field) for block in blocks]) for field in FIELDS))
    check_scales(name, format, bool(np.isfinite(codes.scales).all()))
    return codes


def check_scales(name: str, format: IntegerFormat, finite: bool) -> None:
    """Refuse codes whose scales overflow float16, as weights of a million cause.

    Raises:
        TdaError: A scale overflows; the message names the matrix.
    """
    if not finite:
        raise TdaError(
            f"{name}: some weights are too large for scales of {format.name}, which are float16. Leave the "
            f"matrix float: --weights-for {name.replace(', ', '=float,')}=float."
        )


def _check_finite(name: str, finite: bool) -> None:
    if not finite:
        raise TdaError(f"{name}: the checkpoint has weights that are not finite. Download the weights again.")
