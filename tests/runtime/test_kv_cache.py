"""The KV cache: what fits, what does not, and what is dropped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import TdaError
from tda_export.runtime import Model
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import prefill
from tests.runtime.conftest import PROMPT


@given(capacity=st.integers(2, 600), pieces=st.lists(st.integers(1, 60), max_size=12))
def test_reserve(model: Model, capacity: int, pieces: list[int]) -> None:
    cache = KvCache(model.artifact.shape, "cpu", capacity)
    total = 0
    for piece in pieces:
        if total + piece > capacity:
            break
        cache.reserve(piece)
        cache.commit()
        total += piece
        assert cache.length == total
        assert cache.mask.tolist() == [[1] * total + [0] * (capacity - total)]


@pytest.mark.parametrize(("first", "second", "total"), [(11, None, 11), (10, 1, 11), (4, 100, 104)])
def test_reserve_beyond_the_limit(model: Model, first: int, second: int | None, total: int) -> None:
    cache = KvCache(model.artifact.shape, "cpu", 10)
    if second is not None:
        cache.reserve(first)
        cache.commit()
    before, attended = cache.length, cache.mask.tolist()
    with pytest.raises(TdaError, match=rf"{total} tokens do not fit into a context of 10\. Shorten the prompt"):
        cache.reserve(first if second is None else second)
    assert (cache.length, cache.capacity, cache.mask.tolist()) == (before, 10, attended)


def test_no_memory(model: Model) -> None:
    """More than any address space holds, which fails at once."""
    text = rf"^No memory for keys and values of {1 << 46} tokens \(.+\)\. Give a smaller --context, or ask for fewer"
    with pytest.raises(TdaError, match=text):
        KvCache(model.artifact.shape, "cpu", 1 << 46)


def test_prefill_beyond_the_limit(model: Model) -> None:
    shape = model.artifact.shape
    cache = KvCache(shape, "cpu", 10)
    with pytest.raises(TdaError, match="14 tokens do not fit into a context of 10"):
        prefill(model.sessions, shape, [5] * 20, cache, chunk=7)
    assert cache.length == 7  # tokens that were read stay


def test_truncate_forgets(model: Model) -> None:
    shape, tokens = model.artifact.shape, model.text.encode(PROMPT)
    cache = KvCache(shape, "cpu", shape.max_positions)
    expected, _ = prefill(model.sessions, shape, tokens, cache)
    cache.truncate(4)
    assert cache.length == 4
    logits, _ = prefill(model.sessions, shape, tokens[4:], cache)
    assert cache.length == len(tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
