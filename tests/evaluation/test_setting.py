"""Settings of methods: checks, and decoding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import read_calibration
from tda_export.deployments import mask_deployment
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import METHODS, PAPER_CETT, Request, check_request, open_setting
from tda_export.evaluation.setting import Counted, Setting
from tda_export.ffn_share import GATED
from tda_export.graph import contract
from tda_export.graph.derive import counting_sessions
from tda_export.graph.reference import masked_ffn
from tda_export.models.source import ModelSource
from tda_export.runtime import Model, load
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import Refresh, one_level
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import PromptMask, bind_call, decode, prefill
from tda_export.runtime.scoring import continuation_logits
from tda_export.runtime.session import device_tensor
from tests.runtime.conftest import reference_mask, second_level

PROMPT, READ = list(range(5, 29)), [40, 41, 42]
KL_BUDGETS = [Request(sparsity=0.4), Request(max_kl=0.05)]


def with_manifest(artifact: Artifact, **changes: Any) -> Artifact:
    """Return the artifact with another manifest."""
    return dataclasses.replace(artifact, manifest=artifact.manifest | changes)


def test_unknown_method_names_those_there_are(model: Model) -> None:
    with pytest.raises(UsageError, match=rf"^Method 'wanda' is not known\. Use {', '.join(METHODS)}\.$"):
        open_setting(model.artifact, model.sessions, Request("wanda"))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("griffin"), "^--method griffin takes --sparsity, and no other budget"),
        (Request("griffin", sparsity=0.5, refresh=Refresh(4)), "griffin takes --sparsity, and no other"),
        (Request("griffin", sparsity=0.5, max_kl=0.5), "griffin takes --sparsity, and no other"),
        (Request("griffin", sparsity=0.5, calibration=Path("x")), "griffin takes --sparsity, and no other"),
        (Request("griffin", sparsity=1.0), "sparsity 1.0 is outside"),
        (Request("dense", cett=0.1), "dense reads every neuron"),
        (Request("dense", max_kl=0.1), "dense reads every neuron"),
        (Request("dense", refresh=Refresh(4)), "dense reads every neuron"),
        (Request("dense", calibration=Path("x")), "dense reads every neuron"),
        (Request("tda", allocation="uniform"), "Give --sparsity"),
        (Request("tda", sparsity=0.5, cett=0.1), "Give exactly one budget"),
        (Request("tda", sparsity=0.5, max_kl=0.1), "Give exactly one budget"),
        (Request("tda", calibration=Path("x")), r"^--calibration has no effect without a budget\. Give --sparsity"),
        (Request("paper", sparsity=0.5), r"^--method paper takes --cett \(0\.2 unless given\), and nothing else\.$"),
        (Request("paper", refresh=Refresh(4)), "paper takes --cett"),
        (Request("paper", max_kl=0.5), "paper takes --cett"),
        (Request("paper"), r"^--method paper takes thresholds of single tokens, and this calibration is of prompts\. "),
        (Request("tt", cett=0.2), "^--method tt takes thresholds of single tokens, .*--estimator token --curves-only"),
        (Request("tt"), "^--method tt needs a budget"),
        (Request("tt", cett=0.2, sparsity=0.2), "^--method tt needs a budget"),
        (Request("tt", cett=0.2, refresh=Refresh(4)), "^--method tt takes --cett or --sparsity, and nothing else"),
        (Request("tt", sparsity=0.2, allocation="uniform"), "and nothing else"),
        (Request("paper", calibration=Path("gone")), "^gone: no such calibration file"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_budgets_that_a_method_does_not_take(model: Model, request_: Request, words: str) -> None:
    with pytest.raises((UsageError, TdaError), match=words):
        check_request(model.artifact, request_)


@pytest.mark.parametrize("method", ["tda", "paper"])
def test_masks_by_threshold_need_an_artifact_that_selects_by_it(model: Model, method: str) -> None:
    own = model.artifact.manifest["method"] | {"name": "griffin", "selection": "topk", "density": 0.5}
    with pytest.raises(UsageError, match=f"was built with --method griffin, so {method} cannot be measured"):
        check_request(with_manifest(model.artifact, method=own), Request(method))


@pytest.mark.parametrize(
    "changes",
    [{"prior_tokens": 0.0}, {"method": {"tail": "zero"}}, {"method": {"two_levels": False}}],
    ids=["prior", "tail", "levels"],
)
def test_budget_by_kl_of_an_artifact_that_was_not_built_for_it(model: Model, changes: dict[str, Any]) -> None:
    manifest = model.artifact.manifest
    changes = {key: manifest[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
    artifact = with_manifest(model.artifact, **changes)
    with pytest.raises(UsageError, match=r"without the prior and the tail mean .* --allocation kl, or ask for"):
        mask_deployment(artifact, Budget(sparsity=0.5))
    assert mask_deployment(artifact, Budget(sparsity=0.5, allocation="uniform")).thresholds is not None


def test_budget_of_a_calibration_of_another_model(model: Model) -> None:
    path = model.artifact.file(contract.CALIBRATION_FILE)
    artifact = with_manifest(model.artifact, model=model.artifact.manifest["model"] | {"fingerprint": "0" * 64})
    with pytest.raises(UsageError, match=r"was calibrated on another model .* Give one of the same model with --cal"):
        mask_deployment(artifact, Budget(sparsity=0.5), path)


def test_budget_without_a_calibration(model: Model, tiny_calibration: Path) -> None:
    files = {name: entry for name, entry in model.artifact.manifest["files"].items() if "calibration" not in name}
    artifact = with_manifest(model.artifact, files=files)
    with pytest.raises(
        UsageError, match=r"contains no calibration, so its budget is fixed\. Leave the budget out; eval also takes"
    ):
        mask_deployment(artifact, Budget(sparsity=0.5))
    budget = Budget(sparsity=0.4)
    other, own = mask_deployment(artifact, budget, tiny_calibration), mask_deployment(model.artifact, budget)
    assert other.thresholds is not None
    assert own.thresholds is not None
    assert np.array_equal(other.thresholds, own.thresholds)


@pytest.mark.parametrize("budget", [Budget(sparsity=0.5, allocation="uniform"), Budget(sparsity=0.5), Budget(max_kl=1)])
def test_budget_keeps_the_refresh_of_the_artifact(model: Model, budget: Budget) -> None:
    artifact = with_manifest(model.artifact, refresh={"tokens": 6, "decay": 0.5})
    assert mask_deployment(artifact, budget).refresh == Refresh(6, 0.5)


@pytest.mark.parametrize("method", ["tda", "dense"])
def test_decodes_as_a_generation_does(model: Model, method: str) -> None:
    setting = open_setting(model.artifact, model.sessions, Request(method))
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    expected = continuation_logits(model, PROMPT, READ, mask="tda" if method == "tda" else "dense")
    np.testing.assert_allclose(setting.decode(cache, READ, mask), expected, atol=1e-5)
    assert (setting.density(mask) == 1.0) == (method == "dense")
    cache.truncate(len(PROMPT))
    dense = continuation_logits(model, PROMPT, READ, mask="dense")
    np.testing.assert_allclose(setting.decode(cache, READ, None), dense, atol=1e-5)


@pytest.mark.parametrize("request_", [Request(), *KL_BUDGETS, Request(cett=0.2), Request("dense")], ids=str)
def test_a_step_decodes_as_the_setting_does(model: Model, request_: Request) -> None:
    setting = open_setting(model.artifact, model.sessions, request_)
    step = setting.open_step(len(PROMPT) + len(READ))
    how = setting.deployment
    step.begin(PROMPT, how)
    step.follow(how if setting.masked else None)
    logits = np.stack([step.logits(token) for token in READ])
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    np.testing.assert_allclose(setting.decode(cache, READ, mask), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("built", "tail"), [({"cett": 0.2}, True), ({"max_kl": 0.1}, False), ({"sparsity": 0.5}, False)]
)
def test_budget_without_the_path_keeps_a_tail_that_was_asked_for(
    model: Model, built: dict[str, float], tail: bool
) -> None:
    """If an artifact was built by KL, its tail mean belongs to the path."""
    how = mask_deployment(with_manifest(model.artifact, budget=built), Budget(cett=0.1))
    assert (how.tail_mean, how.prior) == (tail, False)


def test_budget_chooses_thresholds(model: Model) -> None:
    setting = open_setting(model.artifact, model.sessions, Request(cett=0.0))
    assert setting.deployment.thresholds is not None
    assert setting.deployment.thresholds.dtype == np.float32
    assert not setting.deployment.prior
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT))
    assert setting.density(setting.read(PROMPT, cache)[1]) == 1.0
    assert setting.budget == {"cett": 0.0}
    assert open_setting(model.artifact, model.sessions, Request()).budget == model.artifact.manifest["budget"]


@pytest.mark.parametrize("request_", KL_BUDGETS, ids=str)
def test_budget_by_kl_takes_a_point_of_the_path(model: Model, request_: Request) -> None:
    setting = open_setting(model.artifact, model.sessions, request_)
    calibration = read_calibration(model.artifact.file(contract.CALIBRATION_FILE))
    chosen = calibration.allocate(Budget(sparsity=request_.sparsity, max_kl=request_.max_kl))
    how = setting.deployment
    assert how.thresholds is not None
    assert how.thresholds.tolist() == pytest.approx(chosen.thresholds)
    assert how.token_thresholds.tolist() == pytest.approx(chosen.token_thresholds)
    assert (how.prior, how.tail_mean, how.refresh) == (True, True, Refresh())
    expected = 1 - chosen.sparsity
    assert how.ffn_share(np.asarray(chosen.density)) == pytest.approx(expected, abs=1e-6)
    assert setting.per_token


# The paper's method


def test_paper_is_one_level_by_the_cett_of_tokens(model: Model, token_artifact: Path) -> None:
    """On an artifact built with both levels, with another calibration of tokens."""
    path = token_artifact / contract.CALIBRATION_FILE
    calibration = read_calibration(path)
    for cett in (None, 0.4):
        setting = open_setting(model.artifact, model.sessions, Request("paper", cett=cett, calibration=path))
        thresholds = calibration.allocate(Budget(cett=cett or PAPER_CETT)).thresholds
        assert setting.budget == {"cett": cett or PAPER_CETT}
        assert not setting.per_token
        cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
        _, mask = setting.read(PROMPT, cache)
        counted = setting.decode_counted(cache, READ, mask)
        expected = continuation_logits(model, PROMPT, READ, mask="tda", deployment=one_level(thresholds, 3, GATED))
        np.testing.assert_allclose(counted.logits, expected, atol=1e-5)
        assert counted.ffn_share == counted.density == setting.density(mask) < 1.0


def test_paper_of_an_artifact_of_tokens_is_its_own_calibration(token_artifact: Path) -> None:
    model = load(token_artifact, provider="cpu")
    calibration = read_calibration(token_artifact / contract.CALIBRATION_FILE)
    setting = open_setting(model.artifact, model.sessions, Request("paper"))
    assert setting.deployment.thresholds is not None
    expected = calibration.allocate(Budget(cett=PAPER_CETT)).thresholds
    assert setting.deployment.thresholds.tolist() == pytest.approx(expected)


# Counting


def slow_counts(model: Model, source: ModelSource, reference: Any, mask: PromptMask, thresholds: np.ndarray) -> Any:
    """Count with transformers the neurons of each layer's mask that each token of READ keeps, int [L, S]."""
    masks, tails = reference_mask(model, mask)
    level, counts = second_level(model, thresholds), {}

    class Counting:
        def keep(self, layer: int, activated: torch.Tensor) -> torch.Tensor:
            kept = level.keep(layer, activated)
            counts[layer] = (kept * masks[layer]).sum(dim=-1).long().tolist()
            return kept

    with torch.inference_mode():
        cache = reference(torch.tensor([PROMPT]), use_cache=True).past_key_values
        with masked_ffn(reference, source.spec, masks, tails, Counting()):  # type: ignore[arg-type]
            reference(torch.tensor([READ]), past_key_values=cache, use_cache=True)
    return np.array([counts[layer] for layer in range(3)])


