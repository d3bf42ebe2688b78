"""weights.bin: every weight of both graphs, written once, in the layout that the graphs read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.graph.ops import DTYPES
from tda_export.models.rope import rope_table
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import Weights

ALIGNMENT = 4096  # bytes; lets a runtime map each tensor into memory
WeightTable = dict[str, ir.ExternalTensor]


@dataclass(frozen=True)
class PlannedWeight:
    """A tensor of weights.bin: its name in the graphs, shape, dtype, and how to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]


def plan_weights(spec: DecoderSpec, weights: Weights, dtype: str) -> Iterator[PlannedWeight]:
    """List the tensors of weights.bin in file order, checking each shape against the spec.

    Linear layers are stored as MatMul wants them, [in, out], with Q, K and V packed; FFN weights are neuron-major
    [F, M]; a tied head is not stored a second time.

    Args:
        spec: The architecture.
        weights: The checkpoint.
        dtype: `float32` or `float16`, of everything but the statistics' constants.

    Raises:
        TdaError: A tensor is missing or has another shape than the configuration says.
    """
    names, m, f = spec.names, spec.hidden_size, spec.ffn_size
    attention_size = spec.num_heads * spec.head_size

    def tensor(name: str, *shape: int) -> str:
        if name not in weights:
            raise TdaError(f"{name} is missing from the checkpoint. Download the model again.")
        if weights.shape(name) != shape:
            raise TdaError(
                f"{name}: expected shape {list(shape)} by config.json, got {list(weights.shape(name))} in the checkpoint."
            )
        return name

    def plain(target: str, name: str, *shape: int) -> PlannedWeight:
        source = tensor(name, *shape)
        return PlannedWeight(target, shape, dtype, lambda: weights.load(source))

    def transposed(target: str, name: str, rows: int, columns: int) -> PlannedWeight:
        source = tensor(name, rows, columns)
        return PlannedWeight(target, (columns, rows), dtype, lambda: weights.load(source).T)

    yield plain(contract.EMBEDDING, f"{names.embedding}.weight", spec.vocab_size, m)
    for function, name in (("cos", contract.COS_CACHE), ("sin", contract.SIN_CACHE)):
        shape = (spec.max_positions, spec.head_size // 2)
        yield PlannedWeight(
            name, shape, dtype, lambda function=function: rope_table(spec.rope, spec.head_size, spec.max_positions, function)
        )
    for layer in range(spec.num_layers):
        at = {field: template.format(i=layer) for field, template in vars(names).items()}
        parts = [
            (at["query"], attention_size),
            (at["key"], spec.num_kv_heads * spec.head_size),
            (at["value"], spec.num_kv_heads * spec.head_size),
        ]
        qkv = [tensor(f"{name}.weight", rows, m) for name, rows in parts]
        yield plain(contract.attention_norm(layer), f"{at['attention_norm']}.weight", m)
        yield PlannedWeight(
            contract.qkv_weight(layer),
            (m, spec.qkv_size),
            dtype,
            lambda qkv=qkv: torch.cat([weights.load(name) for name in qkv]).T,
        )
        if spec.qkv_bias:
            biases = [tensor(f"{name}.bias", rows) for name, rows in parts]
            yield PlannedWeight(
                contract.qkv_bias(layer),
                (spec.qkv_size,),
                dtype,
                lambda biases=biases: torch.cat([weights.load(name) for name in biases]),
            )
        yield transposed(contract.attention_out_weight(layer), f"{at['attention_out']}.weight", m, attention_size)
        if spec.attention_out_bias:
            yield plain(contract.attention_out_bias(layer), f"{at['attention_out']}.bias", m)
        yield plain(contract.ffn_norm(layer), f"{at['ffn_norm']}.weight", m)
        yield plain(contract.ffn_weight(layer, "gate"), f"{at['gate']}.weight", f, m)
        yield plain(contract.ffn_weight(layer, "up"), f"{at['up']}.weight", f, m)
        yield transposed(contract.ffn_weight(layer, "down"), f"{at['down']}.weight", m, f)
        if spec.ffn_bias:
            yield plain(contract.ffn_bias(layer, "gate"), f"{at['gate']}.bias", f)
            yield plain(contract.ffn_bias(layer, "up"), f"{at['up']}.bias", f)
            yield plain(contract.ffn_bias(layer, "down"), f"{at['down']}.bias", m)
        down = tensor(f"{at['down']}.weight", m, f)
        yield PlannedWeight(
            contract.down_norms(layer), (f,), "float32", lambda down=down: squared_column_norms(weights.load(down))
        )
    yield plain(contract.FINAL_NORM, f"{names.final_norm}.weight", m)
    if not spec.tied_head:
        yield plain(contract.HEAD, f"{names.head}.weight", spec.vocab_size, m)


def squared_column_norms(down: torch.Tensor) -> torch.Tensor:
    """Return ||W_down[:, i]||^2 for each neuron: [M, F] of any dtype to float32 [F]."""
    return down.float().square().sum(dim=0)


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
    table: WeightTable = {}
    digest = hashlib.sha256()
    offset = 0
    with path.open("wb") as file:
        for planned in plan:
            padding = bytes(-offset % ALIGNMENT)
            content = planned.load().to(getattr(torch, planned.dtype)).contiguous()
            if tuple(content.shape) != planned.shape:
                raise AssertionError(f"{planned.name}: planned {planned.shape}, made {tuple(content.shape)}")
            raw = memoryview(content.view(torch.uint8).numpy().reshape(-1)) if content.dim() else memoryview(b"")
            for piece in (padding, raw):
                file.write(piece)
                digest.update(piece)
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
