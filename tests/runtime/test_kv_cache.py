"""The KV cache: its growth does not show in what is generated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import TdaError
from tda_export.runtime import Model, kv_cache
from tda_export.runtime.generate import MaskMode
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import prefill
from tests.runtime.conftest import PROMPT

SMALL = 16  # tokens of a first buffer that a generation outgrows several times


@pytest.mark.parametrize("mask", ["tda", "dense"])
def test_growth_changes_nothing(model: Model, monkeypatch: pytest.MonkeyPatch, mask: MaskMode) -> None:
    roomy = [token.id for token in model.generate(PROMPT, mask=mask, max_new_tokens=200)]
    capacities = []
    reserve = KvCache.reserve

    def recording(cache: KvCache, tokens: int) -> None:
        reserve(cache, tokens)
        capacities.append(cache.capacity)

    monkeypatch.setattr(kv_cache, "FIRST_CAPACITY", SMALL)
    monkeypatch.setattr(KvCache, "reserve", recording)
    grown = [token.id for token in model.generate(PROMPT, mask=mask, max_new_tokens=200)]
    assert sorted(set(capacities)) == [32, 64, 128, 256]  # the prompt alone takes 24
    assert grown == roomy


def test_growth_keeps_keys_and_values(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, tokens = model.artifact.shape, model.text.encode(PROMPT * 4)
    roomy = KvCache(shape, "cpu", shape.max_positions)
    prefill(model.sessions, shape, tokens, roomy, chunk=7)
    monkeypatch.setattr(kv_cache, "FIRST_CAPACITY", SMALL)
    grown = KvCache(shape, "cpu", shape.max_positions)
    prefill(model.sessions, shape, tokens, grown, chunk=7)
    assert (roomy.capacity, grown.capacity) == (512, 128)
    for layer in range(shape.num_layers):
        for expected, ours in zip(roomy.keys_and_values(layer), grown.keys_and_values(layer), strict=True):
            assert expected.shape == (shape.num_kv_heads, len(tokens), shape.head_size)
            np.testing.assert_allclose(ours, expected, atol=1e-5)


@given(limit=st.integers(2, 600), pieces=st.lists(st.integers(1, 60), max_size=12))
def test_reserve(model: Model, limit: int, pieces: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "FIRST_CAPACITY", SMALL)
        cache = KvCache(model.artifact.shape, "cpu", limit)
        total = 0
        for piece in pieces:
            if total + piece > limit:
                break
            cache.reserve(piece)
            cache.commit()
            total += piece
            assert cache.length == total <= cache.capacity <= limit
            assert cache.capacity in (limit, SMALL) or cache.capacity < 2 * total  # never more than it needs
            assert cache.mask.shape == (1, cache.capacity)
            assert cache.mask[0].tolist() == [1] * total + [0] * (cache.capacity - total)


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


def test_prefill_beyond_the_limit(model: Model) -> None:
    shape = model.artifact.shape
    cache = KvCache(shape, "cpu", 10)
    with pytest.raises(TdaError, match="14 tokens do not fit into a context of 10"):
        prefill(model.sessions, shape, [5] * 20, cache, chunk=7)
    assert cache.length == 7  # what was read stays


def test_truncate_forgets(model: Model) -> None:
    shape, tokens = model.artifact.shape, model.text.encode(PROMPT)
    cache = KvCache(shape, "cpu", shape.max_positions)
    expected, _ = prefill(model.sessions, shape, tokens, cache)
    cache.truncate(4)
    assert cache.length == 4
    logits, _ = prefill(model.sessions, shape, tokens[4:], cache)
    assert cache.length == len(tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
