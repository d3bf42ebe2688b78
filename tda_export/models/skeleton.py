"""The shapes of a model's tensors, from only its configuration."""

from __future__ import annotations

from typing import Any

import torch


def skeleton_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that transformers would make, by name; a tied parameter counts once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
