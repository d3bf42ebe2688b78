"""Decoding at a price, against transformers with the same rows skipped, and against dense decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import UsageError
from tda_export.graph import contract
from tda_export.models.row_dropping import dropping
from tda_export.models.source import ModelSource
from tda_export.runtime import Conversation, Model, Sampling
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import bind_call
from tda_export.runtime.priced import PricedPrefill, PricedStep
from tda_export.runtime.session import device_tensor
from tda_export.runtime.steps import open_step
from tests.runtime.conftest import mask_alone, row_prices

PROMPT, READ = list(range(5, 29)), [40, 41, 42, 43]
MORE_THAN_ANY = 1e30  # a price at which no row is read


def opened(model: Model, tokens: int = 64) -> PricedStep:
    step = open_step(model.sessions, model.artifact.shape, tokens)
    assert isinstance(step, PricedStep)
    return step


def half_price(model: Model) -> float:
    """Return the price at which half of the bytes are read."""
    return model.at(sparsity=0.5).price


def decoded(model: Model, price: float | None, tokens: list[int] = READ) -> np.ndarray:
    """Decode tokens one by one after a prompt. Return the logits after each, float32 [S, V]. Price None is dense."""
    step = opened(model)
    step.begin(PROMPT, PriceDeployment(0.0))
    step.follow(None if price is None else PriceDeployment(price))
    return np.stack([step.logits(token) for token in tokens])


def in_one_call(
    model: Model, cache: KvCache, tokens: list[int], inputs: Mapping[str, float], session: Any = None
) -> np.ndarray:
    """Append tokens with the decode graph, or another one, in one call. Return logits, float32 [S, V]."""
    values = {name: device_tensor(np.array([value], np.float32), "cpu") for name, value in inputs.items()}
    logits = bind_call(session or model.sessions.decode, cache, tokens, values).run()[contract.LOGITS]
    cache.commit()
    return logits.numpy()[0]


def read_prompt(model: Model, room: int = 0) -> KvCache:
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ) + room)
    PricedPrefill(model.sessions, model.artifact.shape, cache).read(PROMPT)
    return cache


# Beside transformers


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_logits_are_those_of_transformers(
    priced_model: Model, source: ModelSource, reference: Any, sparsity: float
) -> None:
    price = priced_model.at(sparsity=sparsity).price
    with torch.inference_mode():
        past = reference(torch.tensor([PROMPT]), use_cache=True).past_key_values
        with dropping(reference, source.spec, row_prices(priced_model), price):
            expected = reference(torch.tensor([READ]), past_key_values=past, use_cache=True).logits[0].numpy()
    one_by_one = decoded(priced_model, price)
    np.testing.assert_allclose(one_by_one, expected, atol=1e-3)
    assert np.abs(one_by_one - decoded(priced_model, None)).max() > 1e-2
    together = in_one_call(priced_model, read_prompt(priced_model), READ, {contract.PRICE: price})
    np.testing.assert_allclose(together, expected, atol=1e-3)


def test_prefill_is_dense(priced_model: Model, reference: Any) -> None:
    logits = opened(priced_model).begin(PROMPT, PriceDeployment(MORE_THAN_ANY))
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0, -1].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


# Dense


@pytest.mark.parametrize("price", [0.0, -0.0, -1.0, -np.inf, np.nan], ids=str)
def test_prices_up_to_zero_are_dense_to_the_bit(priced_model: Model, price: float) -> None:
    """Also at a NaN, which only applications can give to the graph."""
    dense = decoded(priced_model, None)
    assert np.array_equal(decoded(priced_model, price), dense)
    cache = read_prompt(priced_model)
    step_by_step = [in_one_call(priced_model, cache, [token], {}, priced_model.sessions.prefill)[0] for token in READ]
    if priced_model.sessions.native:  # native kernels add in another order
        np.testing.assert_allclose(dense, np.stack(step_by_step), atol=1e-4)
    else:
        assert np.array_equal(dense, np.stack(step_by_step))


def test_price_that_no_row_is_worth(priced_model: Model) -> None:
    """No row is read, those of the head neither: all logits are 0, whatever the tokens are."""
    step = opened(priced_model)
    step.begin(PROMPT, PriceDeployment(0.0))
    step.follow(PriceDeployment(MORE_THAN_ANY))
    for token in READ[:2]:
        assert not step.logits(token).any()


@pytest.mark.parametrize("tokens", [PROMPT[:1], PROMPT], ids=["one token", "many"])
@pytest.mark.parametrize("room", [0, 8])
def test_a_call_without_a_past_is_dense(priced_model: Model, tokens: list[int], room: int) -> None:
    """At any price, with buffers of any size."""
    shape = priced_model.artifact.shape
    dense, priced = (
        in_one_call(priced_model, KvCache(shape, "cpu", len(tokens) + room), tokens, {contract.PRICE: price})
        for price in (0.0, MORE_THAN_ANY)
    )
    assert np.array_equal(dense, priced)
    left_out = in_one_call(priced_model, KvCache(shape, "cpu", len(tokens) + room), tokens, {})
    assert np.array_equal(dense, left_out)
    prefill = PricedPrefill(priced_model.sessions, shape, KvCache(shape, "cpu", len(tokens))).read(tokens)
    np.testing.assert_allclose(dense[-1], prefill, atol=1e-4)


def test_price_left_out_is_the_budgets(priced_model: Model) -> None:
    own = priced_model.artifact.manifest["price"]
    assert own > 0
    left_out = in_one_call(priced_model, read_prompt(priced_model), READ, {})
    given = in_one_call(priced_model, read_prompt(priced_model), READ, {contract.PRICE: own})
    assert np.array_equal(left_out, given)


# One step, many prices


@given(st.lists(st.sampled_from([None, 0.0, 0.2, 0.5, 0.7]), min_size=1, max_size=6))
def test_price_changes_between_tokens(priced_model: Model, sparsities: list[float | None]) -> None:
    """Each token is as from a step of its own at its price, over the same keys and values."""
    shape = priced_model.artifact.shape
    step, cache = opened(priced_model), read_prompt(priced_model, room=8)
    step.begin(PROMPT, PriceDeployment(0.0))
    for token, sparsity in zip(range(40, 46), sparsities, strict=False):
        how = None if sparsity is None else priced_model.at(sparsity=sparsity)
        reading = step.follow(how)
        expected_share = 1.0 if sparsity is None else 1.0 - sparsity
        assert reading.share == reading.density == pytest.approx(expected_share)
        price = {contract.PRICE: 0.0 if how is None else how.price}
        assert np.array_equal(step.logits(token), in_one_call(priced_model, cache, [token], price)[0])
    assert step.cache.length == cache.length == len(PROMPT) + len(sparsities) <= shape.max_positions


def test_greedy_tokens_are_the_likeliest(priced_model: Model) -> None:
    deployment = priced_model.at(sparsity=0.5)
    one, other = opened(priced_model), opened(priced_model)
    for step in (one, other):
        step.begin(PROMPT, deployment)
        step.follow(deployment)
    token, chosen = READ[0], one.greedy(READ[0])
    for _ in range(8):
        token = int(other.logits(token).argmax())
        assert chosen == token
        chosen = one.greedy()


@pytest.mark.parametrize("chunk", [1, 5, 23, 24, 100])
def test_prompts_in_pieces(priced_model: Model, chunk: int) -> None:
    shape = priced_model.artifact.shape
    caches = [KvCache(shape, "cpu", len(PROMPT)) for _ in range(2)]
    whole, pieces = (
        PricedPrefill(priced_model.sessions, shape, cache).read(PROMPT, chunk=size)
        for cache, size in zip(caches, (len(PROMPT), chunk), strict=True)
    )
    np.testing.assert_allclose(pieces, whole, atol=1e-4)
    for layer in range(shape.num_layers):
        for one, other in zip(*(cache.keys_and_values(layer) for cache in caches), strict=True):
            assert isinstance(one, ort.OrtValue)
            np.testing.assert_allclose(other.numpy(), one.numpy(), atol=1e-5)


# Generations


def test_generation_is_a_loop_over_steps(priced_model: Model) -> None:
    deployment = priced_model.at(sparsity=0.5)
    step = opened(priced_model)
    token = int(step.begin(PROMPT, deployment).argmax())
    step.follow(deployment)
    expected = [token]
    while len(expected) < 16:
        expected.append(token := int(step.logits(token).argmax()))
    generation = priced_model.generate(PROMPT, max_new_tokens=16, deployment=deployment)
    assert [token.id for token in generation] == expected
    metrics = generation.metrics
    assert (metrics.mask, metrics.matrices, metrics.refreshes) == ("priced", "linears", 0)
    assert metrics.sparsity == pytest.approx(0.5)
    assert metrics.dense_bytes_per_token == priced_model.artifact.linear_bytes
    assert metrics.bytes_per_token == pytest.approx(0.5 * priced_model.artifact.linear_bytes, abs=1)
    assert expected == [token.id for token in priced_model.generate(PROMPT, max_new_tokens=16)]  # its own price


def test_dense_generations(priced_model: Model) -> None:
    dense = priced_model.generate(PROMPT, max_new_tokens=16, mask="dense")
    tokens = [token.id for token in dense]
    assert (dense.metrics.mask, dense.metrics.sparsity, dense.metrics.density) == ("dense", 0.0, 1.0)
    assert tokens == [t.id for t in priced_model.generate(PROMPT, max_new_tokens=16, deployment=PriceDeployment(0.0))]
    assert tokens != [token.id for token in priced_model.generate(PROMPT, max_new_tokens=16)]


def test_sampling_reads_by_price_too(priced_model: Model) -> None:
    nearly_greedy = Sampling(temperature=1.0, top_k=1, seed=0)
    sampled = priced_model.generate(PROMPT, max_new_tokens=16, sampling=nearly_greedy)
    greedy = priced_model.generate(PROMPT, max_new_tokens=16)
    assert [token.id for token in sampled] == [token.id for token in greedy]


def test_a_prompt_serves_every_price(priced_model: Model) -> None:
    """Prefill has no price, so a prompt read for one price is read for all."""
    memory, again = priced_model.memory(), [*PROMPT, 60, 61]
    list(priced_model.generate(PROMPT, max_new_tokens=4, memory=memory))
    for how in (priced_model.at(sparsity=0.2), priced_model.at(price=0.0), priced_model.at(max_kl=0.05)):
        generation = priced_model.generate(again, max_new_tokens=8, deployment=how, memory=memory)
        alone = priced_model.generate(again, max_new_tokens=8, deployment=how)
        assert [token.id for token in generation] == [token.id for token in alone]
        assert generation.metrics.reused_tokens >= len(PROMPT)


def test_conversation_is_that_of_one_prompt(priced_model: Model) -> None:
    conversation = Conversation(priced_model, deployment=priced_model.at(sparsity=0.3))
    for text in ("Hello", "And then?", "Why"):
        answer = conversation.say(text, max_new_tokens=6)
        tokens = [token.id for token in answer]
        prompt = priced_model.tokenize_chat(conversation.messages[:-1])
        alone = priced_model.generate(prompt, max_new_tokens=6, deployment=priced_model.at(sparsity=0.3))
        assert tokens == [token.id for token in alone]
        assert (answer.metrics.reused_tokens > 0) == (text != "Hello")


# Refusals


@pytest.mark.parametrize("price", [float("nan"), float("inf"), -float("inf")])
def test_prices_that_are_no_numbers(priced_model: Model, price: float) -> None:
    with pytest.raises(UsageError, match=r"^A price of -?(nan|inf): give a finite number, 0 for dense\.$"):
        priced_model.at(price=price)


def test_masks_are_not_for_priced_artifacts(priced_model: Model, model: Model) -> None:
    with pytest.raises(UsageError, match=r"^Mask 'tda' is not one of this artifact's\. Use priced or dense\.$"):
        priced_model.generate(PROMPT, mask="tda")
    with pytest.raises(UsageError, match="has prices and no masks, so it takes no thresholds"):
        priced_model.generate(PROMPT, deployment=mask_alone(model))


def test_prices_are_not_for_masks(model: Model) -> None:
    with pytest.raises(UsageError, match=r"^Mask 'priced' is not one of this artifact's\. Use tda or dense\.$"):
        model.generate(PROMPT, mask="priced")
    with pytest.raises(UsageError, match="has masks and no prices, so it takes no price"):
        model.generate(PROMPT, deployment=PriceDeployment(0.1))
    with pytest.raises(UsageError, match="has masks and no prices, so it takes no price"):
        model.at(sparsity=0.5)


def test_budgets_come_one_at_a_time(priced_model: Model) -> None:
    for budgets in ({}, {"price": 0.0, "sparsity": 0.5}, {"sparsity": 0.5, "max_kl": 0.1}):
        with pytest.raises(UsageError, match=r"^Give exactly one budget: --price, --sparsity or --max-kl"):
            priced_model.at(**budgets)


def test_artifact_without_a_table_takes_prices(priced_model: Model) -> None:
    manifest = priced_model.artifact.manifest | {"price_table": None}
    artifact = dataclasses.replace(priced_model.artifact, manifest=manifest)
    assert artifact.deployment == PriceDeployment(manifest["price"])
