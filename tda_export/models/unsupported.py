"""Names of features that the graphs cannot express, for error messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from tda_export.errors import TdaError

EXPERTS = "mixture of experts"
ALIBI = "ALiBi (attention with linear biases)"
RECURRENT = "a recurrent or state-space layer"
ENCODER = "an encoder beside the decoder"
MULTIMODAL = "input other than text"
LATENT = "latent attention with mixture of experts"

# By prefix of an architecture's name, in upper or lower case (PhiMoE, MPT); the first match counts.
REASONS = {
    "Mixtral": EXPERTS,
    "Qwen2Moe": EXPERTS,
    "Qwen3Moe": EXPERTS,
    "Qwen3Next": f"{EXPERTS} with linear attention",
    "Olmoe": EXPERTS,
    "Phimoe": EXPERTS,
    "GptOss": EXPERTS,
    "GraniteMoe": EXPERTS,
    "Dbrx": EXPERTS,
    "Ernie4_5_Moe": EXPERTS,
    "Glm4Moe": EXPERTS,
    "Llama4": EXPERTS,
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "Bloom": ALIBI,
    "Mpt": ALIBI,
    "Mamba": RECURRENT,
    "FalconMamba": RECURRENT,
    "FalconH1": RECURRENT,
    "Jamba": f"{EXPERTS} with state-space layers",
    "Bamba": RECURRENT,
    "Zamba": RECURRENT,
    "Rwkv": RECURRENT,
    "RecurrentGemma": RECURRENT,
    "T5": ENCODER,
    "MT5": ENCODER,
    "Bart": ENCODER,
    "Whisper": MULTIMODAL,
}
CONDITIONAL = "ForConditionalGeneration"  # transformers' suffix for models with further inputs than the preceding text

# Fields of a configuration that switch a feature on.
FEATURES = {
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "is_encoder_decoder": ENCODER,
    "add_cross_attention": ENCODER,
    "vision_config": MULTIMODAL,
    "audio_config": MULTIMODAL,
    "alibi": ALIBI,
    "use_bidirectional_attention": "attention to later tokens",
    "scale_attn_by_inverse_layer_idx": "attention that is scaled by layer",
}


def refuse_architecture(architecture: str, supported: Iterable[str]) -> NoReturn:
    """Raise the error that says why an architecture is not supported.

    Raises:
        TdaError: Always.
    """
    lower = architecture.lower()
    reason = next((reason for name, reason in REASONS.items() if lower.startswith(name.lower())), None)
    if reason is None and architecture.endswith(CONDITIONAL):
        reason = MULTIMODAL
    names = ", ".join(sorted(supported))
    if reason is None:
        raise TdaError(
            f"Architecture {architecture} is not supported; supported are {names}. Choose a model of one of these."
        )
    raise TdaError(f"{architecture}: {reason} is not supported. Choose a model of one of {names}.")


def refuse_features(config: Any, architecture: str) -> None:
    """Refuse a configuration of a supported architecture that enables a feature that the graphs lack.

    Raises:
        TdaError: A feature is not supported; the message names it.
    """
    for field, feature in FEATURES.items():
        if getattr(config, field, None):
            raise TdaError(
                f"{architecture}: {feature} is not supported ({field} in config.json). Choose another model."
            )
    if getattr(config, "layer_norm_elementwise_affine", True) is False:
        raise TdaError(
            f"{architecture}: norms without weights are not supported (layer_norm_elementwise_affine in config.json). "
            "Choose another model."
        )
