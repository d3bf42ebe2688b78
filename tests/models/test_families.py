"""Configurations of every family, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GgufConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from tda_export.errors import TdaError
from tda_export.models.families import ACTIVATIONS, FAMILIES, check_architecture, read_spec
from tda_export.models.spec import DecoderSpec, RopeSpec
from tests import tiny

SMALL = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def small(config_class: type[PretrainedConfig] = LlamaConfig, **fields: Any) -> PretrainedConfig:
    return config_class(**(SMALL | fields))


# What is read


def test_every_field_of_a_llama_is_read() -> None:
    config = small(head_dim=32, rms_norm_eps=1e-5, tie_word_embeddings=True)
    assert read_spec(config) == DecoderSpec(
        architecture="LlamaForCausalLM",
        vocab_size=40,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        ffn_size=96,
        activation="silu",
        norm_epsilon=1e-5,
        rope=RopeSpec(10000.0),
        max_positions=128,
        sliding_windows=(None, None, None),
        qkv_bias=False,
        attention_out_bias=False,
        ffn_bias=False,
        tied_head=True,
    )


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_spec_describes_the_checkpoint(name: str, tmp_path: Path) -> None:
    """Each bias that the specification names is in the model that transformers builds from it, and no other."""
    from transformers import AutoModelForCausalLM

    folder = tiny.save_tiny_model(name, tmp_path / "model")
    spec = read_spec(AutoConfig.from_pretrained(folder))
    tensors = AutoModelForCausalLM.from_pretrained(folder).state_dict()

    names = spec.names
    biased = {
        names.query: spec.qkv_bias,
        names.key: spec.qkv_bias,
        names.value: spec.qkv_bias,
        names.attention_out: spec.attention_out_bias,
        names.gate: spec.ffn_bias,
        names.up: spec.ffn_bias,
        names.down: spec.ffn_bias,
    }
    for layer in range(spec.num_layers):
        for linear, expected in biased.items():
            assert f"{linear.format(i=layer)}.weight" in tensors
            assert (f"{linear.format(i=layer)}.bias" in tensors) == expected
    sizes = {
        names.query: (spec.num_heads * spec.head_size, spec.hidden_size),
        names.key: (spec.num_kv_heads * spec.head_size, spec.hidden_size),
        names.gate: (spec.ffn_size, spec.hidden_size),
        names.down: (spec.hidden_size, spec.ffn_size),
    }
    for linear, shape in sizes.items():
        assert tuple(tensors[f"{linear.format(i=0)}.weight"].shape) == shape
    assert tuple(tensors[f"{names.embedding}.weight"].shape) == (spec.vocab_size, spec.hidden_size)


def test_every_family_has_a_tiny_model() -> None:
    classes = {model_class.__name__ for _, model_class, _ in tiny.FAMILIES.values()}
    assert classes == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (small(LlamaConfig), (None, None, None)),
        (small(MistralConfig, sliding_window=8), (8, 8, 8)),
        (small(MistralConfig, sliding_window=None), (None, None, None)),
        (small(Qwen2Config), (None, None, None)),
        (small(Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1), (None, 8, 8)),
        (small(Qwen2Config, use_sliding_window=False, sliding_window=8, max_window_layers=1), (None, None, None)),
    ],
    ids=["llama", "mistral", "mistral-none", "qwen2", "qwen2-window", "qwen2-window-off"],
)
def test_sliding_windows(config: PretrainedConfig, windows: tuple[int | None, ...]) -> None:
    assert read_spec(config).sliding_windows == windows


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_names(activation: str) -> None:
    assert read_spec(small(hidden_act=activation)).activation == ACTIVATIONS[activation]


def test_defaults_of_old_checkpoints_are_filled() -> None:
    config = small(num_key_value_heads=None, head_dim=None)
    spec = read_spec(config)
    assert (spec.num_kv_heads, spec.head_size) == (4, 16)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, RopeSpec(10000.0)),
        ({"rope_theta": 5e5}, RopeSpec(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, RopeSpec(5e5, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 64)),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 64)),
    ],
    ids=["nothing", "theta", "version-4-linear", "version-4-llama3", "version-5"],
)
def test_rope_fields_of_transformers_4_and_5(fields: dict[str, Any], expected: RopeSpec, tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(AutoConfig.from_pretrained(tmp_path)).rope == expected


def test_architecture_comes_from_the_model_type_where_none_is_named() -> None:
    config = small(Qwen2Config)
    assert config.architectures is None
    assert read_spec(config).architecture == "Qwen2ForCausalLM"


# What is refused


@pytest.mark.parametrize("architecture", FAMILIES)
def test_supported_architecture_gives_its_entry(architecture: str) -> None:
    assert check_architecture(architecture) is FAMILIES[architecture]


@pytest.mark.parametrize("architecture", ["", "L", "llamaforcausallm", "Gemma3ForCausalLM"])
def test_other_architecture_has_no_entry(architecture: str) -> None:
    with pytest.raises(TdaError, match=rf"^Architecture {architecture} is not supported; supported are Llama"):
        check_architecture(architecture)


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "LlamaForSequenceClassification"])
def test_unsupported_architecture_names_those_supported(architecture: str) -> None:
    message = (
        rf"^Architecture {architecture} is not supported; supported are LlamaForCausalLM, MistralForCausalLM, "
        r"Qwen2ForCausalLM\. Choose a model of one of these\.$"
    )
    with pytest.raises(TdaError, match=message):
        read_spec(small(architectures=[architecture]))


def test_unknown_model_type_is_named() -> None:
    class Unheard(PretrainedConfig):
        model_type = "unheard-of"

    with pytest.raises(TdaError, match=r"^Architecture unheard-of is not supported; supported are Llama"):
        read_spec(Unheard())


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_unsupported_activation(activation: str) -> None:
    message = rf"^LlamaForCausalLM with activation '{activation}' is not supported; supported are silu, swish\.$"
    with pytest.raises(TdaError, match=message):
        read_spec(small(hidden_act=activation))


@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_unsupported_rope_type(kind: str) -> None:
    config = small(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0})
    message = (
        rf"^LlamaForCausalLM with rope scaling '{kind}' is not supported; supported are default, linear and llama3\.$"
    )
    with pytest.raises(TdaError, match=message):
        read_spec(config)


def test_partial_rotary_embeddings() -> None:
    config = small(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    with pytest.raises(TdaError, match=r"^LlamaForCausalLM with partial rotary embeddings is not supported\.$"):
        read_spec(config)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_quantised_checkpoint(method: str) -> None:
    message = r"^Quantised checkpoints are not supported: give the unquantised safetensors checkpoint or a GGUF\.$"
    with pytest.raises(TdaError, match=message):
        read_spec(small(quantization_config={"quant_method": method, "bits": 4}))


@pytest.mark.parametrize("quantisation", [{"quant_method": "gguf"}, GgufConfig(dequantize=True)])
def test_gguf_is_no_quantised_checkpoint(quantisation: Any) -> None:
    config = small()
    config.quantization_config = quantisation
    assert read_spec(config).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("head_size", [8, 24, 40, 100])
def test_head_size_that_is_no_multiple_of_16(head_size: int) -> None:
    message = (
        rf"^LlamaForCausalLM with head size {head_size} is not supported: ONNX Runtime's attention needs a multiple of "
        r"16\. Use a model whose head size is one\.$"
    )
    with pytest.raises(TdaError, match=message):
        read_spec(small(head_dim=head_size))


def test_key_value_heads_that_do_not_divide() -> None:
    message = r"^LlamaForCausalLM: 4 attention heads cannot share 3 key-value heads evenly\. Check config\.json\.$"
    with pytest.raises(TdaError, match=message):
        read_spec(small(num_key_value_heads=3))
