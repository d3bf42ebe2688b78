"""The names of this project's operators (functions in the graphs) and of their inputs.

Like `contract`, this module imports only other names.
"""

from __future__ import annotations

from tda_export.graph.contract import FFN_PARTS

# Model-local functions for which the native library has kernels.
FUNCTION_DOMAIN = "tda"
INDEXED_FFN = "IndexedFFN"
NEURON_STATS = "NeuronStats"
SELECT_MASK = "SelectMask"
TAIL_MEAN = "TailMean"
GREEDY_TOKEN = "GreedyToken"
LINEAR = "Linear"
ADD_NORM = "AddNorm"
ADD_BIAS_NORM = "AddBiasNorm"
ROW_LINEAR = "RowLinear"
CALL_START = "CallStart"
GATED_ACTIVATION = "GatedActivation"
NORM_ROW_LINEAR = "NormRowLinear"
RMS_NORM = "RmsNorm"
RMS_ROW_LINEAR = "RmsRowLinear"
GATED_ROW_LINEAR = "GatedRowLinear"
GATED_ROW_LINEAR_ADD = "GatedRowLinearAdd"
ROW_LINEAR_ADD = "RowLinearAdd"
ATTENTION = "Attention"
SUBGRAPH = "Subgraph"  # other nodes of this domain, one after another (`graph/subgraph.py`)

# The price of a call, float32 [1], the tokens of past and call, int64 [1], and the index of the last, int32 [1].
CALL_START_OUTPUTS = ("chosen", "total", "last_index")

# Attention's inputs by position, which are GroupQueryAttention's. Where `query` holds queries, keys and values side by
# side, `key` and `value` are absent; without rotary embedding the tables are absent. Attributes: those of
# GroupQueryAttention, all of them given, and `width`, H D.
ATTENTION_INPUTS = (
    "query",  # [1, S, H D], or with keys and values [1, S, (H + 2 KV) D]
    "key",  # [1, S, KV D]
    "value",  # [1, S, KV D]
    "past_key",  # [1, KV, P, D]
    "past_value",  # [1, KV, P, D]
    "last_index",  # int32 [1]: the tokens of past and call together, minus one
    "buffer",  # int32 scalar: T, the length of the attention mask
    "cos_cache",  # [positions, D / 2]
    "sin_cache",  # [positions, D / 2]
)


ATTENTION_OUTPUTS = ("attended", "present_key", "present_value")


# Attention to a cache of float16 beside float32 (`kv_formats.KV_FLOAT16`), with the inputs and outputs of Attention,
# and to one of codes (`kv_formats.KV_INT8`). Attributes: those of GroupQueryAttention, all of them given.
ATTENTION_16 = "Attention16"
ATTENTION_8 = "Attention8"
ATTENTION_8_INPUTS = (
    *ATTENTION_INPUTS[:3],
    "past_key",  # int8 [1, KV, P, D]
    "past_value",  # int8 [1, KV, P, D]
    "past_key_scale",  # float32 [1, KV, P]
    "past_value_scale",  # float32 [1, KV, P]
    *ATTENTION_INPUTS[5:],
)
ATTENTION_8_OUTPUTS = (*ATTENTION_OUTPUTS, "present_key_scale", "present_value_scale")
ROTARY_TABLES = ATTENTION_INPUTS[-2:]


class RowLinearInput:
    """The inputs of RowLinear by position; the bias may be absent."""

    X = "x"  # [.., in]
    WEIGHT = "w"  # [in, out]
    ROW_PRICE = "row_price"  # float32 [in]
    PRICE = "price"  # float32 [1]
    BIAS = "bias"  # [out]


ROW_LINEAR_INPUTS = (
    RowLinearInput.X,
    RowLinearInput.WEIGHT,
    RowLinearInput.ROW_PRICE,
    RowLinearInput.PRICE,
    RowLinearInput.BIAS,
)


