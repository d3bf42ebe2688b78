"""The configuration with which ONNX Runtime GenAI runs an artifact: a pipeline of prefill and decode.

Prefill runs only for the prompt, decode for the tokens after it. Outputs of prefill that decode needs are forwarded
under decode's names, since GenAI drops a prompt stage's other outputs after the first token. The configuration names no
native library: an artifact is only data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tda_export.graph import contract
from tda_export.graph.decoder import model_shape
from tda_export.models.source import ModelSource

PIPELINE = "decoder-pipeline"
PLAIN = "llama"  # GenAI's name for a decoder of this form, whatever its architecture
ERRORS_ONLY = 3  # ONNX Runtime warns of every input that has a default


def genai_config(source: ModelSource, dtype: str, *, layout: str) -> dict[str, Any]:
    """Return the content of genai_config.json (written for GenAI 0.18).

    Args:
        source: The model.
        dtype: A value of `contract.DTYPES`.
        layout: The artifact's layout. `indexed` is run as a pipeline; `priced` by decode.onnx alone, whose calls
            without a past are dense.

    Returns:
        Plain data. Every output of both graphs is listed, as GenAI requires. Statistics, thresholds and token
        thresholds are not listed as inputs: their defaults apply.
    """
    shape = model_shape(source.spec, dtype)
    tokenizer, eos = source.tokenizer, source.eos_token_ids
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos or None,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(eos), None),
    }
    decoder = {
        "head_size": shape.head_size,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": source.spec.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "session_options": {"log_severity_level": ERRORS_ONLY, "provider_options": []},
        "inputs": {  # the names of these two are also GenAI's keys for them
            contract.INPUT_IDS: contract.INPUT_IDS,
            contract.ATTENTION_MASK: contract.ATTENTION_MASK,
            "past_key_names": _pattern(contract.past_key),
            "past_value_names": _pattern(contract.past_value),
        },
        "outputs": {
            "logits": contract.LOGITS,
            "present_key_names": _pattern(contract.present_key),
            "present_value_names": _pattern(contract.present_value),
        },
    }
    plain = layout == "priced"
    decoder |= {"filename": contract.DECODE_FILE} if plain else {"pipeline": [_stages(shape)]}
    return {
        "model": {
            "type": PLAIN if plain else PIPELINE,
            **{name: value for name, value in special.items() if value is not None},
            "context_length": shape.max_positions,
            "vocab_size": shape.vocab_size,
            "decoder": decoder,
        },
        "search": {
            "batch_size": 1,
            "do_sample": False,
            "max_length": shape.max_positions,
            "num_beams": 1,
            "past_present_share_buffer": plain,
        },
    }


def _stages(shape: contract.ModelShape) -> dict[str, Any]:
    """Return the two stages of a pipeline."""
    forwarded = {
        present(layer): given(layer)
        for present, given in (
            (contract.present_mask_indices, contract.mask_indices),
            (contract.present_tail_mean, contract.tail_mean),
        )
        for layer in range(shape.num_layers)
    }
    caches = [tensor.name for tensor in contract.dense_inputs(shape)]  # tokens, attention mask, keys and values
    prefill = {
        "filename": contract.PREFILL_FILE,
        "inputs": caches,
        "outputs": [tensor.name for tensor in contract.prefill_outputs(shape)],
        "output_names_forwarder": forwarded,
        "run_on_token_gen": False,
    }
    decode = {
        "filename": contract.DECODE_FILE,
        "inputs": [*caches, *forwarded.values()],
        "outputs": [tensor.name for tensor in contract.decode_outputs(shape)],
        "run_on_prompt": False,
    }
    return {"prefill": prefill, "decode": decode}


def _pattern(name: Callable[[int], str]) -> str:
    """Return a per-layer name as a pattern of GenAI."""
    return name(0).replace(".0.", ".%d.")
