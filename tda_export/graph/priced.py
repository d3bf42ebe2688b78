"""A priced artifact: a plain dense prefill, and a decode that reads the rows that are worth their bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tda_export.graph import contract, kv_formats, operators
from tda_export.graph.attention import attention_lengths, call_tokens
from tda_export.graph.attention_function import StepGraphBuilder, prompt_graph_builder
from tda_export.graph.call_start import call_start, call_start_function
from tda_export.graph.contract import IoTensor
from tda_export.graph.decoder import last_positions, model_shape
from tda_export.graph.ffn import plain_ffn
from tda_export.graph.fused import fuse
from tda_export.graph.gated_activation import gated_activation, gated_activation_functions
from tda_export.graph.greedy import greedy_token_function, greedy_tokens
from tda_export.graph.integer_linear import integer_row_linear
from tda_export.graph.linear import (
    FunctionGraphBuilder,
    NormGraphBuilder,
    linear_functions,
    norm_functions,
)
from tda_export.graph.row_linear import dropped_rows, row_linear, row_linear_functions
from tda_export.graph.subgraph import group
from tda_export.graph.sums import add_residuals
from tda_export.graph.weight_plan import PricedRows
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing

NORMS = {operators.ADD_NORM, operators.ADD_BIAS_NORM, operators.NORM_ROW_LINEAR}
ADDITIONS = {operators.ROW_LINEAR_ADD, operators.GATED_ROW_LINEAR_ADD}


class RowGraphBuilder(StepGraphBuilder):
    """Builds products with matrices whose rows have prices as `tda::RowLinear`.

    `price` is set once it is computed. On request, `kept`, int64 [1, S] by matrix, counts the rows that each token
    reads, and `read`, bool [1, S, in] by matrix, says which rows are worth the price.
    """

    price: ir.Value
    counted = listed = False

    def __init__(
        self,
        spec: DecoderSpec,
        weights: WeightTable,
        dtype: str,
        inputs: Sequence[IoTensor],
        kv: str = kv_formats.KV_FLOAT,
    ) -> None:
        super().__init__(spec, weights, dtype, inputs, kv)
        self.kept: list[ir.Value] = []
        self.read: list[ir.Value] = []

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        return self._rows(x, name, None) if contract.row_price(name) in self.weights else super().linear(x, name)

    def affine(self, x: ir.Value, name: str) -> ir.Value:
        bias = contract.linear_bias(name)
        if contract.row_price(name) in self.weights and bias in self.weights:
            return self._rows(x, name, self.weight(bias))
        return super().affine(x, name)

    def _rows(self, x: ir.Value, name: str, bias: ir.Value | None) -> ir.Value:
        row_price = self.weight(contract.row_price(name))
        if self.counted:
            ops = self.ops
            zero = ops.op("CastLike", ops.constant(0.0, "float32"), x)
            unread = ops.op("Or", dropped_rows(ops, x, row_price, self.price), ops.op("Equal", x, zero))
            read = ops.cast(ops.op("Not", unread), "int64")  # [1, S, in]
            self.kept.append(ops.op("ReduceSum", read, ops.constant([2], "int64"), keepdims=0))
        if self.listed:
            self.read.append(self.ops.op("Not", dropped_rows(self.ops, x, row_price, self.price)))
        # The first layer has waited for the price, so it is available to all later layers.
        early = not contract.in_a_layer(name, 0)
        matrix = self.weights.matrices[name]
        if matrix.format.is_float:
            return row_linear(self.ops, x, self.weight(name), row_price, self.price, bias, early=early)
        stored = self.stored(name)
        return integer_row_linear(self.ops, matrix, x, stored, row_price, self.price, bias, early=early)


class NormRowGraphBuilder(RowGraphBuilder, NormGraphBuilder):
    """The same with norms as functions, for decode."""


class FunctionRowGraphBuilder(RowGraphBuilder, FunctionGraphBuilder):
    """The same in half precision, where the other products of decode are functions too."""


def build_priced_prefill(
    spec: DecoderSpec, weights: WeightTable, dtype: str, *, kv: str = kv_formats.KV_FLOAT
) -> ir.Model:
    """Build the graph that reads a prompt densely.

    Args:
        spec: The architecture.
        weights: The tensors of weights.bin.
        dtype: A value of `contract.DTYPES`.
        kv: How keys and values are stored, one of `kv_formats.KV_FORMATS`.

    Returns:
        The model with the inputs and outputs of `contract.priced_prefill_inputs` and `contract.dense_outputs`.
    """
    shape = model_shape(spec, dtype, kv)
    # In float32 products of integers have kernels for prompts, and so can norms and gated activations among them.
    kernels = dtype == "float32" and any(
        not matrix.format.is_float for name, matrix in weights.matrices.items() if contract.row_price(name) in weights
    )
    builder = NormGraphBuilder if kernels else prompt_graph_builder(dtype)
    graph = builder(spec, weights, dtype, contract.priced_prefill_inputs(shape), kv)
    inputs = graph.inputs
    lengths = attention_lengths(graph.ops, inputs[contract.ATTENTION_MASK])
    tokens = call_tokens(graph.ops, inputs[contract.INPUT_IDS], lengths)
    # In half precision the node has a kernel, which reads gate and up once; stock operators copy them apart first.
    node = spec.gated and (kernels or dtype != "float32")
    gated = partial(gated_activation, graph.ops, spec.activation) if node else None
    hidden = graph.layers(lengths, plain_ffn(graph, gated))
    last = last_positions(graph.ops, hidden, inputs[contract.NUM_LOGITS], tokens.attended)
    graph.outputs[contract.LOGITS] = graph.logits(last)
    defaults = {contract.NUM_LOGITS: np.ones(1, np.int64)}
    functions = gated_activation_functions(spec.activation) if node else []
    functions += graph.attention_functions()
    if kernels:
        functions += [*norm_functions(spec.norm), *row_linear_functions()]
    model = graph.model("prefill", contract.dense_outputs(shape), defaults, functions)
    if kernels:
        fuse(model)
    return model


def build_priced_decode(
    spec: DecoderSpec,
    weights: WeightTable,
    dtype: str,
    price: float = 0.0,
    *,
    kv: str = kv_formats.KV_FLOAT,
    explicit: bool = False,
    counted: bool = False,
    listed: bool = False,
    like: Collection[str] | None = None,
) -> ir.Model:
    """Build the graph in which each token reads the rows that are worth their bytes at a price.

    Args:
        spec: The architecture.
        weights: The tensors of weights.bin, row prices among them.
        dtype: A value of `contract.DTYPES`.
        price: The default of the input with that name; 0 is dense.
        kv: How keys and values are stored, one of `kv_formats.KV_FORMATS`.
        explicit: Give no input a default.
        counted: Add the number of rows that each token reads of each matrix, in the order of computation, to the
            outputs. Rows whose input is zero are not read.
        listed: Add to the outputs which rows of each matrix are worth the price to each token, in the same order.
        like: The operators of an artifact's own decode, which an earlier version may have built. Norms are computed as
            there, so that rounding does not let the graph read other rows.

    Returns:
        The model with the inputs and outputs of `contract.priced_decode_inputs` and `contract.priced_decode_outputs`. A
        call without a past is dense.
    """
    shape, half = model_shape(spec, dtype, kv), dtype != "float32"
    plain, apart = _earlier_norms(like)
    builder = FunctionRowGraphBuilder if half else RowGraphBuilder if plain else NormRowGraphBuilder
    graph = builder(spec, weights, dtype, contract.priced_decode_inputs(shape, explicit=explicit), kv)
    ops, inputs, outputs = graph.ops, graph.inputs, graph.outputs
    graph.counted, graph.listed = counted, listed
    mask = inputs[contract.ATTENTION_MASK]
    graph.price, lengths = call_start(ops, inputs[contract.INPUT_IDS], mask, inputs[contract.PRICE])
    gated = partial(gated_activation, ops, spec.activation)
    hidden = graph.layers(lengths, plain_ffn(graph, gated))
    outputs[contract.LOGITS] = graph.logits(hidden)
    outputs[contract.GREEDY_TOKENS] = greedy_tokens(ops, outputs[contract.LOGITS])
    if counted:
        outputs[contract.KEPT_ROWS] = ops.op("Concat", *graph.kept, axis=0)  # [matrices, S]
    rows = sum(weights.matrices[name].rows for name in priced_matrices(spec, weights)) if listed else 0
    if listed:
        outputs[contract.READ_ROWS] = ops.op("Concat", *graph.read, axis=2)  # [1, S, rows]
    defaults = {} if explicit else {contract.PRICE: np.array([price], np.float32)}
    functions = [*row_linear_functions(), call_start_function(), greedy_token_function()]
    if spec.gated:
        functions += gated_activation_functions(spec.activation)
    functions += graph.attention_functions()
    functions += (linear_functions if half else norm_functions)(spec.norm)
    declared = contract.priced_decode_outputs(shape, counted=len(graph.kept), listed=rows)
    model = graph.model("decode", declared, defaults, functions)
    fuse(model)
    if half and not apart:
        add_residuals(model)
    return model


def _earlier_norms(like: Collection[str] | None) -> tuple[bool, bool]:
    """Return whether a decode of these operators has none of this project's norms, and whether it has none whose
    product adds the residual."""
    if like is None:
        return False, False
    names = {operator.rstrip("48") for operator in like}
    return not names & NORMS, not names & ADDITIONS


def priced_matrices(spec: DecoderSpec, weights: WeightTable) -> list[str]:
    """Name the matrices whose rows have prices, in the order in which decode computes them."""
    order = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
    names = [contract.linear_weight(layer, stored) for layer in range(spec.num_layers) for stored in order]
    return [name for name in (*names, contract.HEAD) if contract.row_price(name) in weights]


@dataclass(frozen=True)
class PricedDesign:
    """What the rows of a model's linears are worth, and decode's default price.

    `prices` are float32 [L, in] by stored matrix, [1, in] of a head with prices. `table` is calibration's measured
    table (`PriceTable.to_dict`), None where nothing was measured. `expected`: what calibration expects at `price`, as
    plain data.
    """

    packing: Packing
    prices: Mapping[str, torch.Tensor]
    price: float
    table: dict[str, Any] | None = None
    expected: dict[str, Any] = field(default_factory=dict)

    layout = "priced"

    @property
    def rows(self) -> PricedRows:
        """The meaning of the rows of the layers' matrices."""
        return PricedRows(self.packing, self.prices)

    def graphs(self, spec: DecoderSpec, table: WeightTable, dtype: str, kv: str) -> dict[str, ir.Model]:
        """Build the graphs, by file name."""
        graphs = {
            contract.PREFILL_FILE: build_priced_prefill(spec, table, dtype, kv=kv),
            contract.DECODE_FILE: build_priced_decode(spec, table, dtype, self.price, kv=kv),
            contract.EXPLICIT_DECODE_FILE: build_priced_decode(spec, table, dtype, kv=kv, explicit=True),
        }
        # The CPU's; on CUDA a step is captured, and nothing passes between nodes. Graphs that are derived from an
        # artifact's read values between the nodes, so they keep these.
        if dtype == "float32":
            for model in graphs.values():
                group(model)
        return graphs

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entries that only this layout has."""
        return {
            "method": {"name": "priced"},
            "packing": self.packing,
            "price": self.price,
            "price_table": self.table,
            "expected": self.expected,
        }
