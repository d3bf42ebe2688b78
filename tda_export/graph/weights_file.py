"""weights.bin: every weight of both graphs, written once, in the layout that the graphs read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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


def plan_weights(
    spec: DecoderSpec, weights: Weights, dtype: str, up_rms: torch.Tensor | None = None
) -> Iterator[PlannedWeight]:
    """List the tensors of weights.bin in file order, checking each shape against the spec.

    Linear layers are stored as checkpoints have them, [out, in], with Q, K and V packed; FFN weights are neuron-major
    [F, M]; a tied head is not stored a second time.

    Args:
        spec: The architecture.
        weights: The checkpoint.
        dtype: A value of `contract.DTYPES`, of everything but the constants of statistics and estimates.
        up_rms: float [L, F], root mean square of each neuron's up product; two-level methods need it.

    Raises:
        TdaError: A tensor is missing or has another shape than the configuration says.
    """
    names, m, f = spec.names, spec.hidden_size, spec.ffn_size
    heads = spec.num_heads * spec.head_size
    kv_heads = spec.num_kv_heads * spec.head_size

    def stored(target: str, *parts: tuple[str, tuple[int, ...]], transpose: bool = False) -> PlannedWeight:
        """Plan one tensor from checkpoint tensors of the given shapes, joined along their first axis."""
        for name, expected in parts:
            _check_shape(weights, name, expected)
        joined = (sum(expected[0] for _, expected in parts), *parts[0][1][1:])
        load = partial(_load, weights, [name for name, _ in parts], transpose)
        return PlannedWeight(target, joined[::-1] if transpose else joined, dtype, load)

    yield stored(contract.EMBEDDING, (f"{names.embedding}.weight", (spec.vocab_size, m)))
    for function, name in (("cos", contract.COS_CACHE), ("sin", contract.SIN_CACHE)):
        table = partial(rope_table, spec.rope, spec.head_size, spec.max_positions, function)
        yield PlannedWeight(name, (spec.max_positions, spec.head_size // 2), dtype, table)
    for i in range(spec.num_layers):
        at = {field: template.format(i=i) for field, template in vars(names).items()}
        qkv = [(at["query"], heads), (at["key"], kv_heads), (at["value"], kv_heads)]
        down = f"{at['down']}.weight"
        yield stored(contract.attention_norm(i), (f"{at['attention_norm']}.weight", (m,)))
        yield stored(contract.qkv_weight(i), *((f"{name}.weight", (rows, m)) for name, rows in qkv))
        if spec.qkv_bias:
            yield stored(contract.qkv_bias(i), *((f"{name}.bias", (rows,)) for name, rows in qkv))
        yield stored(contract.attention_out_weight(i), (f"{at['attention_out']}.weight", (m, heads)))
        if spec.attention_out_bias:
            yield stored(contract.attention_out_bias(i), (f"{at['attention_out']}.bias", (m,)))
        yield stored(contract.ffn_norm(i), (f"{at['ffn_norm']}.weight", (m,)))
        for part in ("gate", "up"):
            yield stored(contract.ffn_weight(i, part), (f"{at[part]}.weight", (f, m)))
        yield stored(contract.ffn_weight(i, "down"), (down, (m, f)), transpose=True)
        if spec.ffn_bias:
            for part, size in (("gate", f), ("up", f), ("down", m)):
                yield stored(contract.ffn_bias(i, part), (f"{at[part]}.bias", (size,)))
        squared_norms = partial(_squared_column_norms, weights, down)
        yield PlannedWeight(contract.down_squared_norms(i), (f,), "float32", squared_norms)
        if up_rms is not None:
            yield PlannedWeight(contract.neuron_scale(i), (f,), "float32", partial(_scale, squared_norms, up_rms[i]))
    yield stored(contract.FINAL_NORM, (f"{names.final_norm}.weight", (m,)))
    if not spec.tied_head:
        yield stored(contract.HEAD, (f"{names.head}.weight", (spec.vocab_size, m)))


def _check_shape(weights: Weights, name: str, expected: tuple[int, ...]) -> None:
    if name not in weights:
        raise TdaError(f"{name} is missing from the checkpoint. Download the model again.")
    if weights.shape(name) != expected:
        raise TdaError(
            f"{name}: config.json says shape {list(expected)}, the checkpoint has {list(weights.shape(name))}. "
            "Download the model again."
        )


def _load(weights: Weights, names: list[str], transpose: bool) -> torch.Tensor:
    tensors = [weights.load(name) for name in names]
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return joined.T if transpose else joined


def _squared_column_norms(weights: Weights, down: str) -> torch.Tensor:
    """||W_down[:, i]||^2 for each neuron: [M, F] of any dtype to float32 [F]."""
    return weights.load(down).float().square().sum(dim=0)


def _scale(squared_norms: Callable[[], torch.Tensor], up_rms: torch.Tensor) -> torch.Tensor:
    """RMS(up_i · x) ||W_down[:, i]||: times |act(gate_i · x)| the length to expect of neuron i's output."""
    return squared_norms().sqrt() * up_rms


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
            raw = content.reshape(-1).view(torch.uint8).numpy().data
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
