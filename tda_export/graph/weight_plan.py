"""Which tensors an artifact stores, in file order, and how each is made from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tda_export.graph import contract
from tda_export.models.layout import Layout, Tensor
from tda_export.models.rope import rope_table
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import Weights
from tda_export.weights.formats import FORMATS
from tda_export.weights.matrix import Major, Matrix


@dataclass(frozen=True)
class PlannedWeight:
    """A tensor of weights.bin: its name in the graphs, shape, dtype, and how to make it; `matrix` if it is one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor]
    matrix: Matrix | None = None

    @property
    def bytes(self) -> int:
        """What it takes in the file, without padding."""
        return contract.tensor_bytes(self.shape, self.dtype)


def plan_weights(
    spec: DecoderSpec, weights: Weights, dtype: str, up_rms: torch.Tensor | None = None
) -> Iterator[PlannedWeight]:
    """List the tensors of weights.bin in file order, checking each shape against the spec.

    Linear layers are stored [out, in], with Q, K and V packed; FFN weights are neuron-major [F, M]; a tied head is not
    stored a second time.

    Args:
        spec: The architecture.
        weights: The checkpoint.
        dtype: A value of `contract.DTYPES`, of everything but the constants of statistics and estimates.
        up_rms: float [L, F], root mean square of each neuron's up product; two-level methods need it (ones without
            gates).

    Raises:
        TdaError: A tensor is missing or has another shape than the configuration says.
    """
    names, m, layout = spec.names, spec.hidden_size, Layout(spec, weights)
    heads, width = spec.num_heads * spec.head_size, spec.embedding_width

    def stored(target: str, tensor: Tensor, dtype: str = dtype) -> PlannedWeight:
        return PlannedWeight(target, tensor.shape, dtype, tensor.load)

    def matrix(target: str, tensor: Tensor, major: Major = "output") -> PlannedWeight:
        rows, columns = tensor.shape
        described = Matrix(target, rows, columns, FORMATS[dtype], major)
        return PlannedWeight(target, tensor.shape, dtype, tensor.load, described)

    def norm(target: str, module: str) -> Iterator[PlannedWeight]:
        yield stored(target, layout.norm(module, m))
        if spec.norm == "layer":
            yield stored(contract.norm_bias(target), layout.plain(f"{module}.bias", m))

    yield matrix(contract.EMBEDDING, layout.plain(f"{names.embedding}.weight", spec.vocab_size, width))
    if spec.position_offset is not None:
        yield stored(contract.POSITIONS, layout.positions())
    if width != m:
        yield matrix(contract.PROJECT_IN, layout.linear(names.project_in, m, width))
        yield matrix(contract.PROJECT_OUT, layout.linear(names.project_out, width, m))
    for rope, caches in ((spec.rope, contract.ROPE_CACHES), (spec.local_rope, contract.LOCAL_ROPE_CACHES)):
        if rope is not None:
            for function, name in zip(("cos", "sin"), caches, strict=True):
                table = partial(rope_table, rope, spec.head_size, spec.max_positions, function, spec.rotary_size)
                yield PlannedWeight(name, (spec.max_positions, spec.head_size // 2), dtype, table)
    for i in range(spec.num_layers):
        at = {field: template.format(i=i) for field, template in vars(names).items()}
        if spec.norm_placement != "output":
            yield from norm(contract.attention_norm(i), at["attention_norm"])
        yield matrix(contract.qkv_weight(i), layout.qkv(i))
        if spec.qkv_bias:
            yield stored(contract.qkv_bias(i), layout.qkv_bias(i))
        if spec.qk_norm != "none":
            yield stored(contract.query_norm(i), layout.head_norm(at["query_norm"], spec.num_heads))
            yield stored(contract.key_norm(i), layout.head_norm(at["key_norm"], spec.num_kv_heads))
        yield matrix(contract.attention_out_weight(i), layout.linear(at["attention_out"], m, heads))
        if spec.attention_out_bias:
            yield stored(contract.attention_out_bias(i), layout.plain(f"{at['attention_out']}.bias", m))
        if spec.norm_placement in ("output", "both"):
            yield from norm(contract.attention_output_norm(i), at["attention_output_norm"])
        if spec.norm_placement != "output":
            yield from norm(contract.ffn_norm(i), at["ffn_norm"])
        for part in spec.ffn_parts:
            major: Major = "input" if part == "down" else "output"  # a row is a neuron
            yield matrix(contract.ffn_weight(i, part), layout.ffn(i, part), major)
        if spec.ffn_bias:
            for part in spec.ffn_parts:
                yield stored(contract.ffn_bias(i, part), layout.ffn_bias(i, part))
        if spec.norm_placement in ("output", "both"):
            yield from norm(contract.ffn_output_norm(i), at["ffn_output_norm"])
        down = layout.ffn(i, "down")
        squared_norms = Tensor(down.shape[:1], partial(_squared_row_norms, down))
        yield stored(contract.down_squared_norms(i), squared_norms, "float32")
        if up_rms is not None:
            scale = Tensor(down.shape[:1], partial(_scale, squared_norms, up_rms[i]))
            yield stored(contract.neuron_scale(i), scale, "float32")
    if spec.final_norm:
        yield from norm(contract.FINAL_NORM, names.final_norm)
    if not spec.tied_head:
        yield matrix(contract.HEAD, layout.plain(f"{names.head}.weight", spec.vocab_size, width))


def _squared_row_norms(down: Tensor) -> torch.Tensor:
    """||W_down[:, i]||^2 for each neuron: neuron-major [F, M] of any dtype to float32 [F]."""
    return down.load().float().square().sum(dim=1)


def _scale(squared_norms: Tensor, up_rms: torch.Tensor) -> torch.Tensor:
    """RMS(up_i · x) ||W_down[:, i]||: times |act(gate_i · x)| the length to expect of neuron i's output."""
    return squared_norms.load().sqrt() * up_rms
