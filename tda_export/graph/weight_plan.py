"""Which tensors an artifact stores, in file order, and how each is made from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tda_export.graph import contract
from tda_export.graph.storage import PlannedWeight, Storage
from tda_export.models.layout import Layout, LazyTensor
from tda_export.models.rope import rope_table
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import Weights
from tda_export.packing import Packing, packed_matrices
from tda_export.weights.matrix import Major
from tda_export.weights.plan import part_name


@dataclass(frozen=True)
class IndexedRows:
    """Rows of FFN matrices are neurons, and a prompt mask names those to read. Q, K and V are packed.

    `up_rms`, float [L, F], is the root mean square of each neuron's up product (1 without gates), which two-level
    methods need.
    """

    up_rms: torch.Tensor | None = None


@dataclass(frozen=True)
class PricedRows:
    """Rows of all linears of the layers, and mostly of the head, are input channels, and a token reads the rows that
    are worth their bytes.

    `prices` are float32 [L, in] by stored matrix: those of `packed_matrices`, and [1, in] of the head where its rows
    have prices too.
    """

    packing: Packing
    prices: Mapping[str, torch.Tensor]


Rows = IndexedRows | PricedRows


def plan_weights(
    spec: DecoderSpec, weights: Weights, storage: Storage, rows: Rows = IndexedRows()
) -> Iterator[PlannedWeight]:
    """List the tensors of weights.bin in file order, checking each shape against the spec.

    A tied head is not stored a second time, unless its rows have prices: then it is stored [in, out], as the layers'
    linears are, and the embedding beside it. Other linears outside the layers are stored [out, in].

    Args:
        spec: The architecture.
        weights: The checkpoint.
        storage: How the tensors are stored; row prices and the constants of statistics and estimates are float32.
        rows: The meaning of the rows of the layers' matrices.

    Raises:
        TdaError: A tensor is missing or has another shape than the configuration says.
        UsageError: Matrices to be stored side by side have different formats.
    """
    return _Planner(spec, weights, storage, rows).plan()


class _Planner:
    def __init__(self, spec: DecoderSpec, weights: Weights, storage: Storage, rows: Rows) -> None:
        self._spec, self._storage, self._dtype, self._rows = spec, storage, storage.dtype, rows
        self._layout = Layout(spec, weights)

    def plan(self) -> Iterator[PlannedWeight]:
        spec, dtype, layout = self._spec, self._dtype, self._layout
        names, m, width = spec.names, spec.hidden_size, spec.embedding_width
        embedding = layout.plain(f"{names.embedding}.weight", spec.vocab_size, width)
        yield from self._outer(contract.EMBEDDING, embedding)
        if spec.position_offset is not None:
            yield self._stored(contract.POSITIONS, layout.positions())
        if width != m:
            yield from self._floats(contract.PROJECT_IN, layout.linear(names.project_in, m, width))
            yield from self._floats(contract.PROJECT_OUT, layout.linear(names.project_out, width, m))
        for rope, caches in ((spec.rope, contract.ROPE_CACHES), (spec.local_rope, contract.LOCAL_ROPE_CACHES)):
            if rope is not None:
                for function, name in zip(("cos", "sin"), caches, strict=True):
                    table = partial(rope_table, rope, spec.head_size, spec.max_positions, function, spec.rotary_size)
                    yield PlannedWeight(name, (spec.max_positions, spec.head_size // 2), dtype, table)
        for i in range(spec.num_layers):
            at = {field: template.format(i=i) for field, template in vars(names).items()}
            if spec.norm_placement != "output":
                yield from self._norm(contract.attention_norm(i), at["attention_norm"])
            yield from self._projections(i)
            if spec.qk_norm != "none":
                yield self._stored(contract.query_norm(i), layout.head_norm(at["query_norm"], spec.num_heads))
                yield self._stored(contract.key_norm(i), layout.head_norm(at["key_norm"], spec.num_kv_heads))
            yield from self._attention_output(i)
            if spec.norm_placement in ("output", "both"):
                yield from self._norm(contract.attention_output_norm(i), at["attention_output_norm"])
            if spec.norm_placement != "output":
                yield from self._norm(contract.ffn_norm(i), at["ffn_norm"])
            yield from self._ffn(i)
            if spec.norm_placement in ("output", "both"):
                yield from self._norm(contract.ffn_output_norm(i), at["ffn_output_norm"])
            yield from self._ffn_constants(i)
        if spec.final_norm:
            yield from self._norm(contract.FINAL_NORM, names.final_norm)
        head = embedding
        if not spec.tied_head:
            head = layout.plain(f"{names.head}.weight", spec.vocab_size, width)
        if isinstance(self._rows, PricedRows) and contract.HEAD in self._rows.prices:
            yield from self._storage.plan(contract.HEAD, _side_by_side([head]), "input", [contract.HEAD])
            yield self._row_price(contract.HEAD, self._rows.prices[contract.HEAD][0])
        elif not spec.tied_head:
            yield from self._outer(contract.HEAD, head)

    def _stored(self, target: str, tensor: LazyTensor, dtype: str | None = None) -> PlannedWeight:
        return PlannedWeight(target, tensor.shape, dtype or self._dtype, tensor.load)

    def _outer(self, target: str, tensor: LazyTensor) -> Iterator[PlannedWeight]:
        """List a matrix outside the layers."""
        return self._storage.plan(target, tensor, "output", [target])

    def _floats(self, target: str, tensor: LazyTensor, major: Major = "output") -> Iterator[PlannedWeight]:
        """List a matrix that is stored as floats, as all matrices of the indexed layout are."""
        return Storage(self._dtype).plan(target, tensor, major, [target])

    def _norm(self, target: str, module: str) -> Iterator[PlannedWeight]:
        size = self._spec.hidden_size
        yield self._stored(target, self._layout.norm(module, size))
        if self._spec.norm == "layer":
            yield self._stored(contract.norm_bias(target), self._layout.plain(f"{module}.bias", size))

    def _projections(self, layer: int) -> Iterator[PlannedWeight]:
        """List the projections of queries, keys and values."""
        if isinstance(self._rows, PricedRows):
            yield from self._priced(layer, ("q", "k", "v"), biased=self._spec.qkv_bias)
            return
        yield from self._floats(contract.qkv_weight(layer), self._layout.qkv(layer))
        if self._spec.qkv_bias:
            yield self._stored(contract.qkv_bias(layer), self._layout.qkv_bias(layer))

    def _attention_output(self, layer: int) -> Iterator[PlannedWeight]:
        spec, name = self._spec, contract.attention_out_weight(layer)
        if isinstance(self._rows, PricedRows):
            yield from self._priced(layer, ("o",), biased=spec.attention_out_bias)
            return
        yield from self._floats(name, self._layout.part(layer, "o"))
        if spec.attention_out_bias:
            yield self._stored(contract.attention_out_bias(layer), self._layout.part_bias(layer, "o"))

    def _ffn(self, layer: int) -> Iterator[PlannedWeight]:
        spec, layout = self._spec, self._layout
        if isinstance(self._rows, PricedRows):
            yield from self._priced(layer, spec.ffn_parts, biased=spec.ffn_bias)
            return
        for part in spec.ffn_parts:
            major: Major = "input" if part == "down" else "output"  # a row is a neuron
            yield from self._floats(contract.ffn_weight(layer, part), layout.ffn(layer, part), major)
        if spec.ffn_bias:
            for part in spec.ffn_parts:
                yield self._stored(contract.ffn_bias(layer, part), layout.ffn_bias(layer, part))

    def _ffn_constants(self, layer: int) -> Iterator[PlannedWeight]:
        if isinstance(self._rows, PricedRows):
            return
        down = self._layout.ffn(layer, "down")
        squared_norms = LazyTensor(down.shape[:1], partial(_squared_row_norms, down))
        yield self._stored(contract.down_squared_norms(layer), squared_norms, "float32")
        if self._rows.up_rms is not None:
            scale = LazyTensor(down.shape[:1], partial(_scale, squared_norms, self._rows.up_rms[layer]))
            yield self._stored(contract.neuron_scale(layer), scale, "float32")

    def _priced(self, layer: int, wanted: Sequence[str], *, biased: bool) -> Iterator[PlannedWeight]:
        """List the stored matrices whose parts are among `wanted`, with their biases and row prices."""
        assert isinstance(self._rows, PricedRows)
        for stored, parts in packed_matrices(self._spec, self._rows.packing).items():
            if parts[0] not in wanted:
                continue
            name, layout = contract.linear_weight(layer, stored), self._layout
            tensor = _side_by_side([layout.part(layer, part) for part in parts])
            yield from self._storage.plan(name, tensor, "input", [part_name(layer, part) for part in parts])
            if biased:
                yield self._stored(contract.linear_bias(name), _joined([layout.part_bias(layer, p) for p in parts]))
            yield self._row_price(name, self._rows.prices[stored][layer])

    def _row_price(self, name: str, price: torch.Tensor) -> PlannedWeight:
        return self._stored(contract.row_price(name), LazyTensor(tuple(price.shape), partial(_same, price)), "float32")


def _squared_row_norms(down: LazyTensor) -> torch.Tensor:
    """||W_down[:, i]||^2 for each neuron: neuron-major [F, M] of any dtype to float32 [F]."""
    return down.load().float().square().sum(dim=1)


def _scale(squared_norms: LazyTensor, up_rms: torch.Tensor) -> torch.Tensor:
    """RMS(up_i · x) ||W_down[:, i]||: times |act(gate_i · x)|, the expected length of neuron i's output."""
    return squared_norms.load().sqrt() * up_rms


def _side_by_side(parts: list[LazyTensor]) -> LazyTensor:
    """Put linears [out, in] of one input side by side, input-major: [in, out of all]."""
    inputs = parts[0].shape[1]
    outputs = sum(part.shape[0] for part in parts)
    if len(parts) == 1:
        return LazyTensor((inputs, outputs), lambda: parts[0].load().T)
    return LazyTensor((inputs, outputs), lambda: torch.cat([part.load() for part in parts]).T)


def _joined(parts: list[LazyTensor]) -> LazyTensor:
    return LazyTensor((sum(part.shape[0] for part in parts),), lambda: torch.cat([part.load() for part in parts]))


def _same(value: torch.Tensor) -> torch.Tensor:
    return value
