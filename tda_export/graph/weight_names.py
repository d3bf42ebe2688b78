"""The names of tensors in weights.bin, a part of the contract (`contract.py` exports them too)."""

from __future__ import annotations

# Weights in weights.bin. FFN weights are neuron-major: row i is neuron i.
EMBEDDING = "embedding"
HEAD = "head"
POSITIONS = "positions"  # learned, [positions, M]
PROJECT_IN = "project_in"
PROJECT_OUT = "project_out"
FINAL_NORM = "final_norm"
COS_CACHE = "cos_cache"
SIN_CACHE = "sin_cache"
ROPE_CACHES = (COS_CACHE, SIN_CACHE)
LOCAL_ROPE_CACHES = ("cos_cache.local", "sin_cache.local")  # of layers with a window, if they have their own tables


def linear_weight(layer: int, stored: str) -> str:
    """Name a matrix of a layer: q, k, v, o, gate, up, down, or a site whose parts lie side by side (qkv, gate_up)."""
    if stored in ("q", "k", "v", "qkv"):
        return f"layers.{layer}.attention.{stored}"
    return attention_out_weight(layer) if stored == "o" else ffn_weight(layer, stored)


def in_a_layer(name: str, layer: int | None = None) -> bool:
    """Return whether a weight belongs to a layer, or to the given one. Of the matrices, only linears do."""
    return name.startswith("layers." if layer is None else f"layers.{layer}.")


def weights_of(stored: str, layers: int) -> list[str]:
    """Name the matrices of all layers that `stored` names (`linear_weight`), or the one head."""
    return [HEAD] if stored == HEAD else [linear_weight(layer, stored) for layer in range(layers)]


def linear_bias(matrix: str) -> str:
    """Name the bias of a matrix."""
    return f"{matrix}.bias"


def row_price(matrix: str) -> str:
    """Name the worth of a matrix's rows: the expected squared gradient of the input per byte, float32 [in]."""
    return f"{matrix}.row_price"


def attention_norm(layer: int) -> str:
    return f"layers.{layer}.attention.norm"


def norm_bias(norm: str) -> str:
    """Name the bias of a norm, given the name of its weight."""
    return f"{norm}.bias"


def query_norm(layer: int) -> str:
    return f"layers.{layer}.attention.query_norm"


def key_norm(layer: int) -> str:
    return f"layers.{layer}.attention.key_norm"


def attention_output_norm(layer: int) -> str:
    return f"layers.{layer}.attention.output_norm"


def qkv_weight(layer: int) -> str:
    return f"layers.{layer}.attention.qkv"


def qkv_bias(layer: int) -> str:
    return f"layers.{layer}.attention.qkv.bias"


def attention_out_weight(layer: int) -> str:
    return f"layers.{layer}.attention.out"


def attention_out_bias(layer: int) -> str:
    return f"layers.{layer}.attention.out.bias"


def ffn_norm(layer: int) -> str:
    return f"layers.{layer}.ffn.norm"


def ffn_output_norm(layer: int) -> str:
    return f"layers.{layer}.ffn.output_norm"


def ffn_weight(layer: int, part: str) -> str:
    """Name the weight of `part`: gate, up or down."""
    return f"layers.{layer}.ffn.{part}"


def ffn_bias(layer: int, part: str) -> str:
    return f"layers.{layer}.ffn.{part}.bias"


def neuron_scale(layer: int) -> str:
    """Name the factors that turn a neuron's activated gate into an estimate of its output's length, float32 [F]."""
    return f"layers.{layer}.ffn.neuron_scale"


def transposed(name: str) -> str:
    """Name the transposed weight of the plain dense graph; no artifact has it."""
    return f"{name}.transposed"


def down_squared_norms(layer: int) -> str:
    """Name the squared lengths of the down columns, float32 [F]: the neurons' weights in the magnitude statistic."""
    return f"layers.{layer}.ffn.down_squared_norms"