# Products with integer formats, named by bits: RowLinear4 and RowLinear8 for input-major matrices, Linear4 and Linear8
# for output-major ones. Attributes: `columns` of the matrix, `group`, and `early`.
INTEGER_BITS = (4, 8)


def row_linear_of(bits: int) -> str:
    """Name the operator that multiplies as RowLinear does, by codes of `bits` bits."""
    return f"{ROW_LINEAR}{bits}"


def linear_of(bits: int) -> str:
    """Name the operator that multiplies as Linear does, by codes of `bits` bits."""
    return f"{LINEAR}{bits}"


class IntegerInput:
    """The inputs of products with integer formats. The bias may be absent. Linear4 and Linear8 have no prices and no
    bias."""

    X = "x"  # [.., in]
    WEIGHT = "w"  # codes, uint8 [rows, bytes]
    SCALES = "scales"  # float16 [rows, groups]
    ZERO_POINTS = "zero_points"  # uint8 [rows, bytes]
    ROW_PRICE = "row_price"  # float32 [in]
    PRICE = "price"  # float32 [1]
    BIAS = "bias"  # [out]


INTEGER_LINEAR_INPUTS = (IntegerInput.X, IntegerInput.WEIGHT, IntegerInput.SCALES, IntegerInput.ZERO_POINTS)
INTEGER_ROW_LINEAR_INPUTS = (*INTEGER_LINEAR_INPUTS, IntegerInput.ROW_PRICE, IntegerInput.PRICE, IntegerInput.BIAS)

# NormRowLinear and GatedRowLinear, and their forms for integers, take the inputs of AddNorm or GatedActivation, then
# those of RowLinear after x. They give what RowLinear gives; NormRowLinear also gives the sum of x and residual. Their
# attributes are those of both.
NORM_INPUTS = ("x", "residual", "norm_weight")  # [.., in] twice, [in]
GATED_INPUTS = ("gate", "up")  # [.., in] twice; without `up`, gate holds both side by side, [.., 2 in]

# RowLinearAdd and GatedRowLinearAdd, and their forms, have one more input, the first one: `residual` [.., out]. It is
# added to the result once that is rounded to its dtype. They give the sum and its square parts, float32
# [.., out / SQUARE_COLUMNS]: the sums of the squares of so many neighbouring columns. RmsRowLinear takes such a sum and
# its square parts in the place of x and residual; its attributes are those of NormRowLinear. RmsNorm, for graphs that
# need the norm itself, gives no more than that.
RESIDUAL = "residual"
RMS_INPUTS = ("x", "squares", "norm_weight")
SQUARE_COLUMNS = 32


class FfnInput:
    """The inputs of IndexedFFN; a part is gate, up or down."""

    X = "x"  # [.., M]
    MASK_INDICES = "mask_indices"  # int32 [K]
    NEURON_SCALE = "neuron_scale"  # float32 [F]
    TOKEN_THRESHOLDS = "token_thresholds"  # float32 [L]

    @staticmethod
    def weight(part: str) -> str:
        """Name the neuron-major weights, [F, M]."""
        return f"w_{part}"

    @staticmethod
    def bias(part: str) -> str:
        """Name a bias: [F], or [M] for down."""
        return f"b_{part}"


# IndexedFFN's inputs by position. Those that a model does not have stay empty. Attributes: `activation`, `gated` (1
# where there are gates), `layer` (the entry of token_thresholds to use), and `early` (of this and other functions): 1
# where all inputs except activations are constants or inputs of the graph, so that a kernel may read them early.
INDEXED_FFN_INPUTS = (
    FfnInput.X,
    FfnInput.MASK_INDICES,
    *(FfnInput.weight(part) for part in FFN_PARTS),
    *(FfnInput.bias(part) for part in FFN_PARTS),
    FfnInput.NEURON_SCALE,
    FfnInput.TOKEN_THRESHOLDS,
)
