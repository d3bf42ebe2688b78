"""Rounding a model's matrices to the nearest codes, one after another: no data needed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from tda_export.errors import TdaError
from tda_export.models.layout import Layout
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import Weights
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import FIELDS, Codes, round_to_nearest
from tda_export.weights.plan import EMBEDDING, HEAD

ELEMENTS_AT_ONCE = 1 << 22  # of a matrix, that one thread rounds


def read_matrix_rows(spec: DecoderSpec, weights: Weights, name: str) -> np.ndarray:
    """Read a matrix as it is stored, float32 [rows, columns]: layers' linears [in, out], embedding and head [V, M].

    Raises:
        TdaError: It holds a weight that is no finite number.
    """
    layout = Layout(spec, weights)
    if name in (EMBEDDING, HEAD):
        module = spec.names.embedding if name == EMBEDDING else spec.names.head
        weight = layout.plain(f"{module}.weight", spec.vocab_size, spec.embedding_width).load()
    else:
        _, layer, part = name.split(".")
        weight = layout.part(int(layer), part).load().T
    if not bool(weight.isfinite().all()):
        raise TdaError(f"{name}: the checkpoint has weights that are no finite numbers. Download the weights again.")
    return np.ascontiguousarray(weight.float().numpy())


def round_matrix(rows: np.ndarray, format: IntegerFormat, *, symmetric: bool) -> Codes:
    """Round a matrix float32 [rows, columns] to the nearest codes with searched ranges, with PyTorch's threads."""
    step = max(1, ELEMENTS_AT_ONCE // rows.shape[1])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        blocks = list(
            threads.map(
                partial(round_to_nearest, format=format, symmetric=symmetric),
                (rows[start : start + step] for start in range(0, len(rows), step)),
            )
        )
    return Codes(format, *(np.concatenate([getattr(block, field) for block in blocks]) for field in FIELDS))