def padded(mask: PromptMask, padding: int) -> PromptMask:
    """Return the mask with this many padding indices between and after its indices."""
    inputs = dict(mask.inputs)
    for layer in range(3):
        indices = mask.indices(layer)
        filled = np.concatenate([[-1] * padding, indices[:5], [-1] * padding, indices[5:], [-1] * padding])
        inputs[contract.mask_indices(layer)] = device_tensor(filled.astype(np.int32), "cpu")
    return PromptMask(inputs, mask.stats)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.05, 1e9])
def test_counting_graph_counts_what_transformers_keep(
    model: Model, source: ModelSource, reference: Any, threshold: float, padding: int
) -> None:
    shape = model.artifact.shape
    cache = KvCache(shape, "cpu", len(PROMPT) + len(READ))
    _, mask = prefill(model.sessions, shape, PROMPT, cache, np.array([0.05, 0.08, 0.1], np.float32))
    thresholds = np.full(3, threshold, np.float32)
    inputs = padded(mask, padding).inputs | {contract.TOKEN_THRESHOLDS: device_tensor(thresholds, "cpu")}
    sessions = counting_sessions(model.artifact, model.sessions)
    call = bind_call(sessions.decode, cache, READ, inputs)
    call.allocate(contract.KEPT_NEURONS, "cpu")
    outputs = call.run()
    counts = outputs[contract.KEPT_NEURONS].numpy()
    assert counts.dtype == np.int64
    assert np.array_equal(counts, slow_counts(model, source, reference, mask, thresholds))
    if threshold == 0.0:
        assert counts.tolist() == [[len(mask.indices(layer))] * len(READ) for layer in range(3)]
    elif threshold == 1e9:
        assert not counts.any()
    plain = decode(model.sessions, cache, READ, mask, {contract.TOKEN_THRESHOLDS: device_tensor(thresholds, "cpu")})
    np.testing.assert_allclose(outputs[contract.LOGITS].numpy()[0], plain, atol=1e-4)


