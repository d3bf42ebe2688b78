"""Fidelity, against a slow reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tda_export.errors import TdaError
from tda_export.ffn_share import GATED
from tda_export.graph.reference import reference_logits
from tda_export.models.source import ModelSource
from tda_export.runtime import Model
from tda_export.runtime.deployment import one_level
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import prefill
from tda_export.runtime.scoring import Fidelity, compare, continuation_logits
from tests.runtime.conftest import PROMPT, mask_alone, reference_mask, second_level

CONTINUATION = " and the boats are home."
LOGITS = 1e-4  # tolerance of float32 logits of size 1 to 10 after three layers


@st.composite
def two_logits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
    arrays = hnp.arrays(np.float32, shape, elements=st.floats(-60, 60, width=32))
    return draw(arrays), draw(arrays)


def slow_log_softmax(logits: list[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(value - max(logits)) for value in logits))
    return [value - max(logits) - total for value in logits]


def slow_compare(dense: list[list[float]], sparse: list[list[float]]) -> tuple[float, float]:
    kl, agreement = 0.0, 0
    for expected, ours in zip(dense, sparse, strict=True):
        pairs = list(zip(slow_log_softmax(expected), slow_log_softmax(ours), strict=True))
        kl += math.fsum(math.exp(p) * (p - q) for p, q in pairs)
        agreement += expected.index(max(expected)) == ours.index(max(ours))
    return kl / len(dense), agreement / len(dense)


@given(two_logits())
def test_compare(pair: tuple[np.ndarray, np.ndarray]) -> None:
    dense, sparse = pair
    fidelity = compare(dense, sparse)
    kl, agreement = slow_compare(dense.tolist(), sparse.tolist())
    assert fidelity.kl == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert fidelity.agreement == pytest.approx(agreement)
    assert fidelity.kl >= -1e-12


@given(two_logits(), st.floats(-100, 100, width=32))
def test_compare_with_itself(pair: tuple[np.ndarray, np.ndarray], offset: float) -> None:
    logits = pair[0]
    assert compare(logits, logits) == Fidelity(0.0, 1.0)
    shifted = compare(logits.astype(np.float64), logits.astype(np.float64) + offset)  # the same distribution
    assert shifted.kl == pytest.approx(0.0, abs=1e-11)


def test_dense_logits_equal_prefill(model: Model) -> None:
    """The slow reference reads the prompt and the continuation so far again for every token."""
    shape = model.artifact.shape
    prompt, continuation = model.text.encode(PROMPT), model.text.encode(CONTINUATION)
    expected = []
    for end in range(1, len(continuation) + 1):
        cache = KvCache(shape, model.provider, shape.max_positions)
        expected.append(prefill(model.sessions, shape, prompt + continuation[:end], cache)[0])
    logits = continuation_logits(model, prompt, continuation, mask="dense")
    assert logits.shape == (len(continuation), shape.vocab_size)
    np.testing.assert_allclose(logits, np.stack(expected), atol=LOGITS)


@pytest.mark.parametrize("levels", [1, 2], ids="levels={}".format)
def test_masked_logits_equal_transformers(model: Model, source: ModelSource, reference: Any, levels: int) -> None:
    shape = model.artifact.shape
    prompt, continuation = model.text.encode(PROMPT), model.text.encode(CONTINUATION)
    _, mask = prefill(model.sessions, shape, prompt, KvCache(shape, model.provider, shape.max_positions))
    masks, tails = reference_mask(model, mask)
    level = second_level(model, model.artifact.deployment.token_thresholds) if levels == 2 else None
    _, expected = reference_logits(reference, source.spec, prompt, continuation, masks, tails, level)
    how = mask_alone(model) if levels == 1 else None
    logits = continuation_logits(model, prompt, continuation, mask="tda", deployment=how)
    np.testing.assert_allclose(logits, expected.numpy(), atol=LOGITS)


def test_fidelity_of_masks(model: Model) -> None:
    prompt, continuation = model.text.encode(PROMPT), model.text.encode(CONTINUATION)
    dense = continuation_logits(model, prompt, continuation, mask="dense")
    again = continuation_logits(model, prompt, continuation, mask="dense")
    assert compare(dense, again) == Fidelity(0.0, 1.0)
    everything = continuation_logits(model, prompt, continuation, mask="tda", deployment=one_level([0.0] * 3, 3, GATED))
    assert compare(dense, everything).kl == pytest.approx(0.0, abs=1e-8)
    losses = [
        compare(dense, continuation_logits(model, prompt, continuation, mask="tda", deployment=how)).kl
        for how in (one_level([threshold] * 3, 3, GATED) for threshold in (0.03, 0.08, 2.0))
    ]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_continuation_past_the_maximum(model: Model) -> None:
    with pytest.raises(TdaError, match="500 and 13 tokens are more than the model's 512 positions"):
        continuation_logits(model, [5] * 500, [5] * 13, mask="dense")
