"""The table of supported architectures. A family is an entry that says how it differs from a plain Llama.

Each entry reads a transformers configuration (version 5 fields, which transformers fills for older checkpoints too)
into a DecoderSpec. Architectures that the graphs cannot express are refused by name (`unsupported.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tda_export.errors import TdaError
from tda_export.models.checkpoint_names import (
    GPT2_NAMES,
    LLAMA_NAMES,
    NEOX_NAMES,
    OLMO2_NAMES,
    OPT_NAMES,
    PHI3_NAMES,
    SANDWICH_NAMES,
)
from tda_export.models.rope import read_rope
from tda_export.models.spec import Activation, CheckpointNames, DecoderSpec, RopeSpec
from tda_export.models.unsupported import refuse_architecture, refuse_features

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _no(config: Any) -> bool:
    return False


def _yes(config: Any) -> bool:
    return True


def _attention_bias(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False))


def _mlp_bias(config: Any) -> bool:
    return bool(getattr(config, "mlp_bias", False))


def _enable_bias(config: Any) -> bool:
    return bool(config.enable_bias)


def _no_window(config: Any, layer: int) -> int | None:
    return None


def _window_of_config(config: Any, layer: int) -> int | None:
    return getattr(config, "sliding_window", None)


def _window_of_layer_type(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


def _nothing(config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Functions read parts of a configuration; `differences` are fields of DecoderSpec. `activation`, `ffn_size` and
    `epsilon` name the fields of the configuration that hold them.
    """

    qkv_bias: Callable[[Any], bool] = _attention_bias
    attention_out_bias: Callable[[Any], bool] = _attention_bias
    ffn_bias: Callable[[Any], bool] = _no
    sliding_window: Callable[[Any, int], int | None] = _no_window  # (config, layer) -> window
    differences: Callable[[Any], dict[str, Any]] = _nothing
    names: CheckpointNames = LLAMA_NAMES
    activation: str = "hidden_act"
    ffn_size: str = "intermediate_size"
    epsilon: str = "rms_norm_eps"
    rotary: bool = True
    partial_rotary: bool = False


def _opt(config: Any) -> dict[str, Any]:
    before = bool(config.do_layer_norm_before)
    width = config.word_embed_proj_dim
    return {
        "gated": False,
        "norm": "layer",
        "norm_placement": "before" if before else "after",
        "final_norm": before and not getattr(config, "_remove_final_layer_norm", False),
        "norm_epsilon": 1e-5,
        "position_offset": 2,
        "embedding_size": None if width == config.hidden_size else width,
    }


def _gpt2(config: Any) -> dict[str, Any]:
    return {
        "gated": False,
        "norm": "layer",
        "position_offset": 0,
        "qkv_layout": "stacked",
        "transposed_linears": True,
        "attention_scale": None if config.scale_attn_weights else 1.0,
        "ffn_size": config.n_inner or 4 * config.n_embd,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    return {
        "gated": False,
        "norm": "layer",
        "qkv_layout": "by_head",
        "parallel_residual": bool(config.use_parallel_residual),
    }


def _gemma(config: Any) -> dict[str, Any]:
    return {"norm_offset": 1.0, "embedding_scale": float(config.hidden_size) ** 0.5}


def _gemma2(config: Any) -> dict[str, Any]:
    return _gemma(config) | {
        "norm_placement": "both",
        "attention_scale": float(config.query_pre_attn_scalar) ** -0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logits_softcap": config.final_logit_softcapping,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    # Its attention ignores attn_logit_softcapping.
    return _gemma2(config) | {"attention_softcap": None, "qk_norm": "head"}


def _granite(config: Any) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attention_scale": float(config.attention_multiplier),
        "logits_scale": 1.0 / float(config.logits_scaling),
    }


GEMMA_ACTIVATION = "hidden_activation"

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(ffn_bias=_mlp_bias),
    "MistralForCausalLM": Family(_no, _no, sliding_window=_window_of_config),
    "Qwen2ForCausalLM": Family(_yes, _no, sliding_window=_window_of_layer_type),
    "Qwen3ForCausalLM": Family(sliding_window=_window_of_layer_type, differences=lambda config: {"qk_norm": "head"}),
    "GemmaForCausalLM": Family(differences=_gemma),
    "Gemma2ForCausalLM": Family(
        sliding_window=_window_of_layer_type, differences=_gemma2, names=SANDWICH_NAMES, activation=GEMMA_ACTIVATION
    ),
    "Gemma3ForCausalLM": Family(
        sliding_window=_window_of_layer_type, differences=_gemma3, names=SANDWICH_NAMES, activation=GEMMA_ACTIVATION
    ),
    "Phi3ForCausalLM": Family(
        _no,
        _no,
        sliding_window=_window_of_config,
        differences=lambda config: {"qkv_layout": "stacked"},
        names=PHI3_NAMES,
        partial_rotary=True,
    ),
    "SmolLM3ForCausalLM": Family(
        ffn_bias=_mlp_bias,
        sliding_window=_window_of_layer_type,
        differences=lambda config: {"rope_layers": tuple(bool(rotates) for rotates in config.no_rope_layers)},
    ),
    "Olmo2ForCausalLM": Family(
        differences=lambda config: {"norm_placement": "output", "qk_norm": "whole"}, names=OLMO2_NAMES
    ),
    "GraniteForCausalLM": Family(ffn_bias=_mlp_bias, differences=_granite),
    "OPTForCausalLM": Family(
        _enable_bias,
        _enable_bias,
        _enable_bias,
        differences=_opt,
        names=OPT_NAMES,
        activation="activation_function",
        ffn_size="ffn_dim",
        rotary=False,
    ),
    "GPTNeoXForCausalLM": Family(
        ffn_bias=_yes,
        differences=_gpt_neox,
        names=NEOX_NAMES,
        epsilon="layer_norm_eps",
        partial_rotary=True,
    ),
    "GPT2LMHeadModel": Family(
        _yes,
        _yes,
        _yes,
        differences=_gpt2,
        names=GPT2_NAMES,
        activation="activation_function",
        ffn_size="n_inner",
        epsilon="layer_norm_epsilon",
        rotary=False,
    ),
}


