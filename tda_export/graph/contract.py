"""The contract of the two graphs: every input, output and weight by name, dtype and axes.

Tensor names are spelled only here. They follow ONNX Runtime GenAI's names where it has one. The module imports only the
names of weights and the formats of keys and values, so that every other part of the project can import it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tda_export.graph.kv_formats import CACHE_KINDS, KV_FLOAT
from tda_export.graph.weight_names import (
    COS_CACHE as COS_CACHE,
)
from tda_export.graph.weight_names import (
    EMBEDDING as EMBEDDING,
)
from tda_export.graph.weight_names import (
    FINAL_NORM as FINAL_NORM,
)
from tda_export.graph.weight_names import (
    HEAD as HEAD,
)
from tda_export.graph.weight_names import (
    LOCAL_ROPE_CACHES as LOCAL_ROPE_CACHES,
)
from tda_export.graph.weight_names import (
    POSITIONS as POSITIONS,
)
from tda_export.graph.weight_names import (
    PROJECT_IN as PROJECT_IN,
)
from tda_export.graph.weight_names import (
    PROJECT_OUT as PROJECT_OUT,
)
from tda_export.graph.weight_names import (
    ROPE_CACHES as ROPE_CACHES,
)
from tda_export.graph.weight_names import (
    SIN_CACHE as SIN_CACHE,
)
from tda_export.graph.weight_names import (
    attention_norm as attention_norm,
)
from tda_export.graph.weight_names import (
    attention_out_bias as attention_out_bias,
)
from tda_export.graph.weight_names import (
    attention_out_weight as attention_out_weight,
)
from tda_export.graph.weight_names import (
    attention_output_norm as attention_output_norm,
)
from tda_export.graph.weight_names import (
    down_squared_norms as down_squared_norms,
)
from tda_export.graph.weight_names import (
    ffn_bias as ffn_bias,
)
from tda_export.graph.weight_names import (
    ffn_norm as ffn_norm,
)
from tda_export.graph.weight_names import (
    ffn_output_norm as ffn_output_norm,
)
from tda_export.graph.weight_names import (
    ffn_weight as ffn_weight,
)
from tda_export.graph.weight_names import (
    in_a_layer as in_a_layer,
)
from tda_export.graph.weight_names import (
    key_norm as key_norm,
)
from tda_export.graph.weight_names import (
    linear_bias as linear_bias,
)
from tda_export.graph.weight_names import (
    linear_weight as linear_weight,
)
from tda_export.graph.weight_names import (
    neuron_scale as neuron_scale,
)
from tda_export.graph.weight_names import (
    norm_bias as norm_bias,
)
from tda_export.graph.weight_names import (
    qkv_bias as qkv_bias,
)
from tda_export.graph.weight_names import (
    qkv_weight as qkv_weight,
)
from tda_export.graph.weight_names import (
    query_norm as query_norm,
)
from tda_export.graph.weight_names import (
    row_price as row_price,
)
from tda_export.graph.weight_names import (
    transposed as transposed,
)
from tda_export.graph.weight_names import (
    weights_of as weights_of,
)

FORMAT = "tda-export"
# 2: greedy_tokens, token_thresholds, the spec in the manifest, linear weights [out, in].
# 3: calibrated token thresholds, prior and refresh.
# 4: matrices and the layout.
FORMAT_VERSION = 4

PREFILL_FILE = "prefill.onnx"
DECODE_FILE = "decode.onnx"
EXPLICIT_DECODE_FILE = "decode_explicit.onnx"  # decode without defaults: some bindings cannot feed inputs that have one
GRAPH_FILES = (PREFILL_FILE, DECODE_FILE, EXPLICIT_DECODE_FILE)
WEIGHTS_FILE = "weights.bin"
MANIFEST_FILE = "manifest.json"
CALIBRATION_FILE = "calibration.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"
GENAI_CONFIG_FILE = "genai_config.json"

FFN_PARTS = ("gate", "up", "down")

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1, "int8": 1}


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Return the bytes of a tensor; `dtype` is a key of `DTYPE_BYTES`."""
    return math.prod(shape) * DTYPE_BYTES[dtype]


PADDING_INDEX = -1  # fills mask_indices up to a fixed size; such an entry contributes nothing

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
LOGITS = "logits"
GREEDY_TOKENS = "greedy_tokens"  # -1 where the logits are not finite
NUM_LOGITS = "num_logits"
PRICE = "price"  # of a byte of weights; 0 reads every row
THRESHOLDS = "thresholds"
TOKEN_THRESHOLDS = "token_thresholds"  # of two-level decoding; 0 is off; calibrated by default
STATS_DECAY = "stats_decay"
PAST_STATS_WEIGHT = "past_stats_weight"
PRESENT_STATS_WEIGHT = "present_stats_weight"

# Rows of neuron statistics [2, F].
SCORE_ROW = 0  # sum over tokens of the squared relative magnitude
ACTIVATION_ROW = 1  # sum over tokens of the activation


