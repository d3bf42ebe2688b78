"""What a decoder is: the frozen description that every later step works from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tda_export.errors import TdaError

HEAD_SIZE_MULTIPLE = 16  # ONNX Runtime's GroupQueryAttention fails or is silently slow on other head sizes

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeScaling = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) with its context-extension scaling.

    `theta` is the base; `factor` and the three `llama3` fields are used by the scalings that name them.
    """

    theta: float
    scaling: RopeScaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0


@dataclass(frozen=True)
class CheckpointNames:
    """Where a family keeps its tensors. `{i}` stands for the layer; linear layers are named without `.weight`."""

    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    final_norm: str = "model.norm"
    attention_norm: str = "model.layers.{i}.input_layernorm"
    query: str = "model.layers.{i}.self_attn.q_proj"
    key: str = "model.layers.{i}.self_attn.k_proj"
    value: str = "model.layers.{i}.self_attn.v_proj"
    attention_out: str = "model.layers.{i}.self_attn.o_proj"
    ffn_norm: str = "model.layers.{i}.post_attention_layernorm"
    gate: str = "model.layers.{i}.mlp.gate_proj"
    up: str = "model.layers.{i}.mlp.up_proj"
    down: str = "model.layers.{i}.mlp.down_proj"


@dataclass(frozen=True)
class DecoderSpec:
    """The architecture of a decoder-only model with RMS norms, rotary attention and a gated FFN.

    Sizes in elements: M `hidden_size`, L `num_layers`, H `num_heads`, KV `num_kv_heads`, D `head_size`,
    F `ffn_size`, V `vocab_size`. `sliding_windows[i]` is how many positions layer i attends to, itself
    included, or None for all. `max_positions` is the longest context in tokens.
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
    rope: RopeSpec
    max_positions: int
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    attention_out_bias: bool
    ffn_bias: bool
    tied_head: bool
    names: CheckpointNames = CheckpointNames()

    def __post_init__(self) -> None:
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


def spec_from_dict(content: dict[str, Any]) -> DecoderSpec:
    """Read a spec back from plain data, as a manifest keeps it.

    Raises:
        TdaError: It is no spec of this version.
    """
    try:
        fields = dict(content)
        fields["rope"] = RopeSpec(**fields["rope"])
        fields["names"] = CheckpointNames(**fields["names"])
        fields["sliding_windows"] = tuple(fields["sliding_windows"])
        return DecoderSpec(**fields)
    except (KeyError, TypeError) as error:
        raise TdaError(f"The manifest's spec is incomplete ({error}). Build the artifact again.") from error
