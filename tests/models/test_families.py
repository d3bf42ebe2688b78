"""Configurations of every family, and those that are refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GgufConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    SmolLM3Config,
)

from tda_export.errors import TdaError
from tda_export.graph.storage import Storage
from tda_export.graph.weight_plan import plan_weights
from tda_export.models.families import ACTIVATIONS, FAMILIES, check_architecture, read_spec
from tda_export.models.spec import DecoderSpec, RopeSpec, spec_from_dict
from tda_export.models.weights import SafetensorsWeights, open_safetensors
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


# Accepted


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
    """Exactly the tensors of the checkpoint are read, so a norm or bias missing in the spec is found."""
    folder = tiny.save_tiny_model(name, tmp_path / "model")
    spec, weights = read_spec(AutoConfig.from_pretrained(folder)), open_safetensors(folder)
    seen: set[str] = set()

    class Recorded(SafetensorsWeights):
        def shape(self, name: str) -> tuple[int, ...]:
            seen.add(self._key(name))
            return super().shape(name)

    plan = list(plan_weights(spec, Recorded(folder), Storage("float32")))
    assert seen == set(weights.names)
    assert len({planned.name for planned in plan}) == len(plan)
    for planned in plan:
        assert tuple(planned.load().shape) == planned.shape


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


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + j / 8 for j in range(8)],
    "long_factor": [9.0] * 8,
    "original_max_position_embeddings": 128,
}


def test_longrope_reads_contexts_of_the_original_length_with_their_own_frequencies() -> None:
    fields = {"original_max_position_embeddings": 128, "rope_parameters": LONGROPE, "pad_token_id": 0}
    spec = read_spec(small(Phi3Config, max_position_embeddings=2048, **fields))
    assert spec.max_positions == 128
    assert spec.rope is not None
    assert spec.rope.frequencies == pytest.approx([1e4 ** (-j / 8) / (1 + j / 8) for j in range(8)], rel=1e-6)
    assert spec.rope.attention_factor == pytest.approx((1 + math.log(16) / math.log(128)) ** 0.5)
    # A model with only its original context needs no cut.
    assert read_spec(small(Phi3Config, max_position_embeddings=128, **fields)).max_positions == 128


def test_layers_have_their_own_rotary_embedding_or_none() -> None:
    gemma = read_spec(small(Gemma3TextConfig, head_dim=16, sliding_window=8, sliding_window_pattern=3))
    assert [gemma.layer_rope(layer) for layer in range(3)] == [RopeSpec(1e4), RopeSpec(1e4), RopeSpec(1e6)]
    smol = read_spec(small(SmolLM3Config, no_rope_layers=[1, 0, 1], pad_token_id=0))
    assert [smol.layer_rope(layer) is not None for layer in range(3)] == [True, False, True]
    opt = read_spec(small(OPTConfig, num_key_value_heads=4, word_embed_proj_dim=64))
    assert [opt.layer_rope(layer) for layer in range(3)] == [None, None, None]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_manifest_keeps_the_spec(name: str, tmp_path: Path) -> None:
    spec = read_spec(AutoConfig.from_pretrained(tiny.save_tiny_model(name, tmp_path / "model")))
    assert spec_from_dict(json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


def test_a_manifest_of_before_other_families_is_read() -> None:
    spec = read_spec(small())
    content = json.loads(json.dumps(dataclasses.asdict(spec)))
    defaults = {field.name for field in dataclasses.fields(spec) if field.default is not dataclasses.MISSING}
    old = {name: value for name, value in content.items() if name not in defaults - {"names"}}
    del old["rope"]["frequencies"], old["rope"]["attention_factor"], old["names"]["positions"]
    assert spec_from_dict(old) == spec


# Refused


@pytest.mark.parametrize("architecture", FAMILIES)
def test_supported_architecture_gives_its_entry(architecture: str) -> None:
    assert check_architecture(architecture) is FAMILIES[architecture]


SUPPORTED = ", ".join(sorted(FAMILIES))


@pytest.mark.parametrize("architecture", ["", "L", "llamaforcausallm", "LlamaForSequenceClassification"])
def test_unsupported_architecture_names_those_supported(architecture: str) -> None:
    message = (
        rf"^Architecture {architecture} is not supported; supported are {SUPPORTED}\. Choose a model of one of these\.$"
    )
    with pytest.raises(TdaError, match=message):
        check_architecture(architecture)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("MixtralForCausalLM", "mixture of experts"),
        ("Qwen3MoeForCausalLM", "mixture of experts"),
        ("GptOssForCausalLM", "mixture of experts"),
        ("PhiMoEForCausalLM", "mixture of experts"),
        ("MPTForCausalLM", r"ALiBi \(attention with linear biases\)"),
        ("DeepseekV3ForCausalLM", "latent attention with mixture of experts"),
        ("JambaForCausalLM", "mixture of experts with state-space layers"),
        ("BloomForCausalLM", r"ALiBi \(attention with linear biases\)"),
        ("Mamba2ForCausalLM", "a recurrent or state-space layer"),
        ("T5ForConditionalGeneration", "an encoder beside the decoder"),
        ("Gemma3ForConditionalGeneration", "input other than text"),
        ("Mistral3ForConditionalGeneration", "input other than text"),
    ],
)
def test_what_an_architecture_has_that_we_lack(architecture: str, reason: str) -> None:
    message = rf"^{architecture}: {reason} is not supported\. Choose a model of one of {SUPPORTED}\.$"
    with pytest.raises(TdaError, match=message):
        read_spec(small(architectures=[architecture]))


@pytest.mark.parametrize(
    ("field", "value", "feature"),
    [
        ("num_local_experts", 8, "mixture of experts"),
        ("num_experts", 64, "mixture of experts"),
        ("is_encoder_decoder", True, "an encoder beside the decoder"),
        ("add_cross_attention", True, "an encoder beside the decoder"),
        ("vision_config", {"layers": 2}, "input other than text"),
        ("audio_config", {"layers": 2}, "input other than text"),
        ("alibi", True, r"ALiBi \(attention with linear biases\)"),
        ("use_bidirectional_attention", True, "attention to later tokens"),
        ("scale_attn_by_inverse_layer_idx", True, "attention that is scaled by layer"),
        ("layer_norm_elementwise_affine", False, "norms without weights are"),
    ],
)
def test_what_a_configuration_asks_for_that_we_lack(field: str, value: Any, feature: str) -> None:
    config = small()
    setattr(config, field, value)
    with pytest.raises(TdaError, match=rf"^LlamaForCausalLM: {feature}.* not supported \({field} in config\.json\)\. "):
        read_spec(config)


def test_unknown_model_type_is_named() -> None:
    class Unheard(PretrainedConfig):
        model_type = "unheard-of"

    with pytest.raises(TdaError, match=rf"^Architecture unheard-of is not supported; supported are {SUPPORTED}"):
        read_spec(Unheard())


@pytest.mark.parametrize("activation", ["tanh", "relu2"])
def test_unsupported_activation(activation: str) -> None:
    message = (
        rf"^LlamaForCausalLM with activation '{activation}' is not supported; supported are "
        rf"{', '.join(sorted(ACTIVATIONS))}\. Choose another model\.$"
    )
    with pytest.raises(TdaError, match=message):
        read_spec(small(hidden_act=activation))


def test_unsupported_rope_type() -> None:
    config = small(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    message = (
        r"^LlamaForCausalLM with rope scaling 'dynamic' is not supported; supported are default, linear, llama3, "
        r"longrope and yarn\. Choose another model\.$"
    )
    with pytest.raises(TdaError, match=message):
        read_spec(config)


def test_partial_rotary_embeddings_of_a_family_that_has_none() -> None:
    config = small(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    with pytest.raises(
        TdaError, match=r"^LlamaForCausalLM with partial rotary embeddings is not supported\. Choose another model\.$"
    ):
        read_spec(config)


def test_odd_number_of_rotated_elements() -> None:
    config = small(GPTNeoXConfig, num_key_value_heads=4, rotary_pct=0.45)  # 7 of 16
    message = (
        r"^GPTNeoXForCausalLM: 7 rotated elements in a head of 16 are not possible\. Check the partial rotary factor"
    )
    with pytest.raises(TdaError, match=message):
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
