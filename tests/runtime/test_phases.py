"""Prefill in chunks, and decode with a mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.bench.random_model import BYTE_VOCABULARY
from tda_export.calibration.budgets import Budget
from tda_export.graph import contract
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.indexed import IndexedDesign
from tda_export.graph.method import tda
from tda_export.graph.reference import reference_logits
from tda_export.graph.storage import Storage
from tda_export.models.source import ModelSource, resolve_model
from tda_export.runtime import Model, load
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import CHUNK_TOKENS, PromptMask, bind_call, decode, prefill
from tda_export.runtime.session import device_tensor
from tests.runtime.conftest import PROMPT, reference_mask, second_level
from tests.tiny import save_tiny_model

LOGITS = 1e-4  # tolerance of float32 logits of size 1 to 10 after three layers
PROMPTS = st.lists(st.integers(0, BYTE_VOCABULARY - 1), min_size=1, max_size=60)


def read(
    model: Model, tokens: list[int], chunk: int, thresholds: list[float] | None = None, *, prior: bool = True
) -> tuple:
    cache = KvCache(model.artifact.shape, model.provider, model.artifact.shape.max_positions)
    override = None if thresholds is None else np.array(thresholds, np.float32)
    logits, mask = prefill(model.sessions, model.artifact.shape, tokens, cache, override, prior=prior, chunk=chunk)
    assert cache.length == len(tokens)
    return logits, mask


def indices(mask: PromptMask, layer: int) -> list[int]:
    return mask.inputs[contract.mask_indices(layer)].numpy().tolist()


def scores(mask: PromptMask, layer: int) -> np.ndarray:
    """Return sqrt(mean of r^2 over tokens) from the running statistics, float32 [F]."""
    rows = mask.stats[contract.past_neuron_stats(layer)].numpy()
    return np.sqrt(rows[contract.SCORE_ROW] / mask.stats[contract.PAST_STATS_WEIGHT].numpy())


@given(PROMPTS, st.integers(1, 64), st.booleans())
def test_chunks_change_nothing(model: Model, tokens: list[int], chunk: int, prior: bool) -> None:
    """The first chunk begins with the prior, the others with the state of the one before."""
    logits, whole = read(model, tokens, len(tokens), prior=prior)
    chunked_logits, chunked = read(model, tokens, chunk, prior=prior)
    np.testing.assert_allclose(chunked_logits, logits, atol=LOGITS)
    for layer in range(model.artifact.shape.num_layers):
        if len(tokens) > 1 or prior:
            np.testing.assert_allclose(scores(chunked, layer), scores(whole, layer), atol=1e-5)
        # A neuron whose score is within rounding of the threshold may fall on either side.
        threshold = model.artifact.manifest["thresholds"][layer]
        for neuron in set(indices(whole, layer)) ^ set(indices(chunked, layer)):
            assert abs(scores(whole, layer)[neuron] - threshold) < 1e-5


@given(PROMPTS.filter(lambda tokens: len(tokens) > 1), st.lists(st.floats(0, 0.3), min_size=3, max_size=3))
def test_mask_is_what_reaches_the_threshold(model: Model, tokens: list[int], thresholds: list[float]) -> None:
    _, mask = read(model, tokens, CHUNK_TOKENS, thresholds)
    kept = 0
    for layer, threshold in enumerate(thresholds):
        score = scores(mask, layer)
        np.testing.assert_allclose(np.square(score).sum(), 1.0, rtol=1e-5)
        expected = set(np.flatnonzero(score >= np.float32(threshold)).tolist())
        ours = indices(mask, layer)
        assert ours == sorted(set(ours))
        kept += len(expected)
        for neuron in set(ours) ^ (expected or {contract.PADDING_INDEX}):
            assert abs(score[neuron] - threshold) < 1e-6
    assert abs(mask.count(3) - kept) <= 3


def test_one_token_keeps_every_neuron(model: Model) -> None:
    """The first token of a sequence does not count, so without a prior only dense is safe."""
    shape = model.artifact.shape
    _, mask = read(model, model.text.encode("T"), CHUNK_TOKENS, prior=False)
    assert mask.count(3) == shape.num_layers * shape.ffn_size
    assert [indices(mask, layer) for layer in range(shape.num_layers)] == [list(range(shape.ffn_size))] * 3


def test_empty_mask_is_one_padding_index(model: Model) -> None:
    _, mask = read(model, model.text.encode(PROMPT), CHUNK_TOKENS, [2.0, 0.0, 2.0])
    assert [indices(mask, 0), indices(mask, 2)] == [[contract.PADDING_INDEX]] * 2
    assert mask.count(3) == model.artifact.shape.ffn_size


def test_decode_step_equals_prefill(model: Model) -> None:
    shape, tokens = model.artifact.shape, model.text.encode(PROMPT)
    step = DecodeStep(model.sessions, shape, len(tokens))
    prefill(model.sessions, shape, tokens[:5], step.cache)
    for position in range(5, len(tokens)):
        expected, _ = read(model, tokens[: position + 1], CHUNK_TOKENS)
        np.testing.assert_allclose(step.logits(tokens[position]), expected, atol=LOGITS)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
def test_greedy_steps_feed_themselves(model: Model, masked: bool) -> None:
    """A step writes its token where the next step reads it, whether or not it is given again."""
    shape, prompt = model.artifact.shape, model.text.encode(PROMPT)
    chosen = []
    for fed in (True, False):
        step = DecodeStep(model.sessions, shape, len(prompt) + 20)
        logits, mask = prefill(model.sessions, shape, prompt, step.cache)
        step.use(mask if masked else None)
        tokens = [int(logits.argmax())]
        for number in range(19):
            tokens.append(step.greedy(tokens[-1] if fed or not number else None))
        chosen.append(tokens)
    step.cache.truncate(len(prompt))
    expected = [chosen[0][0], *(int(step.logits(token).argmax()) for token in chosen[0][:-1])]
    assert chosen == [expected, expected]


@pytest.mark.parametrize("threshold", [0.0, 0.02, 1e9])
def test_token_thresholds(model: Model, threshold: float) -> None:
    """0 turns them off; a threshold above every estimate skips every neuron. With `decode` too."""
    shape, prompt = model.artifact.shape, model.text.encode(PROMPT)
    step = DecodeStep(model.sessions, shape, len(prompt) + 1)
    _, mask = prefill(model.sessions, shape, prompt, step.cache)
    step.use(mask, np.full(shape.num_layers, threshold, np.float32))
    logits = step.logits(7)

    def again(mask: PromptMask, inputs: Mapping[str, Any]) -> np.ndarray:
        step.cache.truncate(len(prompt))
        return decode(model.sessions, step.cache, [7], mask, inputs)[0]

    given = device_tensor(np.full(shape.num_layers, threshold, np.float32), "cpu")
    np.testing.assert_allclose(again(mask, {contract.TOKEN_THRESHOLDS: given}), logits, atol=LOGITS)
    one_level = again(mask, model.sessions.dense_inputs)
    padding = device_tensor(np.array([-1], np.int32), "cpu")
    tails = {contract.tail_mean(i): mask.inputs[contract.tail_mean(i)] for i in range(3)}
    dropped = again(PromptMask({contract.mask_indices(i): padding for i in range(3)} | tails, {}), {})
    differences = np.abs(logits - one_level).max(), np.abs(logits - dropped).max()
    assert (differences[0] < LOGITS, differences[1] < LOGITS) == (threshold == 0.0, threshold == 1e9)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "dense"])
def test_token_thresholds_of_the_step_are_taken_back(model: Model, masked: bool) -> None:
    """Generations use a step one after another, and thresholds of an earlier one do not stay."""
    shape, prompt = model.artifact.shape, model.text.encode(PROMPT)
    step = DecodeStep(model.sessions, shape, len(prompt) + 1)
    _, mask = prefill(model.sessions, shape, prompt, step.cache)
    step.use(mask, np.full(shape.num_layers, 1e9, np.float32))
    step.logits(7)
    step.cache.truncate(len(prompt))
    step.use(mask if masked else None)
    logits = step.logits(7)
    step.cache.truncate(len(prompt))
    expected = decode(model.sessions, step.cache, [7], mask if masked else None, model.sessions.dense_inputs)[0]
    np.testing.assert_allclose(logits, expected, atol=LOGITS)


def test_default_token_thresholds_are_the_artifacts_own(model: Model) -> None:
    shape, prompt = model.artifact.shape, model.text.encode(PROMPT)
    own = model.artifact.deployment.token_thresholds
    cache = KvCache(shape, "cpu", len(prompt) + 2)
    _, mask = prefill(model.sessions, shape, prompt, cache)
    default = decode(model.sessions, cache, [7, 8], mask)
    cache.truncate(len(prompt))
    given = decode(model.sessions, cache, [7, 8], mask, {contract.TOKEN_THRESHOLDS: device_tensor(own, "cpu")})
    cache.truncate(len(prompt))
    off = decode(model.sessions, cache, [7, 8], mask, model.sessions.dense_inputs)
    assert np.array_equal(default, given)
    assert np.abs(default - off).max() > 100 * LOGITS


@pytest.mark.parametrize("tail", [True, False], ids=["mean", "nothing"])
def test_tail_mean_can_be_left_out(model: Model, source: ModelSource, reference: Any, tail: bool) -> None:
    shape, prompt, continuation = model.artifact.shape, model.text.encode(PROMPT), model.text.encode(" and")
    step = DecodeStep(model.sessions, shape, len(prompt) + len(continuation))
    _, mask = step.read(prompt)
    masks, tails = reference_mask(model, mask)
    assert all(bool(values.any()) for values in tails)
    chosen = tails if tail else [torch.zeros_like(values) for values in tails]
    _, expected = reference_logits(reference, source.spec, prompt, continuation, masks, chosen)
    step.use(mask, tail_mean=tail)
    logits = np.stack([step.logits(token) for token in continuation])
    np.testing.assert_allclose(logits, expected.numpy(), atol=LOGITS)


@pytest.mark.parametrize("size", [1, 2, 5], ids="S={}".format)
@pytest.mark.parametrize("how", ["masked", "two levels", "dense"])
def test_decode_equals_transformers(model: Model, source: ModelSource, reference: Any, size: int, how: str) -> None:
    """Given tokens, S in a call, and the rest in the last call."""
    shape, prompt = model.artifact.shape, model.text.encode(PROMPT)
    continuation = model.text.encode(" and the boats")
    cache = KvCache(shape, "cpu", shape.max_positions)
    _, mask = prefill(model.sessions, shape, prompt, cache)
    masks, tails = (None, None) if how == "dense" else reference_mask(model, mask)
    level = second_level(model, model.artifact.deployment.token_thresholds) if how == "two levels" else None
    _, expected = reference_logits(reference, source.spec, prompt, continuation, masks, tails, level)
    inputs = model.sessions.dense_inputs if how == "masked" else {}
    pieces = [continuation[start : start + size] for start in range(0, len(continuation), size)]
    logits = [decode(model.sessions, cache, piece, None if how == "dense" else mask, inputs) for piece in pieces]
    assert [rows.shape for rows in logits] == [(len(piece), shape.vocab_size) for piece in pieces]
    assert cache.length == len(prompt) + len(continuation)
    np.testing.assert_allclose(np.concatenate(logits), expected.numpy(), atol=LOGITS)


def test_decode_step_equals_decode(model: Model) -> None:
    shape, prompt, continuation = model.artifact.shape, model.text.encode(PROMPT), model.text.encode(" and")
    step = DecodeStep(model.sessions, shape, shape.max_positions)
    cache = step.cache
    _, mask = prefill(model.sessions, shape, prompt, cache)
    together = decode(model.sessions, cache, continuation, mask, model.sessions.dense_inputs)
    cache.truncate(len(prompt))
    dense = decode(model.sessions, cache, continuation, None)
    cache.truncate(len(prompt))
    step.use(mask)
    one_by_one = [step.logits(token) for token in continuation]
    np.testing.assert_allclose(np.stack(one_by_one), together, atol=LOGITS)
    assert np.abs(dense - together).max() > 100 * LOGITS  # the mask does something


def test_a_bound_call_is_not_run(model: Model) -> None:
    """Its tokens count as read only after the caller has run and committed it."""
    shape, tokens = model.artifact.shape, model.text.encode(PROMPT)
    cache = KvCache(shape, "cpu", shape.max_positions)
    every = {contract.NUM_LOGITS: device_tensor(np.zeros(1, np.int64), "cpu")}
    call = bind_call(model.sessions.prefill, cache, tokens, every)
    assert cache.length == 0
    assert cache.mask.sum() == len(tokens)
    logits = call.run()[contract.LOGITS].numpy()
    assert logits.shape == (1, len(tokens), shape.vocab_size)
    assert cache.length == 0
    cache.commit()
    assert cache.length == len(tokens)
    np.testing.assert_allclose(logits[0, -1], read(model, tokens, CHUNK_TOKENS)[0], atol=LOGITS)


@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize("number", [None, 1, 3, 100, 0])
def test_logits_of_a_padded_prompt(model: Model, padding: int, number: int | None) -> None:
    """An application that pads calls on the right to one size gets the logits of the last real token."""
    shape, tokens = model.artifact.shape, model.text.encode(PROMPT)
    cache = KvCache(shape, "cpu", shape.max_positions)
    inputs = {} if number is None else {contract.NUM_LOGITS: device_tensor(np.array([number], np.int64), "cpu")}
    call = bind_call(model.sessions.prefill, cache, [*tokens, *[7] * padding], inputs)
    attended = np.array([[1] * len(tokens) + [0] * padding], np.int64)  # T = S: the sequence begins with this call
    call.feed(contract.ATTENTION_MASK, attended)
    logits = call.run()[contract.LOGITS].numpy()[0]
    expected = np.stack([read(model, tokens[:end], CHUNK_TOKENS)[0] for end in range(1, len(tokens) + 1)])
    if number == 0:
        assert len(logits) == len(tokens) + padding  # for every position, with the padding
        np.testing.assert_allclose(logits[: len(tokens)], expected, atol=LOGITS)
    else:
        np.testing.assert_allclose(logits, expected[-(number or 1) :], atol=LOGITS)


def test_prompt_longer_than_a_chunk(tmp_path: Path) -> None:
    """The driver reads long prompts in chunks, against transformers, which reads them at once."""
    source = resolve_model(str(save_tiny_model("llama", tmp_path / "model", max_position_embeddings=4096)))
    request = BuildRequest(
        source, Storage("float32"), IndexedDesign(tda(), [0.08] * 3), Budget(sparsity=0.5).describe()
    )
    export_artifact(request, tmp_path / "artifact", quiet=True, check=lambda folder: None)
    model = load(tmp_path / "artifact", provider="cpu")
    tokens = torch.randint(
        0, BYTE_VOCABULARY, (CHUNK_TOKENS + 300,), generator=torch.Generator().manual_seed(0)
    ).tolist()

    generation = model.generate(tokens, max_new_tokens=1)
    (first,) = (token.id for token in generation)
    with torch.inference_mode():
        expected = source.reference()(torch.tensor([tokens])).logits[0, -1].numpy()
    assert first == int(expected.argmax())
    logits, chunked = read(model, tokens, CHUNK_TOKENS)
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    _, whole = read(model, tokens, len(tokens))
    assert [indices(chunked, layer) for layer in range(3)] == [indices(whole, layer) for layer in range(3)]
    assert 0 < whole.count(3) < 3 * 96
    assert generation.metrics.density == whole.count(3) / (3 * 96)
