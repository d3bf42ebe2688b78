"""Settings of methods: what each checks, and how it decodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.setting import METHODS, Request, check_request, open_setting
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.scoring import continuation_logits

PROMPT, READ = list(range(5, 29)), [40, 41, 42]


def test_unknown_method_names_those_there_are(model: Model) -> None:
    with pytest.raises(UsageError, match=rf"^Method 'wanda' is not known\. Use {', '.join(METHODS)}\.$"):
        open_setting(model.artifact, model.sessions, "wanda")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("griffin"), "griffin takes --sparsity"),
        (Request("griffin", sparsity=1.0), "sparsity 1.0 is outside"),
        (Request("dense", cett=0.1), "dense reads every neuron"),
        (Request("tda", allocation="uniform"), "Give --sparsity"),
        (Request("tda", sparsity=0.5, cett=0.1), "Give one of them"),
    ],
)
def test_budgets_that_a_method_does_not_take(model: Model, request_: Request, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_request(model.artifact, request_)


def test_tda_needs_an_artifact_that_selects_by_threshold(model: Model) -> None:
    method = model.artifact.manifest["method"] | {"name": "griffin", "selection": "topk", "density": 0.5}
    artifact = dataclasses.replace(model.artifact, manifest=model.artifact.manifest | {"method": method})
    with pytest.raises(UsageError, match="was built with --method griffin"):
        check_request(artifact, Request("tda"))


@pytest.mark.parametrize("method", ["tda", "dense"])
def test_decodes_as_a_generation_does(model: Model, method: str) -> None:
    setting = open_setting(model.artifact, model.sessions, method)
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    expected = continuation_logits(model, PROMPT, READ, mask="tda" if method == "tda" else "dense")
    np.testing.assert_allclose(setting.decode(cache, READ, mask), expected, atol=1e-5)
    assert (setting.density(mask) == 1.0) == (method == "dense")


def test_budget_chooses_thresholds(model: Model) -> None:
    setting = open_setting(model.artifact, model.sessions, "tda", cett=0.0)
    assert setting.thresholds is not None
    assert setting.thresholds.dtype == np.float32
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT))
    assert setting.density(setting.read(PROMPT, cache)[1]) == 1.0
    assert setting.budget == {"cett": 0.0}
    assert open_setting(model.artifact, model.sessions, "tda").budget == model.artifact.manifest["budget"]


def test_truncation_counts_the_neurons_of_each_token(token_artifact: Path) -> None:
    model = load(token_artifact, provider="cpu")
    setting = open_setting(model.artifact, model.sessions, "tt", sparsity=0.2)
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    logits, density = setting.decode_counted(cache, READ, mask)
    assert cache.length == len(PROMPT) + len(READ)
    densities = []
    cache.truncate(len(PROMPT))
    for token, expected in zip(READ, logits, strict=True):
        step, kept = setting.decode_counted(cache, [token], mask)
        densities.append(kept)
        np.testing.assert_allclose(step[0], expected, atol=1e-4)
    assert density == pytest.approx(np.mean(densities))
    assert setting.ffn_share(density) == pytest.approx((2 + density) / 3)
    with pytest.raises(TdaError, match="decode_counted"):
        setting.density(mask)


def test_truncation_of_nothing_is_dense(token_artifact: Path) -> None:
    model = load(token_artifact, provider="cpu")
    setting = open_setting(model.artifact, model.sessions, "tt", cett=0.0)
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    logits, density = setting.decode_counted(cache, READ, mask)
    assert density == 1.0
    cache.truncate(len(PROMPT))
    assert np.array_equal(decode(setting.sessions, cache, READ, None), logits)
