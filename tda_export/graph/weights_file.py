"""weights.bin: the planned tensors, written once for all graphs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import torch

from tda_export.graph.ops import DTYPES
from tda_export.graph.storage import PlannedWeight
from tda_export.weights.matrix import Matrix

ALIGNMENT = 4096  # bytes; lets a runtime map each tensor into memory


class WeightTable(dict[str, ir.ExternalTensor]):
    """The tensors of weights.bin by name, for graphs to refer to; `matrices` describes the matrices among them."""

    def __init__(self, tensors: Mapping[str, ir.ExternalTensor], matrices: Mapping[str, Matrix]) -> None:
        super().__init__(tensors)
        self.matrices = dict(matrices)


def write_weights(
    plan: list[PlannedWeight], path: Path, advance: Callable[[int], None] = lambda size: None
) -> tuple[WeightTable, str]:
    """Write the planned tensors to `path`, one at a time.

    Args:
        plan: From `plan_weights`.
        path: The file to create; its folder must exist.
        advance: Called with the number of bytes of each tensor written.

    Returns:
        The external tensors by name (to be referenced from graphs beside the file), and the file's SHA-256.
    """
    table = WeightTable({}, {planned.name: planned.matrix for planned in plan if planned.matrix})
    digest = hashlib.sha256()
    offset = 0
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        for planned in plan:
            padding = bytes(-offset % ALIGNMENT)
            content = planned.load().to(getattr(torch, planned.dtype)).contiguous()
            if tuple(content.shape) != planned.shape:
                raise AssertionError(f"{planned.name}: planned {planned.shape}, made {tuple(content.shape)}")
            raw = content.reshape(-1).view(torch.uint8).numpy().data
            for piece in (padding, raw):
                hashing = beside.submit(digest.update, piece)
                file.write(piece)
                hashing.result()
            offset += len(padding)
            table[planned.name] = ir.ExternalTensor(
                path.name,
                offset,
                raw.nbytes,
                DTYPES[planned.dtype],
                shape=ir.Shape(planned.shape),
                name=planned.name,
                base_dir=path.parent,
            )
            offset += raw.nbytes
            advance(raw.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return table, digest.hexdigest()
