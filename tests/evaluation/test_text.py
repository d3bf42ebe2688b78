"""Quality on a text, against a slow reference and transformers."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.text import TextSettings, WindowQuality, cut_windows, evaluate_text, summarise
from tda_export.models.source import ModelSource
from tda_export.runtime import Model
from tda_export.runtime.deployment import Refresh
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.scoring import compare, continuation_logits

SETTINGS = TextSettings(prompts=3, prompt_tokens=24, continuation_tokens=7)
FLOAT32 = 1e-4


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 200, SETTINGS.window).tolist() for _ in range(SETTINGS.prompts)]


@given(
    st.integers(0, 2000),
    st.integers(0, 2),
    st.builds(TextSettings, st.integers(2, 20), st.integers(2, 40), st.integers(1, 20)),
)
def test_windows_do_not_overlap_and_hold_only_text(length: int, prefixed: int, settings: TextSettings) -> None:
    tokens, prefix = list(range(length)), [-1] * prefixed
    size = settings.window - prefixed
    if length // size < settings.prompts:
        with pytest.raises(TdaError, match=f"The text has {length} tokens"):
            cut_windows(tokens, prefix, settings)
        return
    cut = cut_windows(tokens, prefix, settings)
    assert len(cut) == settings.prompts
    seen: set[int] = set()
    for window in cut:
        assert len(window) == settings.window
        assert window[:prefixed] == prefix
        body = window[prefixed:]
        assert body == list(range(body[0], body[0] + size))
        assert seen.isdisjoint(body)
        seen |= set(body)


def test_a_prefix_that_fills_the_window_is_refused() -> None:
    with pytest.raises(TdaError, match="no room for text"):
        cut_windows(range(100), [1] * 4, TextSettings(2, 2, 1))


@pytest.mark.parametrize("lengths", [(1, 8, 8), (2, 1, 8), (2, 8, 0)])
def test_lengths_out_of_range(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="Give 2 prompts or more"):
        TextSettings(*lengths)


@pytest.mark.parametrize(
    "request_",
    [
        Request(),
        Request(sparsity=0.5, allocation="uniform"),
        Request(max_kl=0.05),
        Request("griffin", sparsity=0.5),
    ],
    ids=["own", "uniform", "max-kl", "griffin"],
)
def test_quality_is_that_of_the_continuation_alone(
    model: Model,
    windows: list[list[int]],
    request_: Request,
) -> None:
    """For the artifact's own mask, those of budgets, and Griffin's. The test reads each window alone, and averages."""
    setting = open_setting(model.artifact, model.sessions, request_)
    quality = evaluate_text(model.artifact, setting, windows, SETTINGS)
    kls, losses, dense_losses, agreements = [], [], [], []
    for window in windows:
        prompt, read, predicted = window[:24], window[24:31], window[25:32]
        kept, model.sessions = model.sessions, setting.sessions
        sparse = continuation_logits(model, prompt, read, mask="tda", deployment=setting.deployment)
        model.sessions = kept
        dense = continuation_logits(model, prompt, read, mask="dense")
        fidelity = compare(dense, sparse)
        kls.append(fidelity.kl)
        agreements.append(fidelity.agreement)
        for logits, into in ((sparse, losses), (dense, dense_losses)):
            into.append(torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(predicted)).item())
    assert quality.kl == pytest.approx(statistics.mean(kls), abs=FLOAT32)
    assert quality.kl > 0.0
    assert quality.kl_stderr == pytest.approx(statistics.stdev(kls) / math.sqrt(3), abs=FLOAT32)
    assert quality.perplexity == pytest.approx(math.exp(statistics.mean(losses)), rel=FLOAT32)
    assert quality.dense_perplexity == pytest.approx(math.exp(statistics.mean(dense_losses)), rel=FLOAT32)
    assert quality.agreement == pytest.approx(statistics.mean(agreements))
    assert quality.refresh_ffn_bytes == 0.0
    share = quality.ffn_bytes / quality.dense_ffn_bytes
    if setting.counting is None:
        assert share == pytest.approx(quality.density)
    else:
        assert quality.density / 3 < share < quality.density
    if request_.method == "griffin":
        assert quality.density == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("period", [2, 3, 7, 8])
def test_refreshes_of_a_text(model: Model, windows: list[list[int]], period: int) -> None:
    """Their bytes are reported apart: some of seven tokens are read densely."""
    request = Request(refresh=Refresh(period))
    setting = open_setting(model.artifact, model.sessions, request)
    quality = evaluate_text(model.artifact, setting, windows, SETTINGS)
    never = evaluate_text(model.artifact, setting.without_refresh(), windows, SETTINGS)
    kls, shares = [], []
    for window in windows:
        cache = KvCache(setting.shape, "cpu", SETTINGS.window)
        reader = setting.open_reader(cache)
        _, mask = setting.read(window[:24], cache, reader)
        counted = setting.decode_counted(cache, window[24:31], mask, reader)
        dense = continuation_logits(model, window[:24], window[24:31], mask="dense")
        kls.append(compare(dense, counted.logits).kl)
        shares.append(counted.ffn_share)
    assert quality.kl == pytest.approx(statistics.mean(kls), abs=FLOAT32)
    assert quality.ffn_bytes == pytest.approx(statistics.mean(shares) * quality.dense_ffn_bytes)
    sparse = quality.ffn_bytes - quality.refresh_ffn_bytes
    refreshes = 7 // period
    assert quality.refresh_ffn_bytes == pytest.approx(refreshes / 7 * (quality.dense_ffn_bytes - sparse))
    assert (quality.refresh_ffn_bytes > 0) == (quality.ffn_bytes != pytest.approx(never.ffn_bytes)) == (period < 8)
    assert setting.budget == {**model.artifact.manifest["budget"], "refresh": period}


def test_dense_perplexity_is_that_of_transformers(
    model: Model,
    reference: torch.nn.Module,
    source: ModelSource,
    windows: list[list[int]],
) -> None:
    quality = evaluate_text(
        model.artifact, open_setting(model.artifact, model.sessions, Request("dense")), windows, SETTINGS
    )
    losses = []
    with torch.inference_mode():
        for window in windows:
            logits = reference(torch.tensor([window])).logits[0, 24:31].float()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[25:])).item())
    assert quality.dense_perplexity == pytest.approx(math.exp(statistics.mean(losses)), rel=FLOAT32)
    assert quality.perplexity == pytest.approx(quality.dense_perplexity, rel=FLOAT32)
    assert (quality.density, quality.agreement) == (1.0, 1.0)
    assert quality.kl == pytest.approx(0.0, abs=1e-6)


def test_thresholds_replace_the_artifacts_own(model: Model, windows: list[list[int]]) -> None:
    setting = open_setting(model.artifact, model.sessions, Request(cett=0.0))
    everything = evaluate_text(model.artifact, setting, windows, SETTINGS)
    assert everything.density == 1.0
    assert everything.kl == pytest.approx(0.0, abs=1e-6)


def test_windows_longer_than_the_model_are_refused(model: Model) -> None:
    settings = TextSettings(2, model.artifact.shape.max_positions, 1)
    with pytest.raises(TdaError, match="more than the model's"):
        evaluate_text(model.artifact, open_setting(model.artifact, model.sessions, Request()), [], settings)


def test_standard_errors_are_over_windows() -> None:
    measured = [WindowQuality(0.1, 1.0, 0.5, 0.8, 0.25, 0.6), WindowQuality(0.3, 2.0, 0.5, 0.6, 0.75, 0.8, 0.1)]
    quality = summarise([measured[0], replace(measured[1], attention_share=0.5)], 1000, 1500)
    assert quality.kl == pytest.approx(0.2)
    assert quality.kl_stderr == pytest.approx(0.1)
    assert quality.perplexity == pytest.approx(math.exp(1.5))
    assert quality.perplexity_stderr == pytest.approx(math.exp(1.5) * 0.5)
    assert quality.dense_perplexity_stderr == 0.0
    assert quality.density == pytest.approx(0.5)
    assert (quality.ffn_bytes, quality.dense_ffn_bytes) == (pytest.approx(700), 1000)
    assert quality.refresh_ffn_bytes == pytest.approx(50)
    assert (quality.linear_bytes, quality.dense_linear_bytes) == (pytest.approx(700 + 0.75 * 500), 1500)
