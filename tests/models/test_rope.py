"""Frequencies and tables against transformers' own rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tda_export.models.families import read_spec
from tda_export.models.rope import inverse_frequencies, rope_table, rotary_order
from tda_export.models.spec import RopeSpec

HEAD_SIZES = [16, 64, 96, 128]
thetas = st.sampled_from([1e4, 5e5, 1e6])
head_sizes = st.sampled_from(HEAD_SIZES)
factors = st.floats(1.0, 64.0)

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3-short": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 16.0,
        "original_max_position_embeddings": 64,
    },
}


def rotary(parameters: dict[str, Any], head_size: int) -> tuple[LlamaRotaryEmbedding, RopeSpec]:
    """Make transformers' module and our specification from one configuration."""
    config = LlamaConfig(
        hidden_size=2 * head_size,
        num_attention_heads=2,
        head_dim=head_size,
        max_position_embeddings=100_000,
        rope_parameters=dict(parameters),
    )
    return LlamaRotaryEmbedding(config), read_spec(config).rope


def slow_frequencies(rope: RopeSpec, head_size: int) -> list[float]:
    """theta^(-2j/D) and its scalings, one frequency at a time in double precision."""
    frequencies = []
    for j in range(head_size // 2):
        frequency = rope.theta ** (-2 * j / head_size)
        if rope.scaling == "linear":
            frequency /= rope.factor
        if rope.scaling == "llama3":
            turns = rope.original_max_positions * frequency / (2 * math.pi)  # in the original context
            kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            kept = min(max(kept, 0.0), 1.0)
            frequency = kept * frequency + (1 - kept) * frequency / rope.factor
        frequencies.append(frequency)
    return frequencies


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_are_those_of_transformers(name: str, head_size: int) -> None:
    module, rope = rotary(PARAMETERS[name], head_size)
    frequencies = inverse_frequencies(rope, head_size)
    assert frequencies.dtype == torch.float32
    assert module.attention_scaling == 1
    torch.testing.assert_close(frequencies, module.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PARAMETERS)
def test_tables_are_those_of_transformers(name: str) -> None:
    head_size, positions = 64, 4096
    module, rope = rotary(PARAMETERS[name], head_size)
    cos, sin = module(torch.zeros(1), torch.arange(positions)[None])  # [1, positions, D], both halves alike
    for function, expected in (("cos", cos), ("sin", sin)):
        table = rope_table(rope, head_size, positions, function)
        assert table.shape == (positions, head_size // 2)
        assert table.dtype == torch.float32
        # An angle of 4,096 radians has an ulp of 5e-4 in float32, so rounding the frequency moves it by that much.
        torch.testing.assert_close(table, expected[0, :, : head_size // 2], rtol=0, atol=1e-3)
        torch.testing.assert_close(table[:64], expected[0, :64, : head_size // 2], rtol=0, atol=1e-5)


@settings(deadline=None)
@given(theta=thetas, head_size=head_sizes)
def test_default_frequencies(theta: float, head_size: int) -> None:
    rope = RopeSpec(theta)
    assert inverse_frequencies(rope, head_size).tolist() == pytest.approx(slow_frequencies(rope, head_size), rel=1e-5)


@settings(deadline=None)
@given(theta=thetas, head_size=head_sizes, factor=factors)
def test_linear_frequencies(theta: float, head_size: int, factor: float) -> None:
    rope = RopeSpec(theta, "linear", factor)
    assert inverse_frequencies(rope, head_size).tolist() == pytest.approx(slow_frequencies(rope, head_size), rel=1e-5)


@settings(deadline=None)
@given(
    theta=thetas,
    head_size=head_sizes,
    factor=factors,
    low=st.floats(0.5, 2.0),
    span=st.floats(0.5, 30.0),
    original=st.sampled_from([64, 2048, 8192]),
)
def test_llama3_frequencies(
    theta: float, head_size: int, factor: float, low: float, span: float, original: int
) -> None:
    rope = RopeSpec(theta, "llama3", factor, low, low + span, original)
    assert inverse_frequencies(rope, head_size).tolist() == pytest.approx(slow_frequencies(rope, head_size), rel=1e-4)


def test_llama3_keeps_short_wavelengths_and_divides_long_ones() -> None:
    rope = rotary(PARAMETERS["llama3"], 128)[1]
    plain, scaled = inverse_frequencies(RopeSpec(rope.theta), 128), inverse_frequencies(rope, 128)
    assert scaled[0] == plain[0]
    assert float(scaled[-1]) == pytest.approx(float(plain[-1]) / rope.factor)
    ratio = scaled / plain
    assert bool((ratio[1:] <= ratio[:-1] + 1e-6).all())
    assert bool(((ratio < 0.99) & (ratio > 1.01 / rope.factor)).any())  # and there is a slope between them


def test_first_position_is_not_rotated() -> None:
    rope = RopeSpec(1e4)
    assert rope_table(rope, 16, 3, "cos")[0].tolist() == [1.0] * 8
    assert rope_table(rope, 16, 3, "sin")[0].tolist() == [0.0] * 8


@pytest.mark.parametrize(("head_size", "rotary_size"), [(16, 16), (16, 8), (32, 24), (96, 24)])
def test_rotating_whole_heads_in_another_order_rotates_a_part(head_size: int, rotary_size: int) -> None:
    """Scores of rotated queries and keys equal those with only the first elements rotated, in pairs (j, j + R/2)."""
    rope, positions, half, part = RopeSpec(1e4), 7, head_size // 2, rotary_size // 2
    query, key = torch.randn(2, positions, head_size, dtype=torch.float64)
    cos, sin = (rope_table(rope, head_size, positions, function, rotary_size).double() for function in ("cos", "sin"))

    def whole(x: torch.Tensor) -> torch.Tensor:
        x = x[:, rotary_order(head_size, rotary_size)]
        first, second = x[:, :half], x[:, half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    def partly(x: torch.Tensor) -> torch.Tensor:
        first, second, rest = x[:, :part], x[:, part:rotary_size], x[:, rotary_size:]
        c, s = cos[:, :part], sin[:, :part]
        return torch.cat([first * c - second * s, second * c + first * s, rest], dim=1)

    torch.testing.assert_close(whole(query) @ whole(key).T, partly(query) @ partly(key).T)


def test_attention_factor_scales_what_is_rotated_alone() -> None:
    rope = RopeSpec(1e4, "longrope", frequencies=(1.0, 0.5), attention_factor=1.5)
    assert rope_table(rope, 8, 2, "cos", 4)[0].tolist() == [1.5, 1.5, 1.0, 1.0]
    assert rope_table(rope, 8, 2, "sin", 4)[0].tolist() == [0.0] * 4
