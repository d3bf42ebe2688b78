"""The cosine and sine tables that GroupQueryAttention rotates queries and keys with."""

from __future__ import annotations

import math

import torch

from tda_export.models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_size: int) -> torch.Tensor:
    """Compute the angular frequency of each rotated pair of dimensions.

    `theta^(-2j/D)`, divided by `factor` for linear scaling (position interpolation, arXiv 2306.15595); for
    `llama3` only wavelengths over `original / low_freq_factor` are divided, those under
    `original / high_freq_factor` are kept, and between the two the share is interpolated (Llama 3.1's
    published scaling).

    Args:
        rope: Base and scaling.
        head_size: D, an even number of elements.

    Returns:
        float32 [D / 2], radians per position.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size  # [D/2]
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


def rope_table(rope: RopeSpec, head_size: int, positions: int, function: str) -> torch.Tensor:
    """Tabulate `cos` or `sin` of position times frequency.

    Args:
        rope: Base and scaling.
        head_size: D.
        positions: Number of rows; the graphs can attend to no more tokens than this.
        function: `"cos"` or `"sin"`.

    Returns:
        float32 [positions, D / 2].
    """
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(rope, head_size))
    return torch.cos(angles) if function == "cos" else torch.sin(angles)
