"""The description of a decoder: a frozen dataclass that every later step works from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tda_export.errors import TdaError, first_line

HEAD_SIZE_MULTIPLE = 16  # ONNX Runtime's GroupQueryAttention fails or is silently slow on other head sizes

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeScaling = Literal["default", "linear", "llama3", "longrope", "yarn"]
NormKind = Literal["rms", "layer"]
# Places of the norm of a branch f (attention or FFN) beside the residual x: `before` x + f(norm(x)), `after` norm(x +
# f(x)), `output` x + norm(f(x)), `both` x + norm(f(norm(x))).
NormPlacement = Literal["before", "after", "output", "both"]
QkNorm = Literal["none", "head", "whole"]
# How the checkpoint holds Q, K and V: three tensors, one below the other in one, or head by head in one.
QkvLayout = Literal["separate", "stacked", "by_head"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) with its context-extension scaling.

    `theta` is the base; `factor` and the three `llama3` fields are used by the scalings that name them. `longrope` and
    `yarn` have their own `frequencies` in radians per position, and `attention_factor`, the factor of cos and sin.
    """

    theta: float
    scaling: RopeScaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    frequencies: tuple[float, ...] | None = None
    attention_factor: float = 1.0


@dataclass(frozen=True)
class CheckpointNames:
    """The names of a family's tensors. `{i}` stands for the layer; modules are named without `.weight`.

    `query`, `key` and `value` are one module where they are packed, and so are `gate` and `up`. Names of parts that a
    family does not have are not used.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    project_in: str = ""
    project_out: str = ""
    head: str = "lm_head"
    final_norm: str = "model.norm"
    attention_norm: str = "model.layers.{i}.input_layernorm"
    query: str = "model.layers.{i}.self_attn.q_proj"
    key: str = "model.layers.{i}.self_attn.k_proj"
    value: str = "model.layers.{i}.self_attn.v_proj"
    query_norm: str = "model.layers.{i}.self_attn.q_norm"
    key_norm: str = "model.layers.{i}.self_attn.k_norm"
    attention_out: str = "model.layers.{i}.self_attn.o_proj"
    attention_output_norm: str = ""
    ffn_norm: str = "model.layers.{i}.post_attention_layernorm"
    gate: str = "model.layers.{i}.mlp.gate_proj"
    up: str = "model.layers.{i}.mlp.up_proj"
    down: str = "model.layers.{i}.mlp.down_proj"
    ffn_output_norm: str = ""


SPEC_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "ffn_size",
    "max_positions",
)
SHORTEST_CONTEXT = 3  # a first token, which never counts, another one, and one token of an answer


@dataclass(frozen=True)
class DecoderSpec:
    """The architecture of a decoder-only model; defaults are Llama's.

    Sizes in elements: M `hidden_size`, L `num_layers`, H `num_heads`, KV `num_kv_heads`, D `head_size`,
    F `ffn_size`, V `vocab_size`. `sliding_windows[i]` is how many positions layer i attends to, itself
    included, or None for all. `max_positions` is the longest context in tokens.

    `gated`: the FFN is down(act(gate x) * up x), otherwise down(act(up x)). `norm_offset` is added to the weights of
    RMS norms. With `parallel_residual` attention and FFN read the same x and are added together. `rope` is None where
    positions are learned: position 0 is row `position_offset` of their table; `local_rope` replaces it in layers with a
    window; `rope_layers[i]` says whether layer i rotates at all (None: every one); only the first `rotary_size`
    elements of a head are rotated (None: all). `embedding_size` is the width of embeddings that a projection brings to
    M and back (None: M). Scales multiply embeddings, a branch's addition to the residual, attention scores (None:
    D^-0.5) and logits; a softcap c turns x into c tanh(x / c). `qk_norm`: RMS norms of queries and keys, of each head
    or of all heads together. `transposed_linears`: linear weights in the checkpoint are [in, out].
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int
    activation: Activation
    norm_epsilon: float
    rope: RopeSpec | None
    max_positions: int
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    attention_out_bias: bool
    ffn_bias: bool
    tied_head: bool
    names: CheckpointNames = CheckpointNames()
    gated: bool = True
    norm: NormKind = "rms"
    norm_offset: float = 0.0
    norm_placement: NormPlacement = "before"
    final_norm: bool = True
    parallel_residual: bool = False
    position_offset: int | None = None
    local_rope: RopeSpec | None = None
    rope_layers: tuple[bool, ...] | None = None
    rotary_size: int | None = None
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    qk_norm: QkNorm = "none"
    qkv_layout: QkvLayout = "separate"
    transposed_linears: bool = False

    def __post_init__(self) -> None:
        for size in SPEC_SIZES:
            if getattr(self, size) < 1:
                raise TdaError(
                    f"{self.architecture}: {size} is {getattr(self, size)}, which is not possible. Check config.json."
                )
        if self.max_positions < SHORTEST_CONTEXT:
            raise TdaError(
                f"{self.architecture}: a context of {self.max_positions} tokens has no room for a prompt and an answer."
                " Check max_position_embeddings in config.json."
            )
        if any(window is not None and window < 1 for window in self.sliding_windows):
            raise TdaError(f"{self.architecture}: a sliding window is under 1. Check sliding_window in config.json.")
        if self.head_size % HEAD_SIZE_MULTIPLE:
            raise TdaError(
                f"{self.architecture} with head size {self.head_size} is not supported: ONNX Runtime's attention "
                f"needs a multiple of {HEAD_SIZE_MULTIPLE}. Use a model whose head size is one."
            )
        if self.num_heads % self.num_kv_heads:
            raise TdaError(
                f"{self.architecture}: {self.num_heads} attention heads cannot share {self.num_kv_heads} key-value "
                "heads evenly. Check config.json."
            )
        if self.rotary_size is not None and (self.rotary_size % 2 or not 0 < self.rotary_size <= self.head_size):
            raise TdaError(
                f"{self.architecture}: {self.rotary_size} rotated elements in a head of {self.head_size} "
                "are not possible. Check the partial rotary factor in config.json."
            )

    @property
    def ffn_parts(self) -> tuple[str, ...]:
        """The FFN's matrices, in the order in which a neuron's rows are read."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    @property
    def packed_gate(self) -> bool:
        """Whether gate and up are halves of one module."""
        return self.gated and self.names.gate == self.names.up

    @property
    def embedding_width(self) -> int:
        """The number of elements of an embedding."""
        return self.embedding_size or self.hidden_size

    def layer_rope(self, layer: int) -> RopeSpec | None:
        """Return the rotary embedding of a layer, None where it has none."""
        if self.rope_layers is not None and not self.rope_layers[layer]:
            return None
        if self.local_rope is not None and self.sliding_windows[layer] is not None:
            return self.local_rope
        return self.rope


def spec_from_dict(content: dict[str, Any]) -> DecoderSpec:
    """Read a spec back from a manifest's plain data; older manifests lack fields that have a default.

    Raises:
        TdaError: The content is not a spec of this version.
    """
    try:
        fields = dict(content)
        fields["rope"], fields["local_rope"] = _rope(fields["rope"]), _rope(fields.get("local_rope"))
        fields["names"] = CheckpointNames(**fields["names"])
        fields["sliding_windows"] = tuple(fields["sliding_windows"])
        rotates = fields.get("rope_layers")
        fields["rope_layers"] = None if rotates is None else tuple(rotates)
        return DecoderSpec(**fields)
    except (KeyError, TypeError) as error:
        raise TdaError(f"The manifest's spec is incomplete ({first_line(error)}). Build the artifact again.") from error
    except TdaError as error:  # replaces a hint that is about configurations
        raise TdaError(f"The manifest's spec cannot be built ({error}) Build the artifact again.") from error


def _rope(content: dict[str, Any] | None) -> RopeSpec | None:
    if content is None:
        return None
    frequencies = content.get("frequencies")
    return RopeSpec(**content | {"frequencies": None if frequencies is None else tuple(frequencies)})
