"""`tda::Attention16`, attention to a cache of float16: the CPU kernel against its body and plain numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention_model import AttentionForm, random_attention, reference, run_attention
from tests.stored_attention import CLOSE, NATIVE, session

PLAIN = AttentionForm(kv="float16")


def halfway(half: int) -> float:
    """Return the mean of the float16 with these bits and the next one."""
    return float(np.arange(half, half + 2, dtype=np.uint16).view(np.float16).astype(np.float64).mean())


@settings(max_examples=100)
@given(
    values=st.lists(
        st.one_of(
            st.floats(width=32),
            st.floats(-2, 2, width=32),
            st.integers(0, 2**15 - 1).map(lambda half: float(np.uint16(half).view(np.float16))),
            # Halfway between two float16, where ties go to the even one.
            st.integers(0, 0x7BFE).map(halfway),
            st.sampled_from([65519.996, 65520.0, -65520.0, 2.0**-25, 2.0**-24, -(2.0**-26), np.inf, np.nan]),
        ),
        min_size=1,
        max_size=16,
    )
)
def test_values_are_rounded_as_ieee_754_says(values: list[float]) -> None:
    form = replace(PLAIN, heads=1, kv_heads=1, rotary=False)
    feeds = random_attention(np.random.default_rng(0), form, tokens=1, past=0)
    feeds["value"][0, 0, : len(values)] = values
    _, _, stored = run_attention(session(form), feeds)
    with np.errstate(over="ignore"):
        expected = feeds["value"][0, 0].astype(np.float16)
    spoiled = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(stored[0, 0, 0]), spoiled)
    np.testing.assert_array_equal(stored[0, 0, 0].view(np.uint16)[~spoiled], expected.view(np.uint16)[~spoiled])


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("spoiled", [np.nan, np.inf, 7e4])
@pytest.mark.parametrize("name", ["key", "value"])
def test_what_float16_does_not_hold_reaches_the_results(name: str, spoiled: float, native: bool) -> None:
    form = AttentionForm(heads=4, kv_heads=2, size=32, rotary=False, kv="float16")
    feeds = random_attention(np.random.default_rng(4), form, tokens=5, past=300)
    feeds[name][0, 2, 37] = spoiled  # the second key-value head
    attended, *present = run_attention(session(form, native=native), feeds)
    whole = reference(feeds, form, present)
    seen = np.isfinite(whole)
    assert seen.any()
    assert not seen.all()
    if native:
        np.testing.assert_array_equal(np.isfinite(attended), seen)
        np.testing.assert_allclose(attended[seen], whole[seen], rtol=0, atol=CLOSE)
    else:  # the body multiplies values that a token does not attend to by zero, which keeps NaN
        assert not (np.isfinite(attended) & ~seen).any()