def past_key(layer: int) -> str:
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    return f"past_key_values.{layer}.value"


def present_key(layer: int) -> str:
    return f"present.{layer}.key"


def present_value(layer: int) -> str:
    return f"present.{layer}.value"


def past_scale(layer: int, part: str) -> str:
    return f"past_key_values.{layer}.{part}_scale"  # part: key or value


def present_scale(layer: int, part: str) -> str:
    return f"present.{layer}.{part}_scale"


def past_neuron_stats(layer: int) -> str:
    return f"past_neuron_stats.{layer}"


def present_neuron_stats(layer: int) -> str:
    return f"present_neuron_stats.{layer}"


def mask_indices(layer: int) -> str:
    return f"mask_indices.{layer}"


def present_mask_indices(layer: int) -> str:
    return f"present_mask_indices.{layer}"


def tail_mean(layer: int) -> str:
    return f"tail_mean.{layer}"


def present_tail_mean(layer: int) -> str:
    return f"present_tail_mean.{layer}"


KEPT_ROWS = "kept_rows"  # counts by matrix and token; an output of derived graphs for measurements
READ_ROWS = "read_rows"  # by token, over the rows of all matrices; an output of derived graphs for verification
KEPT_NEURONS = "kept_neurons"  # counts by layer and token; an output of derived graphs for measurements


def ffn_input(layer: int) -> str:
    """The input of a layer's FFN; an output of derived graphs for measurements."""
    return f"ffn_input.{layer}"


@dataclass(frozen=True)
class ModelShape:
    """The sizes that appear in the contract, in elements, the model's dtype (a value of `DTYPES`), and how keys and
    values are stored (one of `kv_formats.KV_FORMATS`)."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    kv: str = KV_FLOAT

    @property
    def precision(self) -> str:
        """The key of tolerances: the dtype, or the format of keys and values where that rounds more."""
        return self.dtype if self.kv == KV_FLOAT or self.dtype == "bfloat16" else f"{self.kv} cache"


@dataclass(frozen=True)
class IoTensor:
    """One graph input or output. Axes are sizes or symbols; the application may omit a `default` input."""

    name: str
    dtype: str
    axes: tuple[int | str, ...]
    default: bool = False


Length = TypeVar("Length", int, str)  # a size, or the name of one


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of a layer's keys and values: its names as an input and as an output, and its dtype and axes."""

    past: str
    present: str
    dtype: str
    heads: int
    row: tuple[int, ...]  # axes of one token and head

    def axes(self, length: Length) -> tuple[int | Length, ...]:
        """Return the axes of a cache of `length` tokens."""
        return (1, self.heads, length, *self.row)


def layer_caches(shape: ModelShape, layer: int) -> list[CacheTensor]:
    """List the tensors that hold a layer's keys and values, in the order of the graphs' inputs and outputs."""
    rows = [(past_key(layer), present_key(layer)), (past_value(layer), present_value(layer))]
    numbers = [(past_scale(layer, part), present_scale(layer, part)) for part in ("key", "value")]
    return [
        CacheTensor(*names, kind.dtype or shape.dtype, shape.num_kv_heads, (shape.head_size,) if kind.row else ())
        for kind in CACHE_KINDS[shape.kv]
        for names in (rows if kind.row else numbers)
    ]


def prefill_inputs(shape: ModelShape) -> list[IoTensor]:
    """List the inputs of `prefill.onnx` in order."""
    layers = range(shape.num_layers)
    return [
        *_token_inputs(),
        *_past(shape),
        *(IoTensor(past_neuron_stats(i), "float32", (2, shape.ffn_size), default=True) for i in layers),
        IoTensor(PAST_STATS_WEIGHT, "float32", (1,), default=True),
        IoTensor(STATS_DECAY, "float32", (1,), default=True),
        IoTensor(THRESHOLDS, "float32", (shape.num_layers,), default=True),
        IoTensor(NUM_LOGITS, "int64", (1,), default=True),
    ]


def prefill_outputs(shape: ModelShape) -> list[IoTensor]:
    """List the outputs of `prefill.onnx` in order. Logits are declared as [1, 1, V], as applications expect."""
    layers = range(shape.num_layers)
    return [
        IoTensor(LOGITS, "float32", (1, 1, shape.vocab_size)),
        *_present(shape),
        *(IoTensor(present_neuron_stats(i), "float32", (2, shape.ffn_size)) for i in layers),
        IoTensor(PRESENT_STATS_WEIGHT, "float32", (1,)),
        *(IoTensor(present_mask_indices(i), "int32", (f"num_mask_indices_{i}",)) for i in layers),
        *(IoTensor(present_tail_mean(i), shape.dtype, (shape.hidden_size,)) for i in layers),
    ]


