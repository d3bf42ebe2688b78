"""Settings of methods: what each checks, and how it decodes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tda_export.errors import UsageError
from tda_export.evaluation.setting import METHODS, Request, check_request, open_setting
from tda_export.runtime import Model
from tda_export.runtime.kv_cache import KvCache
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
