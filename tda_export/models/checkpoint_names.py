"""Names of families' tensors, where they differ from Llama's names."""

from __future__ import annotations

from tda_export.models.spec import CheckpointNames

LLAMA_NAMES = CheckpointNames()
LAYER = "model.layers.{i}."
OPT_LAYER = "model.decoder.layers.{i}."
NEOX_LAYER = "gpt_neox.layers.{i}."
GPT2_LAYER = "transformer.h.{i}."

OPT_NAMES = CheckpointNames(
    embedding="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    final_norm="model.decoder.final_layer_norm",
    attention_norm=OPT_LAYER + "self_attn_layer_norm",
    query=OPT_LAYER + "self_attn.q_proj",
    key=OPT_LAYER + "self_attn.k_proj",
    value=OPT_LAYER + "self_attn.v_proj",
    attention_out=OPT_LAYER + "self_attn.out_proj",
    ffn_norm=OPT_LAYER + "final_layer_norm",
    gate="",
    up=OPT_LAYER + "fc1",
    down=OPT_LAYER + "fc2",
)
NEOX_NAMES = CheckpointNames(
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    attention_norm=NEOX_LAYER + "input_layernorm",
    query=NEOX_LAYER + "attention.query_key_value",
    key=NEOX_LAYER + "attention.query_key_value",
    value=NEOX_LAYER + "attention.query_key_value",
    attention_out=NEOX_LAYER + "attention.dense",
    ffn_norm=NEOX_LAYER + "post_attention_layernorm",
    gate="",
    up=NEOX_LAYER + "mlp.dense_h_to_4h",
    down=NEOX_LAYER + "mlp.dense_4h_to_h",
)
GPT2_NAMES = CheckpointNames(
    embedding="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    attention_norm=GPT2_LAYER + "ln_1",
    query=GPT2_LAYER + "attn.c_attn",
    key=GPT2_LAYER + "attn.c_attn",
    value=GPT2_LAYER + "attn.c_attn",
    attention_out=GPT2_LAYER + "attn.c_proj",
    ffn_norm=GPT2_LAYER + "ln_2",
    gate="",
    up=GPT2_LAYER + "mlp.c_fc",
    down=GPT2_LAYER + "mlp.c_proj",
)
PHI3_NAMES = CheckpointNames(
    query=LAYER + "self_attn.qkv_proj",
    key=LAYER + "self_attn.qkv_proj",
    value=LAYER + "self_attn.qkv_proj",
    gate=LAYER + "mlp.gate_up_proj",
    up=LAYER + "mlp.gate_up_proj",
)
SANDWICH_NAMES = CheckpointNames(
    attention_output_norm=LAYER + "post_attention_layernorm",
    ffn_norm=LAYER + "pre_feedforward_layernorm",
    ffn_output_norm=LAYER + "post_feedforward_layernorm",
)
OLMO2_NAMES = CheckpointNames(
    attention_norm="",
    attention_output_norm=LAYER + "post_attention_layernorm",
    ffn_norm="",
    ffn_output_norm=LAYER + "post_feedforward_layernorm",
)