def decode_inputs(shape: ModelShape, *, two_levels: bool, explicit: bool = False) -> list[IoTensor]:
    """List the inputs of `decode.onnx` in order; token thresholds belong to two-level methods.

    `explicit` lists those of `decode_explicit.onnx`, where none has a default.
    """
    layers = range(shape.num_layers)
    second_level = [IoTensor(TOKEN_THRESHOLDS, "float32", (shape.num_layers,), default=True)] if two_levels else []
    inputs = [
        *_token_inputs(),
        *_past(shape),
        *(IoTensor(mask_indices(i), "int32", (f"num_mask_indices_{i}",), default=True) for i in layers),
        *(IoTensor(tail_mean(i), shape.dtype, (shape.hidden_size,), default=True) for i in layers),
        *second_level,
    ]
    return [replace(tensor, default=False) for tensor in inputs] if explicit else inputs


def decode_outputs(shape: ModelShape, *, ffn_inputs: bool = False, counted: bool = False) -> list[IoTensor]:
    """List the outputs of `decode.onnx` in order; no artifact has `ffn_inputs` and counts."""
    axes = (1, "sequence_length", shape.hidden_size)
    probes = [IoTensor(ffn_input(i), shape.dtype, axes) for i in range(shape.num_layers)] if ffn_inputs else []
    if counted:
        probes.append(IoTensor(KEPT_NEURONS, "int64", (shape.num_layers, "sequence_length")))
    return [
        IoTensor(LOGITS, "float32", (1, "sequence_length", shape.vocab_size)),
        IoTensor(GREEDY_TOKENS, "int64", (1, "sequence_length")),
        *_present(shape),
        *probes,
    ]


def priced_prefill_inputs(shape: ModelShape) -> list[IoTensor]:
    """List the inputs of `prefill.onnx` of a priced artifact in order."""
    return [*dense_inputs(shape), IoTensor(NUM_LOGITS, "int64", (1,), default=True)]


def priced_decode_inputs(shape: ModelShape, *, explicit: bool = False) -> list[IoTensor]:
    """List the inputs of `decode.onnx` of a priced artifact in order; `explicit`: of `decode_explicit.onnx`."""
    return [*dense_inputs(shape), IoTensor(PRICE, "float32", (1,), default=not explicit)]


def priced_decode_outputs(shape: ModelShape, *, counted: int = 0, listed: int = 0) -> list[IoTensor]:
    """List the outputs of `decode.onnx` of a priced artifact in order.

    No artifact has counts (of `counted` matrices) and lists (of `listed` rows).
    """
    counts = [IoTensor(KEPT_ROWS, "int64", (counted, "sequence_length"))] if counted else []
    lists = [IoTensor(READ_ROWS, "bool", (1, "sequence_length", listed))] if listed else []
    return [*decode_outputs(shape), *counts, *lists]


def graph_io(shape: ModelShape, layout: str, *, two_levels: bool) -> dict[str, tuple[list[IoTensor], list[IoTensor]]]:
    """List inputs and outputs of each graph of an artifact by file name; `two_levels` only matters for indexed
    artifacts."""
    if layout == "priced":
        outputs = priced_decode_outputs(shape)
        return {
            PREFILL_FILE: (priced_prefill_inputs(shape), dense_outputs(shape)),
            DECODE_FILE: (priced_decode_inputs(shape), outputs),
            EXPLICIT_DECODE_FILE: (priced_decode_inputs(shape, explicit=True), outputs),
        }
    outputs = decode_outputs(shape)
    return {
        PREFILL_FILE: (prefill_inputs(shape), prefill_outputs(shape)),
        DECODE_FILE: (decode_inputs(shape, two_levels=two_levels), outputs),
        EXPLICIT_DECODE_FILE: (decode_inputs(shape, two_levels=two_levels, explicit=True), outputs),
    }


def dense_inputs(shape: ModelShape) -> list[IoTensor]:
    """List the inputs of the plain dense graph, which `bench` derives as a baseline; it is in no artifact."""
    return [*_token_inputs(), *_past(shape)]


def dense_outputs(shape: ModelShape) -> list[IoTensor]:
    """List the outputs of the plain dense graph. It returns logits only for a prompt's last token."""
    logits = IoTensor(LOGITS, "float32", (1, 1, shape.vocab_size))
    return [logits, *_present(shape)]


def _token_inputs() -> list[IoTensor]:
    return [
        IoTensor(INPUT_IDS, "int64", (1, "sequence_length")),
        IoTensor(ATTENTION_MASK, "int64", (1, "total_sequence_length")),
    ]


def _caches(shape: ModelShape) -> list[CacheTensor]:
    return [cache for layer in range(shape.num_layers) for cache in layer_caches(shape, layer)]


def _past(shape: ModelShape) -> list[IoTensor]:
    return [IoTensor(cache.past, cache.dtype, cache.axes("past_sequence_length")) for cache in _caches(shape)]


def _present(shape: ModelShape) -> list[IoTensor]:
    return [IoTensor(cache.present, cache.dtype, cache.axes("total_sequence_length")) for cache in _caches(shape)]
