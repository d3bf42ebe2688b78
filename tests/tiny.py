"""Small random models with every feature switched on, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tda_export.bench.random_model import BYTE_VOCABULARY, byte_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-head": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-linear-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama3-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"head_dim": None, "tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"head_dim": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}


def save_tiny_model(name: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random model of a family of FAMILIES, with its tokenizer, and return its folder.

    Weights are drawn so large that every part matters to the logits: a wrong bias, norm or rotation shows.
    """
    config_class, model_class, features = FAMILIES[name]
    settings = SIZES | {"vocab_size": BYTE_VOCABULARY, "tie_word_embeddings": False} | features | overrides
    if settings.get("head_dim", 0) is None:
        del settings["head_dim"]
    config = config_class(bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
