"""The features of the tiny models have an effect: without one of them, a family's logits differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tda_export.graph.comparison import FLOAT32_LOGITS
from tests.tiny import FAMILIES, save_tiny_model

SEEN = 10 * FLOAT32_LOGITS  # a difference that no parity test can overlook
NO_ROPE_SCALING = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
# (family, fields of the configuration without the feature)
FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("llama-linear-rope", NO_ROPE_SCALING),
    ("llama3-rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("llama-yarn", NO_ROPE_SCALING),
    ("mistral-window", {"sliding_window": None}),
    ("qwen2-window", {"layer_types": ["full_attention"] * 3}),
    ("gemma", {"hidden_act": "relu"}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 16}),
    ("gemma2", {"layer_types": ["full_attention"] * 3}),
    ("gemma3", {"final_logit_softcapping": None}),
    ("gemma3", {"layer_types": ["full_attention"] * 3}),
    ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
    ("phi3", {"sliding_window": None}),
    ("phi4-mini", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    ("smollm3", {"no_rope_layers": [1, 1, 1]}),
    ("smollm3", {"layer_types": ["full_attention"] * 3}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 0.25}),
    ("granite", {"logits_scaling": 1.0}),
    ("opt", {"activation_function": "gelu"}),
    ("opt-post-norm", {"activation_function": "gelu"}),
    ("gpt-neox", {"use_parallel_residual": False}),
    ("gpt-neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
    ("gpt2", {"scale_attn_weights": False}),
]


@pytest.mark.parametrize(("family", "without"), FEATURES, ids=[f"{family}-{'-'.join(of)}" for family, of in FEATURES])
def test_feature_shows_in_logits(family: str, without: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / "model")
    tokens = torch.arange(3, 43)[None]
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        config = AutoConfig.from_pretrained(folder, **without)
        other = AutoModelForCausalLM.from_pretrained(folder, config=config)(tokens).logits
    assert (expected - other).abs().max() > SEEN


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_random(family: str, tmp_path: Path) -> None:
    """Norm weights are not all 1 and biases not all 0, so that a missing one is noticed."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(family, tmp_path / "model"))
    assert all(parameter.std() > 0.01 for parameter in model.parameters())