def test_counting_graph_of_an_empty_mask(model: Model) -> None:
    shape = model.artifact.shape
    cache = KvCache(shape, "cpu", len(PROMPT) + len(READ))
    _, mask = prefill(model.sessions, shape, PROMPT, cache, np.array([2.0, 0.0, 2.0], np.float32))
    call = bind_call(
        counting_sessions(model.artifact, model.sessions).decode, cache, READ, mask.inputs | model.sessions.dense_inputs
    )
    call.allocate(contract.KEPT_NEURONS, "cpu")
    assert call.run()[contract.KEPT_NEURONS].numpy().tolist() == [[0] * 3, [shape.ffn_size] * 3, [0] * 3]


def test_counted_share_is_that_of_gate_up_and_down_rows(model: Model, source: ModelSource, reference: Any) -> None:
    setting = open_setting(model.artifact, model.sessions, Request())
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    counted = setting.decode_counted(cache, READ, mask)
    counts = slow_counts(model, source, reference, mask, setting.deployment.token_thresholds)
    masks = sum(len(mask.indices(layer)) for layer in range(3))
    assert counted.density == pytest.approx(masks / 288)
    assert counted.sparse_share == pytest.approx((masks + 2 * counts.sum(axis=0).mean()) / (3 * 288))
    assert (counted.ffn_share, counted.refresh_share) == (counted.sparse_share, 0.0)
    cache.truncate(len(PROMPT))
    np.testing.assert_allclose(setting.decode(cache, READ, mask), counted.logits, atol=1e-4)


