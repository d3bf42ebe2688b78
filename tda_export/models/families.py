"""The table of supported architectures. A family is an entry that says how it differs from a plain Llama.

Each reader turns a transformers configuration (version 5 fields, which transformers fills for older
checkpoints too) into a DecoderSpec, and refuses what the graphs cannot express by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tda_export.errors import TdaError
from tda_export.models.spec import Activation, DecoderSpec, RopeSpec

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu"}


@dataclass(frozen=True)
class Family:
    """How a family reads the parts of a configuration in which it differs from Llama."""

    qkv_bias: Callable[[Any], bool]
    attention_out_bias: Callable[[Any], bool]
    ffn_bias: Callable[[Any], bool]
    sliding_window: Callable[[Any, int], int | None]  # (config, layer) -> window


def _no(config: Any) -> bool:
    return False


def _attention_bias(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False))


def _mlp_bias(config: Any) -> bool:
    return bool(getattr(config, "mlp_bias", False))


def _no_window(config: Any, layer: int) -> int | None:
    return None


def _window_of_config(config: Any, layer: int) -> int | None:
    return getattr(config, "sliding_window", None)


def _window_of_layer_type(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_attention_bias, _attention_bias, _mlp_bias, _no_window),
    "MistralForCausalLM": Family(_no, _no, _no, _window_of_config),
    "Qwen2ForCausalLM": Family(lambda config: True, _no, _no, _window_of_layer_type),
}


def check_architecture(architecture: str) -> Family:
    """Return the entry of a supported architecture.

    Raises:
        TdaError: It is not supported; the message names those that are.
    """
    if architecture not in FAMILIES:
        raise TdaError(
            f"Architecture {architecture} is not supported; supported are {', '.join(sorted(FAMILIES))}. "
            "Choose a model of one of these."
        )
    return FAMILIES[architecture]


def read_spec(config: Any) -> DecoderSpec:
    """Read a transformers configuration into a DecoderSpec.

    Args:
        config: A `transformers.PretrainedConfig`.

    Returns:
        The description of the architecture.

    Raises:
        TdaError: The architecture, its activation, its rope scaling or its quantisation is not supported.
    """
    architecture = _architecture(config)
    family = check_architecture(architecture)
    if getattr(config, "quantization_config", None) is not None and not _is_gguf(config):
        raise TdaError(
            "Quantised checkpoints are not supported: give the unquantised safetensors checkpoint or a GGUF."
        )
    if config.hidden_act not in ACTIVATIONS:
        raise TdaError(
            f"{architecture} with activation {config.hidden_act!r} is not supported; "
            f"supported are {', '.join(sorted(ACTIVATIONS))}."
        )
    layers = config.num_hidden_layers
    return DecoderSpec(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn_size=config.intermediate_size,
        activation=ACTIVATIONS[config.hidden_act],
        norm_epsilon=config.rms_norm_eps,
        rope=_read_rope(config, architecture),
        max_positions=config.max_position_embeddings,
        sliding_windows=tuple(family.sliding_window(config, layer) for layer in range(layers)),
        qkv_bias=family.qkv_bias(config),
        attention_out_bias=family.attention_out_bias(config),
        ffn_bias=family.ffn_bias(config),
        tied_head=bool(config.tie_word_embeddings),
    )


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


def _read_rope(config: Any, architecture: str) -> RopeSpec:
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise TdaError(f"{architecture} with partial rotary embeddings is not supported.")
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, "linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta,
            "llama3",
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
    raise TdaError(
        f"{architecture} with rope scaling {kind!r} is not supported; supported are default, linear and llama3."
    )
