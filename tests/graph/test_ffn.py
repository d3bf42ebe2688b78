"""The function body of `tda::IndexedFFN`, against the sum over neurons of its definition."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.graph import contract
from tda_export.graph.ffn import FfnForm
from tests.ffn_model import ffn_session, forms, random_feeds, reference, run

session = functools.cache(functools.partial(ffn_session, native=False))


@settings(max_examples=100)
@given(
    form=forms,
    down_bias=st.booleans(),
    hidden=st.integers(1, 12),
    neurons=st.integers(1, 15),
    tokens=st.integers(1, 3),
    threshold=st.sampled_from([0.0, 0.3, 1e9]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_function_is_the_sum_over_its_indices(
    form: FfnForm,
    down_bias: bool,
    hidden: int,
    neurons: int,
    tokens: int,
    threshold: float,
    seed: int,
    data: st.DataObject,
) -> None:
    kept = data.draw(st.lists(st.integers(0, neurons - 1), unique=True))
    padding = data.draw(st.integers(0 if kept else 1, 3))
    indices = np.array(sorted(kept) + [contract.PADDING_INDEX] * padding)
    rng = np.random.default_rng(seed)
    feeds = random_feeds(
        rng, tokens=tokens, hidden=hidden, neurons=neurons, indices=indices, dtype="float32", threshold=threshold
    )
    expected, _ = reference(form, feeds, down_bias=down_bias, threshold=threshold)
    y = run(session(form, down_bias=down_bias, layer=1), feeds)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [4, 100, -2, -7])
def test_index_that_is_no_neuron_is_an_error(index: int) -> None:
    rng = np.random.default_rng(0)
    feeds = random_feeds(
        rng, tokens=1, hidden=2, neurons=4, indices=np.array([0, index]), dtype="float32", threshold=0.0
    )
    with pytest.raises(Exception, match="out of data bounds"):
        run(session(FfnForm("silu")), feeds)
