"""Rotary embeddings: their configurations, and the tables for GroupQueryAttention."""

from __future__ import annotations

import math
from typing import Any

import torch

from tda_export.errors import TdaError
from tda_export.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, rotary_size: int) -> torch.Tensor:
    """Compute the angular frequency of each rotated pair of dimensions.

    `theta^(-2j/D)`, divided by `factor` for linear scaling (position interpolation, arXiv 2306.15595); for
    `llama3` only wavelengths over `original / low_freq_factor` are divided, those under
    `original / high_freq_factor` are kept, and between the two the share is interpolated (Llama 3.1's
    published scaling). `longrope` (arXiv 2402.13753) and `yarn` (arXiv 2309.00071) provide their own frequencies.

    Args:
        rope: Base and scaling.
        rotary_size: R, how many elements of a head are rotated, an even number.

    Returns:
        float32 [R / 2], radians per position.
    """
    if rope.frequencies is not None:
        return torch.tensor(rope.frequencies, dtype=torch.float32)
    exponents = torch.arange(0, rotary_size, 2, dtype=torch.int64).float() / rotary_size  # [R/2]
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        wavelengths = 2 * math.pi / frequencies
        longest = rope.original_max_positions / rope.low_freq_factor
        shortest = rope.original_max_positions / rope.high_freq_factor
        kept = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - kept) * frequencies / rope.factor + kept * frequencies
        scaled = torch.where(wavelengths > longest, frequencies / rope.factor, blended)
        return torch.where(wavelengths < shortest, frequencies, scaled)
    return frequencies


def rope_table(
    rope: RopeSpec, head_size: int, positions: int, function: str, rotary_size: int | None = None
) -> torch.Tensor:
    """Tabulate `cos` or `sin` of position times frequency.

    Pairs of elements that are not rotated have cos 1 and sin 0, so that the graphs always rotate whole heads
    (`rotary_order`).

    Args:
        rope: Base and scaling.
        head_size: D.
        positions: The number of rows, which is the most tokens that the graphs can attend to.
        function: `"cos"` or `"sin"`.
        rotary_size: R, how many elements of a head are rotated; None is all.

    Returns:
        float32 [positions, D / 2].
    """
    frequencies = inverse_frequencies(rope, rotary_size or head_size)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)  # [positions, R/2]
    rotated = (torch.cos(angles) if function == "cos" else torch.sin(angles)) * rope.attention_factor
    rest = head_size // 2 - len(frequencies)
    still = torch.full((positions, rest), 1.0 if function == "cos" else 0.0)
    return torch.cat([rotated, still], dim=1)


def rotary_order(head_size: int, rotary_size: int) -> torch.Tensor:
    """Order the elements of a head so that its rotated pairs are (j, j + D/2), as where whole heads are rotated.

    A model that rotates only the first R elements pairs j with j + R/2. Reordering queries and keys in the same way
    does not change their products.

    Returns:
        int64 [D]: the index of the element at each place.
    """
    half, rest = rotary_size // 2, (head_size - rotary_size) // 2
    elements = torch.arange(head_size)
    first, second, still = elements[:half], elements[half:rotary_size], elements[rotary_size:]
    return torch.cat([first, still[:rest], second, still[rest:]])


def read_rope(config: Any, parameters: dict[str, Any], architecture: str, layer_type: str | None = None) -> RopeSpec:
    """Read the rotary embedding of a transformers configuration.

    Args:
        config: A `transformers.PretrainedConfig`.
        parameters: The configuration's parameters of these layers' rotary embedding.
        architecture: The architecture's name, for the error message.
        layer_type: transformers' name of this kind of layer, where kinds of layers have separate embeddings.

    Raises:
        TdaError: The scaling is not supported.
    """
    kind = parameters.get("rope_type", "default")
    theta = float(parameters["rope_theta"])
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
    if kind in ("longrope", "yarn"):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        # For longrope these are the frequencies of short contexts.
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
        return RopeSpec(
            theta,
            kind,
            original_max_positions=int(parameters["original_max_position_embeddings"]),
            frequencies=tuple(frequencies.tolist()),
            attention_factor=float(factor),
        )
    raise TdaError(
        f"{architecture} with rope scaling {kind!r} is not supported; supported are default, linear, llama3, longrope "
        "and yarn. Choose another model."
    )