def check_architecture(architecture: str) -> Family:
    """Return the entry of a supported architecture.

    Raises:
        TdaError: It is not supported; the message says which of its features the graphs lack, or names the supported
            ones.
    """
    if architecture not in FAMILIES:
        refuse_architecture(architecture, FAMILIES)
    return FAMILIES[architecture]


def read_spec(config: Any) -> DecoderSpec:
    """Read a transformers configuration into a DecoderSpec.

    Args:
        config: A `transformers.PretrainedConfig`.

    Returns:
        The description of the architecture.

    Raises:
        TdaError: The architecture, or a feature that the configuration asks for, is not supported.
    """
    architecture = _architecture(config)
    family = check_architecture(architecture)
    if getattr(config, "quantization_config", None) is not None and not _is_gguf(config):
        raise TdaError(
            "Quantised checkpoints are not supported: give the unquantised safetensors checkpoint or a GGUF."
        )
    refuse_features(config, architecture)
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        raise TdaError(
            f"{architecture} with activation {activation!r} is not supported; "
            f"supported are {', '.join(sorted(ACTIVATIONS))}. Choose another model."
        )
    layers = config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    windows = tuple(family.sliding_window(config, layer) for layer in range(layers))
    fields: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_size": head_size,
        "ffn_size": getattr(config, family.ffn_size),
        "activation": ACTIVATIONS[activation],
        "norm_epsilon": getattr(config, family.epsilon, None),
        "max_positions": config.max_position_embeddings,
        "sliding_windows": windows,
        "qkv_bias": family.qkv_bias(config),
        "attention_out_bias": family.attention_out_bias(config),
        "ffn_bias": family.ffn_bias(config),
        "tied_head": bool(config.tie_word_embeddings),
        "names": family.names,
    }
    rope = _rope_fields(config, architecture, head_size) if family.rotary else {"rope": None}
    return DecoderSpec(**fields | rope | family.differences(config))


def _rope_fields(config: Any, architecture: str, head_size: int) -> dict[str, Any]:
    """Read the rotary embeddings: one for all layers, or separate ones for layers with and without a window."""
    parameters = config.rope_parameters
    if "full_attention" in parameters:
        kinds = ("full_attention", "sliding_attention")
        rope, local = (read_rope(config, parameters[kind], architecture, kind) for kind in kinds)
        return {"rope": rope, "local_rope": None if local == rope else local}
    rope = read_rope(config, parameters, architecture)
    share = parameters.get("partial_rotary_factor") or 1.0
    if share != 1.0 and not FAMILIES[architecture].partial_rotary:
        raise TdaError(f"{architecture} with partial rotary embeddings is not supported. Choose another model.")
    size = int(head_size * share)
    return {"rope": rope, "rotary_size": None if size == head_size else size} | _longest_context(config, rope)


def _longest_context(config: Any, rope: RopeSpec) -> dict[str, Any]:
    """Limit longrope's context: it has other frequencies beyond the original context, and the graphs have only the
    short ones."""
    if rope.scaling != "longrope":
        return {}
    return {"max_positions": min(config.max_position_embeddings, rope.original_max_positions)}


def _architecture(config: Any) -> str:
    if getattr(config, "architectures", None):
        return str(config.architectures[0])
    # GGUF files and hand-written configurations name only the model type.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))


def _is_gguf(config: Any) -> bool:
    method = getattr(config.quantization_config, "quant_method", None) or (
        config.quantization_config.get("quant_method") if isinstance(config.quantization_config, dict) else None
    )
    return str(getattr(method, "value", method)) == "gguf"
