"""Refreshes, against a slow reference that reads all tokens again by hand."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tda_export.calibration.file import read_calibration
from tda_export.errors import TdaError
from tda_export.ffn_share import GATED
from tda_export.graph import contract
from tda_export.graph.prefill import calibrated_prior
from tda_export.graph.reference import reference_scores
from tda_export.models.source import ModelSource
from tda_export.runtime import Model, load, open_artifact
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.deployment import Deployment, Refresh
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import Prefill, PromptMask, decode, prefill
from tda_export.runtime.session import device_tensor
from tests.runtime.conftest import PROMPT, edit_manifest, mask_alone, without_native_kernels

NEURONS = 3 * 96
DENSE_BYTES = NEURONS * 3 * 64 * 4


def statistics(mask: PromptMask) -> tuple[np.ndarray, float]:
    """Return the running statistics [L, 2, F] and their weight."""
    rows = [mask.stats[contract.past_neuron_stats(layer)].numpy().copy() for layer in range(3)]
    return np.stack(rows), float(mask.stats[contract.PAST_STATS_WEIGHT].numpy()[0])


def read_alone(model: Model, tokens: list[int], **options: Any) -> tuple[np.ndarray, float]:
    """Return the statistics of one reading in a cache of its own."""
    cache = KvCache(model.artifact.shape, "cpu", len(tokens))
    return statistics(prefill(model.sessions, model.artifact.shape, tokens, cache, **options)[1])


def slow_generation(model: Model, prompt: list[int], how: Deployment, count: int) -> tuple[list[int], list[float]]:
    """Generate greedily. Every N tokens prefill reads all tokens so far in a new cache, piece by piece.

    Returns:
        The tokens, and the fraction of FFN bytes that each token after the first read.
    """
    shape, tokens, shares = model.artifact.shape, list[int](), list[float]()
    inputs = {contract.TOKEN_THRESHOLDS: device_tensor(how.token_thresholds, "cpu")}
    period = how.refresh.tokens or count
    while len(tokens) < count:
        cache = KvCache(shape, "cpu", len(prompt) + count)
        reader = Prefill(model.sessions, shape, cache)
        logits, mask = reader.read(prompt, how.thresholds, prior=how.prior)
        for start in range(0, len(tokens), period):
            piece = tokens[start : start + period]
            logits, mask = reader.read(piece, how.thresholds, decay=how.refresh.decay)
        if tokens:
            shares.append(1.0)
        tokens.append(int(logits.argmax()))
        share = how.ffn_share(mask.densities(3, shape.ffn_size))
        while len(tokens) < count and len(tokens) % period:
            given = mask if how.tail_mean else mask.without_tail()
            tokens.append(int(decode(model.sessions, cache, tokens[-1:], given, inputs)[0].argmax()))
            shares.append(share)
    return tokens, shares


@pytest.mark.parametrize("two_levels", [True, False], ids=["two levels", "mask"])
@pytest.mark.parametrize("refresh", [Refresh(2), Refresh(5), Refresh(7, 0.5), Refresh(8, 0.0)], ids=str)
def test_refreshed_generation_equals_reading_anew(model: Model, refresh: Refresh, two_levels: bool) -> None:
    how = (model.artifact.deployment if two_levels else mask_alone(model)).with_refresh(refresh)
    expected, shares = slow_generation(model, model.text.encode(PROMPT), how, 24)
    generation = model.generate(PROMPT, max_new_tokens=24, deployment=how)
    assert [token.id for token in generation] == expected
    metrics = generation.metrics
    assert metrics.refreshes == shares.count(1.0) == 23 // refresh.tokens
    assert metrics.sparsity == pytest.approx(1 - np.mean(shares))
    assert metrics.bytes_per_token == pytest.approx(np.mean(shares) * DENSE_BYTES, abs=1)
    never = model.generate(PROMPT, max_new_tokens=24, deployment=how.with_refresh(Refresh()))
    assert [token.id for token in never] != expected  # refreshes have an effect


@pytest.mark.parametrize("period", [2, 3, 7])
def test_refreshes_of_a_mask_that_drops_nothing_are_dense(model: Model, period: int) -> None:
    how = Deployment(np.zeros(3, np.float32), np.zeros(3, np.float32), refresh=Refresh(period), ffn_matrices=GATED)
    generation = model.generate(PROMPT, max_new_tokens=30, deployment=how)
    dense = model.generate(PROMPT, max_new_tokens=30, mask="dense")
    assert [token.id for token in generation] == [token.id for token in dense]
    assert generation.metrics.refreshes == 29 // period
    assert generation.metrics.sparsity == 0.0


def test_dense_decoding_is_not_refreshed(model: Model) -> None:
    how = model.artifact.deployment.with_refresh(Refresh(2))
    generation = model.generate(PROMPT, max_new_tokens=9, mask="dense", deployment=how)
    plain = model.generate(PROMPT, max_new_tokens=9, mask="dense")
    assert [token.id for token in generation] == [token.id for token in plain]
    assert (generation.metrics.refreshes, generation.metrics.sparsity) == (0, 0.0)


@pytest.mark.parametrize("end", ["length", "context", "stop"])
@pytest.mark.parametrize("period", [2, 3])
def test_no_token_is_lost_or_doubled(model: Model, monkeypatch: pytest.MonkeyPatch, period: int, end: str) -> None:
    """For every distance between the end and a refresh, also in the middle of a character."""
    answer = model.text.encode("naïve 世界")
    how = model.artifact.deployment.with_refresh(Refresh(period))
    for length in range(1, len(answer) + 1):
        script = iter([*answer[:length], 2])
        monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling, s=script: lambda _: next(s))
        limits = {"length": {"max_new_tokens": length}, "context": {"context": len(PROMPT) + length}, "stop": {}}
        generation = model.generate(PROMPT, deployment=how, **limits[end])
        tokens = list(generation)
        assert [token.id for token in tokens] == answer[:length]
        assert generation.metrics.finish_reason == end
        assert generation.metrics.new_tokens == length
        # An end token that a refresh chose comes after it. A limit ends a generation before the next refresh.
        assert generation.metrics.refreshes == (length if end == "stop" else length - 1) // period
        assert generation.text == bytes("naïve 世界", "utf-8")[:length].decode(errors="replace")
        pieces = "".join(token.text for token in tokens)
        assert pieces == (generation.text.rstrip("\N{REPLACEMENT CHARACTER}") if end == "stop" else generation.text)


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_a_refresh_adds_to_the_statistics(model: Model, decay: float) -> None:
    """Keys and values become those of a dense reading, whatever sparse steps had written."""
    tokens, shape = model.text.encode(PROMPT), model.artifact.shape
    step = DecodeStep(model.sessions, shape, len(tokens))
    how = model.artifact.deployment
    _, mask = step.read(tokens[:10], how.thresholds)
    step.use(mask, how.token_thresholds)
    for token in tokens[10:15]:
        step.logits(token)
    logits, mask = step.reread(tokens[10:16], how.thresholds, decay)
    (before, weight), (after, whole) = read_alone(model, tokens[:10]), read_alone(model, tokens[:16])
    rows, found = statistics(mask)
    np.testing.assert_allclose(rows, decay * before + (after - before), atol=1e-4)
    assert found == pytest.approx(decay * weight + 6)
    assert whole == pytest.approx(weight + 6)
    assert step.cache.length == 16
    cache = KvCache(shape, "cpu", 16)
    expected, _ = prefill(model.sessions, shape, tokens[:16], cache)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    for layer in range(3):
        for ours, dense in zip(step.cache.keys_and_values(layer), cache.keys_and_values(layer), strict=True):
            np.testing.assert_allclose(ours.numpy()[:, :, :16], dense.numpy()[:, :, :16], atol=1e-4)


def test_statistics_begin_with_the_prior(model: Model, source: ModelSource, reference: Any) -> None:
    """They are the prior plus the prompt's by transformers. Without a prior they are the prompt's alone."""
    tokens, manifest = model.text.encode(PROMPT), model.artifact.manifest
    calibration = read_calibration(model.artifact.file(contract.CALIBRATION_FILE))
    prior = calibrated_prior(calibration.sums, manifest["prior_tokens"])
    assert manifest["prior_tokens"] == prior.tokens == 64.0
    counted = len(tokens) - 1
    cache = KvCache(model.artifact.shape, "cpu", len(tokens))
    reader = Prefill(model.sessions, model.artifact.shape, cache)
    own = np.stack([s.numpy() ** 2 for s in reference_scores(reference, source.spec, tokens, magnitude=True)]) * counted
    for with_prior in (True, False, True, False):
        cache.truncate(0)
        rows, weight = statistics(reader.read(tokens, prior=with_prior)[1])
        expected = own + prior.stats[:, contract.SCORE_ROW] * with_prior
        np.testing.assert_allclose(rows[:, contract.SCORE_ROW], expected, atol=1e-4)
        assert weight == pytest.approx(counted + 64.0 * with_prior)


def test_prior_of_one_token_is_the_prior_alone(model: Model) -> None:
    calibration = read_calibration(model.artifact.file(contract.CALIBRATION_FILE))
    prior = calibrated_prior(calibration.sums, 64.0)
    assert np.array_equal(read_alone(model, [70])[0], prior.stats)
    assert not read_alone(model, [70], prior=False)[0].any()
    mean = calibration.sums.score_square / calibration.sums.tokens * 64.0
    torch.testing.assert_close(torch.from_numpy(prior.stats[:, contract.SCORE_ROW]), mean.float())


@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
def test_refresh_that_is_not_finite(artifact_copy: Path, native: bool) -> None:
    """The rotation at the second new token is spoiled. The refresh after two tokens is the first to read it."""
    artifact = open_artifact(artifact_copy)
    entry = artifact.manifest["weights"][contract.COS_CACHE]
    path, shape = artifact.file(contract.WEIGHTS_FILE), tuple(entry["shape"])
    rows = np.memmap(path, np.float32, mode="r+", offset=entry["offset"], shape=shape)
    rows[len(PROMPT) + 1] = np.nan
    rows.flush()
    with contextlib.nullcontext() if native else without_native_kernels():
        model = load(artifact_copy, provider="cpu")
    generation = model.generate(PROMPT, deployment=artifact.deployment.with_refresh(Refresh(2)))
    assert [next(generation).id, next(generation).id]
    with pytest.raises(TdaError, match=f"not finite at token {len(PROMPT) + 2}"):
        next(generation)
    after = model.generate("The sea", max_new_tokens=6, deployment=mask_alone(model))
    fresh = load(artifact_copy, provider="cpu").generate("The sea", max_new_tokens=6, deployment=mask_alone(model))
    assert [token.id for token in after] == [token.id for token in fresh]


def test_refresh_of_the_artifact_is_the_default(model: Model, artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest.update(refresh={"tokens": 4, "decay": 0.5}))
    loaded = load(artifact_copy, provider="cpu")
    generation = loaded.generate(PROMPT, max_new_tokens=20)
    how = model.artifact.deployment.with_refresh(Refresh(4, 0.5))
    assert [token.id for token in generation] == [
        token.id for token in model.generate(PROMPT, max_new_tokens=20, deployment=how)
    ]
    assert generation.metrics.refreshes == 4
    plain = dataclasses.replace(how, refresh=Refresh())
    assert model.artifact.deployment.refresh == plain.refresh


def test_sampling_is_refreshed_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that takes the likeliest token gives the result of greedy decoding."""
    how = model.artifact.deployment.with_refresh(Refresh(3))
    greedy = [token.id for token in model.generate(PROMPT, max_new_tokens=20, deployment=how)]
    monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling: lambda logits: int(logits.argmax()))
    assert [token.id for token in model.generate(PROMPT, max_new_tokens=20, deployment=how)] == greedy