# Refreshes


def slow_refreshed(setting: Setting, tokens: list[int]) -> Counted:
    """Decode token by token. At a refresh, read the prompt and all tokens so far in a new cache."""
    period, how = setting.deployment.refresh.tokens, setting.deployment
    sparse_setting = setting.without_refresh()
    logits, densities, shares, dense = [], [], [], 0
    for place in range(len(tokens)):
        done = place // period * period  # tokens that refreshes have read
        cache = KvCache(setting.shape, "cpu", len(PROMPT) + len(tokens))
        reader = setting.open_reader(cache)
        _, mask = setting.read(PROMPT, cache, reader)
        for start in range(0, done, period):
            _, mask = reader.read(tokens[start : start + period], how.thresholds, decay=how.refresh.decay)
        if (place + 1) % period == 0:
            last, _ = reader.read(tokens[done : place + 1], how.thresholds, decay=how.refresh.decay)
            logits.append(last)
            dense += 1
            continue
        for token in tokens[done : place + 1]:
            counted = sparse_setting.decode_counted(cache, [token], mask)
        logits.append(counted.logits[0])
        densities.append(counted.density)
        shares.append(counted.ffn_share)
    share = float(np.mean(shares))
    mean = (sum(shares) + dense) / len(tokens)
    return Counted(np.stack(logits), float(np.mean(densities)), share, mean)


