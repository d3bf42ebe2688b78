"""Small random models with every feature switched on, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
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
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "attention_bias": True,
    "tie_word_embeddings": True,
}
SOFT_CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}  # low enough to have an effect
OPT = {
    "num_key_value_heads": 4,
    "ffn_dim": 96,
    "activation_function": "relu",
    "word_embed_proj_dim": 64,
    "tie_word_embeddings": True,
}
NEOX = {"num_key_value_heads": 4, "hidden_act": "gelu", "rotary_pct": 0.5, "head_dim": None}
GPT2 = {
    "num_key_value_heads": 4,
    "n_inner": 96,
    "n_positions": 512,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
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
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True, "head_dim": 32}),
    "llama-yarn": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "gemma": (
        GemmaConfig,
        GemmaForCausalLM,
        {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True},
    ),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, GEMMA | SOFT_CAPS),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        GEMMA
        | {
            "sliding_window_pattern": 2,
            "final_logit_softcapping": SOFT_CAPS["final_logit_softcapping"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
            },
        },
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": 8, "head_dim": None}),
    "phi4-mini": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "head_dim": None,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.5, 2.0, 2.5, 4.0],
                "long_factor": [2.0, 3.0, 5.0, 7.0, 9.0, 11.0],
            },
        },
    ),
    "smollm3": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 8, "head_dim": None},
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.4,
            "logits_scaling": 0.5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "opt": (OPTConfig, OPTForCausalLM, OPT),
    "opt-post-norm": (OPTConfig, OPTForCausalLM, OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, NEOX),
    "gpt-neox-sequential": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        NEOX | {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
    ),
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2),
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
