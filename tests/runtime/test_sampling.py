"""Sampling against slow, obvious references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from tda_export.errors import UsageError
from tda_export.runtime.sampling import (
    RepetitionPenalty,
    Sampling,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
    softmax,
)

LOGITS = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-80, 80, width=32))
SHARES = 4096  # probabilities are multiples of 1/4096, so that sums and the border of a nucleus are exact


def slow_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    total = math.fsum(math.exp(value - largest) for value in logits)
    return [math.exp(value - largest) / total for value in logits]


def slow_top_k(logits: list[float], k: int) -> list[float]:
    if k == 0:
        return logits
    border = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    return [value if value >= border else -math.inf for value in logits]


def slow_top_p(probabilities: list[float], p: float) -> list[float]:
    kept, mass = [0.0] * len(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if mass >= p:
            break
        kept[token] = probabilities[token]
        mass += probabilities[token]
    return [probability / mass for probability in kept]


@st.composite
def exact_probabilities(draw: st.DrawFn) -> np.ndarray:
    """Draw probabilities that are multiples of 1 / SHARES, many of them equal or zero."""
    borders = sorted(draw(st.lists(st.integers(0, SHARES), max_size=20)))
    return np.diff([0, *borders, SHARES]) / SHARES


@given(LOGITS)
def test_softmax(logits: np.ndarray) -> None:
    np.testing.assert_allclose(softmax(logits), slow_softmax(logits.tolist()), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("offset", [-1e6, 1e6])
def test_softmax_does_not_overflow(offset: float) -> None:
    logits = np.array([0.0, 1.0, -2.0])
    np.testing.assert_allclose(softmax(logits + offset), softmax(logits), rtol=1e-9)


@given(LOGITS, st.integers(0, 50))
def test_keep_top_k(logits: np.ndarray, k: int) -> None:
    before = logits.copy()
    assert keep_top_k(logits, k).tolist() == slow_top_k(logits.tolist(), k)
    np.testing.assert_array_equal(logits, before)


def test_keep_top_k_keeps_equal_logits_at_the_border() -> None:
    assert keep_top_k(np.array([1.0, 3.0, 2.0, 2.0]), 2).tolist() == [-math.inf, 3.0, 2.0, 2.0]


@given(exact_probabilities(), st.integers(1, SHARES).map(lambda share: share / SHARES))
def test_keep_top_p(probabilities: np.ndarray, p: float) -> None:
    kept = keep_top_p(probabilities, p)
    np.testing.assert_allclose(kept, slow_top_p(probabilities.tolist(), p), rtol=1e-12, atol=0)


@given(LOGITS, st.floats(1e-6, 1.0))
def test_nucleus_is_the_smallest_that_reaches_p(logits: np.ndarray, p: float) -> None:
    probabilities = softmax(logits)
    kept = keep_top_p(probabilities, p) > 0
    inside, outside = probabilities[kept], probabilities[~kept]
    rounding = 1e-12
    assert inside.sum() >= p - rounding
    if p < 1:
        assert inside.sum() - inside.min() < p + rounding
    assert outside.max(initial=0.0) <= inside.min()


def test_nucleus_is_never_empty() -> None:
    assert keep_top_p(np.array([0.25, 0.75]), 1e-300).tolist() == [0.0, 1.0]


@given(exact_probabilities(), st.integers(0, SHARES).map(lambda share: share / SHARES))
def test_keep_min_p(probabilities: np.ndarray, p: float) -> None:
    """Tokens at the border are kept. p = 1 keeps only the likeliest."""
    kept = [share if share >= p * max(probabilities) else 0.0 for share in probabilities]
    np.testing.assert_allclose(
        keep_min_p(probabilities, p), [share / math.fsum(kept) for share in kept], rtol=1e-12, atol=0
    )


@given(LOGITS, st.floats(0.001, 0.999))
def test_min_p_equals_transformers(logits: np.ndarray, p: float) -> None:
    kept = MinPLogitsWarper(p)(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits.copy())[None])[0]
    ours, probabilities = keep_min_p(softmax(logits), p), softmax(logits)
    at_border = np.isclose(probabilities, p * probabilities.max(), rtol=1e-9)
    np.testing.assert_array_equal((ours > 0) | at_border, np.isfinite(kept.numpy()) & (probabilities > 0) | at_border)


def test_min_p_reaches_the_sampler() -> None:
    """It applies to the probabilities at the temperature."""
    logits = np.log(np.array([0.5, 0.3, 0.2]))
    for min_p, temperature, drawn in (
        (0.0, 1.0, {0, 1, 2}),
        (0.5, 1.0, {0, 1}),
        (0.7, 1.0, {0}),
        (0.5, 2.0, {0, 1, 2}),
    ):
        sample = make_sampler(Sampling(temperature, seed=0, min_p=min_p))
        assert sample is not None
        assert {sample(logits) for _ in range(200)} == drawn


@given(LOGITS)
def test_a_tiny_temperature_is_almost_greedy(logits: np.ndarray) -> None:
    sampler = make_sampler(Sampling(temperature=1e-300, seed=0))
    assert sampler is not None
    assert logits[sampler(logits)] == max(logits)


def test_greedy_needs_no_sampler() -> None:
    """The decode step itself chooses the token."""
    assert make_sampler(Sampling()) is None


@given(
    LOGITS,
    st.floats(1e-3, 10),
    st.integers(0, 50),
    st.floats(0, 1, exclude_min=True, allow_subnormal=False),
    st.integers(0, 2**32),
)
def test_sample_comes_from_what_was_kept(logits: np.ndarray, temperature: float, k: int, p: float, seed: int) -> None:
    scaled = slow_top_k((logits / temperature).tolist(), k)
    allowed = slow_top_p(slow_softmax(scaled), p)
    token = make_sampler(Sampling(temperature, k, p, seed))(logits.astype(np.float32))
    # A token at the border may fall on either side by rounding. Then it is as likely as the last one kept.
    last = min(share for share in allowed if share > 0)
    assert allowed[token] > 0 or math.isclose(softmax(np.array(scaled))[token], last, rel_tol=1e-9) or p > 1 - 1e-9


def test_same_seed_same_tokens() -> None:
    logits = np.linspace(0, 1, 100, dtype=np.float32)

    def draws(seed: int | None) -> list[int]:
        sample = make_sampler(Sampling(temperature=1.0, seed=seed))
        return [sample(logits) for _ in range(50)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_draws_follow_the_distribution() -> None:
    logits, temperature, count = np.array([0.0, 1.0, 2.0, -1.0], np.float32), 1.5, 20_000
    sample = make_sampler(Sampling(temperature, seed=0))
    drawn = np.bincount([sample(logits) for _ in range(count)], minlength=4) / count
    expected = np.array(slow_softmax((logits / temperature).tolist()))
    standard_error = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(drawn - expected) < 4 * standard_error).all()


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30, 1e-6])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 2, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3e38], ids=["logits", "logits as large as float32 holds"])
def test_almost_no_temperature_is_greedy(temperature: float, options: dict[str, Any], scale: float) -> None:
    logits = (np.array([0.5, 1.0, -1.0, 0.25]) * scale).astype(np.float32)
    sample = make_sampler(Sampling(temperature, seed=0, **options))
    with np.errstate(over="ignore"):  # the others become -inf, as they should
        assert {sample(logits) for _ in range(20)} == {1}


@pytest.mark.parametrize("temperature", [1e-308, 1e-30])
def test_almost_no_temperature_draws_among_equals(temperature: float) -> None:
    sample = make_sampler(Sampling(temperature, seed=0))
    with np.errstate(over="ignore"):
        assert {sample(np.array([1.0, 0.5, 1.0], np.float32)) for _ in range(50)} == {0, 2}


@pytest.mark.parametrize("temperature", [1e6, 1.7e308])
def test_any_high_temperature_is_nearly_uniform(temperature: float) -> None:
    sample = make_sampler(Sampling(temperature, seed=0))
    assert {sample(np.array([8.0, 0.0, -8.0], np.float32)) for _ in range(100)} == {0, 1, 2}


def test_top_k_of_one_is_greedy() -> None:
    sample = make_sampler(Sampling(temperature=5.0, top_k=1))
    assert {sample(np.array([0.0, 0.2, 0.1], np.float32)) for _ in range(50)} == {1}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -0.1}, "Temperature -0.1 is negative or not finite"),
        ({"temperature": math.nan}, "Temperature nan is negative or not finite"),
        ({"temperature": math.inf}, "Temperature inf is negative or not finite"),
        ({"top_k": -1}, "top-k -1 is negative"),
        ({"top_p": 0.0}, r"top-p 0.0 is outside \(0, 1\]"),
        ({"top_p": 1.1}, r"top-p 1.1 is outside \(0, 1\]"),
        ({"top_p": math.nan}, "top-p nan is outside"),
        ({"min_p": -0.1}, r"min-p -0.1 is outside \[0, 1\]"),
        ({"min_p": 1.1}, r"min-p 1.1 is outside \[0, 1\]"),
        ({"min_p": math.nan}, "min-p nan is outside"),
        ({"seed": -1, "temperature": 1.0}, "[Ss]eed -1"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options: dict[str, float], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        make_sampler(Sampling(**options))  # type: ignore[arg-type]


@given(hnp.arrays(np.float32, 20, elements=st.floats(-80, 80, width=32)), st.floats(0.1, 10), st.data())
def test_repetition_penalty_equals_transformers(logits: np.ndarray, penalty: float, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 19), min_size=1, max_size=30))
    prompt = data.draw(st.integers(0, len(tokens)))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), torch.from_numpy(logits.copy())[None])
    ours, before = RepetitionPenalty(penalty, 20, tokens[:prompt]), logits.copy()
    for token in tokens[prompt:]:
        ours.add(token)
    np.testing.assert_allclose(
        ours.apply(logits), expected[0].numpy(), rtol=1e-5, atol=1e-35
    )  # float32 loses digits of tiny ones
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1.0])
def test_the_largest_logits_and_penalties_stay_finite(penalty: float, temperature: float) -> None:
    largest = float(np.finfo(np.float32).max)
    penalised = RepetitionPenalty(penalty, 4, [0, 1]).apply(np.array([largest, -largest, 1.0, 0.0], np.float32))
    np.testing.assert_allclose(penalised, [largest / penalty, -largest * penalty, 1.0, 0.0], rtol=1e-12)
    sampler = make_sampler(Sampling(temperature, seed=1))
    assert sampler is None or sampler(penalised) == 0


@pytest.mark.parametrize("penalty", [0.0, -1.0, 0.0099, 100.1, 1e-45, 1e300, math.inf, math.nan])
def test_repetition_penalty_out_of_range(penalty: float) -> None:
    with pytest.raises(UsageError, match=r"^Repetition penalty \S+ is outside \[0\.01, 100\.0\]\. Give 1 \(off\)"):
        Sampling(repetition_penalty=penalty)