@pytest.mark.parametrize("request_", [Request(), Request(sparsity=0.4, allocation="uniform")], ids=["kl", "uniform"])
@pytest.mark.parametrize(
    ("refresh", "count"), [(Refresh(2), 6), (Refresh(3, 0.5), 8), (Refresh(5), 5), (Refresh(9), 4)]
)
def test_decode_counted_with_refreshes_equals_a_loop(
    model: Model, request_: Request, refresh: Refresh, count: int
) -> None:
    """Also if the last refresh is at the last token, and if there is none."""
    setting = open_setting(model.artifact, model.sessions, dataclasses.replace(request_, refresh=refresh))
    assert setting.budget["refresh"] == refresh.tokens
    tokens = list(range(40, 40 + count))
    cache = KvCache(setting.shape, "cpu", len(PROMPT) + count)
    reader = setting.open_reader(cache)
    _, mask = setting.read(PROMPT, cache, reader)
    counted = setting.decode_counted(cache, tokens, mask, reader)
    expected = slow_refreshed(setting, tokens)
    assert cache.length == len(PROMPT) + count
    np.testing.assert_allclose(counted.logits, expected.logits, atol=1e-4)
    assert counted.density == pytest.approx(expected.density)
    assert counted.sparse_share == pytest.approx(expected.sparse_share)
    assert counted.ffn_share == pytest.approx(expected.ffn_share)
    assert counted.refresh_share == pytest.approx(expected.ffn_share - expected.sparse_share)


# Threshold truncation


def test_truncation_counts_the_neurons_of_each_token(token_artifact: Path) -> None:
    model = load(token_artifact, provider="cpu")
    setting = open_setting(model.artifact, model.sessions, Request("tt", sparsity=0.2))
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    counted = setting.decode_counted(cache, READ, mask)
    assert cache.length == len(PROMPT) + len(READ)
    densities = []
    cache.truncate(len(PROMPT))
    for token, expected in zip(READ, counted.logits, strict=True):
        step = setting.decode_counted(cache, [token], mask)
        densities.append(step.density)
        np.testing.assert_allclose(step.logits[0], expected, atol=1e-4)
    assert counted.density == pytest.approx(np.mean(densities))
    assert counted.ffn_share == counted.sparse_share == pytest.approx((2 + counted.density) / 3)
    with pytest.raises(TdaError, match="decode_counted"):
        setting.density(mask)


def test_truncation_of_nothing_is_dense(token_artifact: Path) -> None:
    model = load(token_artifact, provider="cpu")
    setting = open_setting(model.artifact, model.sessions, Request("tt", cett=0.0))
    cache = KvCache(model.artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    counted = setting.decode_counted(cache, READ, mask)
    assert counted.density == 1.0
    cache.truncate(len(PROMPT))
    assert np.array_equal(decode(setting.sessions, cache, READ, None), counted.logits)
