"""Log-likelihoods by both protocols, against a slow reference that scores every token by itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.scoring import DECODE_TOKENS, Scorer, token_log_probabilities
from tda_export.evaluation.setting import Counted, Setting
from tda_export.ffn_share import GATED
from tda_export.graph import contract
from tda_export.runtime import Model, load
from tda_export.runtime.deployment import Refresh, one_level
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode, prefill
from tda_export.runtime.scoring import log_softmax
from tda_export.runtime.session import device_tensor

FLOAT32 = 1e-3
TOKENS = st.lists(st.integers(3, 250), min_size=1, max_size=12)


@pytest.fixture(scope="module", params=["tda", "uniform", "griffin", "dense"])
def setting(model: Model, request: pytest.FixtureRequest) -> Setting:
    requests = {
        "tda": Request("tda", sparsity=0.5, refresh=Refresh(5)),
        "uniform": Request("tda", sparsity=0.5, allocation="uniform"),
        "griffin": Request("griffin", sparsity=0.5),
        "dense": Request("dense"),
    }
    return open_setting(model.artifact, model.sessions, requests[request.param])


def slow_score(setting: Setting, read: list[int], sparse: list[int], predicted: list[int]) -> tuple[float, bool]:
    """Score each prediction in a cache of its own: `read` densely, then `sparse` under its mask, token by token.

    There are no refreshes. The mask of one token is that of the prior, or has every neuron.
    """
    how, inputs = (
        setting.deployment,
        {contract.TOKEN_THRESHOLDS: device_tensor(setting.deployment.token_thresholds, "cpu")},
    )
    total, greedy = 0.0, True
    for index, token in enumerate(predicted):
        fed = sparse[: index + 1]
        cache = KvCache(setting.shape, "cpu", len(read) + len(fed))
        mask = (
            prefill(setting.sessions, setting.shape, read, cache, how.thresholds, prior=how.prior)[1] if read else None
        )
        mask = mask if setting.masked else None
        if mask is not None and not how.tail_mean:
            mask = mask.without_tail()
        for one in fed:
            logits = decode(setting.sessions, cache, [one], mask, inputs if mask else {})
        total += float(log_softmax(logits)[0, token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


@settings(max_examples=15)
@given(context=TOKENS, continuation=TOKENS)
def test_strict_scores_every_token_under_the_mask_of_the_context(
    setting: Setting, context: list[int], continuation: list[int]
) -> None:
    fed = [context[-1], *continuation[:-1]]
    expected = slow_score(setting, context[:-1], fed, continuation)
    (score,) = Scorer(setting).score(context, [continuation])
    assert score.loglikelihood == pytest.approx(expected[0], abs=FLOAT32)
    assert score.greedy == expected[1]


@settings(max_examples=15)
@given(context=TOKENS, continuation=TOKENS)
def test_griffin_scores_the_last_step_alone_under_a_mask(
    setting: Setting, context: list[int], continuation: list[int]
) -> None:
    dense = Setting("dense", setting.shape, setting.sessions, one_level(None, 3, GATED), masked=False)
    fed = [*context, *continuation[:-1]]
    before, _ = slow_score(dense, context[:-1], [context[-1], *continuation[:-2]], continuation[:-1])
    last, _ = slow_score(setting, fed[:-1], fed[-1:], continuation[-1:])
    (score,) = Scorer(setting, "griffin").score(context, [continuation])
    assert score.loglikelihood == pytest.approx(before + last, abs=FLOAT32)


@settings(max_examples=15)
@given(context=TOKENS, continuations=st.lists(TOKENS, min_size=1, max_size=4), data=st.data())
def test_sharing_a_prefill_changes_nothing(
    setting: Setting, context: list[int], continuations: list[list[int]], data: st.DataObject
) -> None:
    """Some continuations differ only in their last token, and some are equal."""
    protocol = data.draw(st.sampled_from(["strict", "griffin"]))
    continuations = [*continuations, [*continuations[0][:-1], 77], continuations[0]]
    together = Scorer(setting, protocol).score(context, continuations)
    for continuation, shared in zip(continuations, together, strict=True):
        (alone,) = Scorer(setting, protocol).score(context, [continuation])
        assert shared.loglikelihood == pytest.approx(alone.loglikelihood, abs=FLOAT32)
        assert shared.greedy == alone.greedy


def test_contexts_do_not_touch_each_other(setting: Setting) -> None:
    scorer = Scorer(setting)
    long, short = list(range(5, 205)), [9, 8, 7]
    first = scorer.score(short, [[1, 2]])
    scorer.score(long, [[3] * 300])  # the cache grows, and calls are cut into pieces
    assert scorer.score(short, [[1, 2]])[0].loglikelihood == pytest.approx(first[0].loglikelihood, abs=FLOAT32)


def test_long_continuations_are_decoded_in_pieces(model: Model, reference: torch.nn.Module) -> None:
    tokens = np.random.default_rng(0).integers(3, 250, 2 * DECODE_TOKENS + 40).tolist()
    context, continuation = tokens[:20], tokens[20:]
    dense = open_setting(model.artifact, model.sessions, Request("dense"))
    with torch.inference_mode():
        log = torch.log_softmax(reference(torch.tensor([tokens[:-1]])).logits[0, 19:].float(), dim=-1)
    expected = log[torch.arange(len(continuation)), torch.tensor(continuation)].sum().item()
    for protocol in ("strict", "griffin"):
        (score,) = Scorer(dense, protocol).score(context, [continuation])
        assert score.loglikelihood == pytest.approx(expected, abs=FLOAT32 * math.sqrt(len(continuation)))


def test_token_log_probabilities_are_those_of_the_whole_distribution() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0.0, 8.0, (5, 50_000)).astype(np.float32)
    tokens = generator.integers(0, 50_000, (3, 5))
    expected = log_softmax(logits)[np.arange(5), tokens]
    np.testing.assert_allclose(token_log_probabilities(logits, tokens), expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_logit_that_is_not_finite(bad: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = bad
    with pytest.raises(TdaError, match="not finite"):
        token_log_probabilities(logits, np.zeros((1, 2), np.int64))


def test_ffn_share_is_that_of_the_masks_and_of_what_tokens_keep(setting: Setting) -> None:
    scorer, context = Scorer(setting), list(range(5, 45))
    assert scorer.take_shares() is None
    scorer.score(context, [[1], [2]])
    shares = scorer.take_shares()
    assert shares is not None
    share, attention, head = shares
    assert (attention, head) == (1.0, 1.0)
    assert share == pytest.approx(1.0 if setting.method == "dense" else 0.5, abs=0.2)
    cache = KvCache(setting.shape, "cpu", len(context))
    _, mask = setting.read(context[:-1], cache)
    assert share == pytest.approx(setting.without_refresh().decode_counted(cache, context[-1:], mask).ffn_share)
    assert (share < setting.density(mask)) == (setting.counting is not None)
    assert scorer.take_shares() is None


def test_ffn_share_is_a_mean_over_scored_tokens(tiny_artifact: Path) -> None:
    model = load(tiny_artifact, provider="cpu")
    setting = open_setting(model.artifact, model.sessions, Request("griffin", sparsity=0.5))
    scorer = Scorer(setting)
    scorer.score(list(range(5, 45)), [[1, 2, 3]])
    scorer.score([5], [[6]])  # no mask, so every row is read
    assert scorer.take_shares() == (pytest.approx((3 * 0.5 + 1.0) / 4), 1.0, 1.0)
    last_steps = Scorer(setting, "griffin")
    last_steps.score(list(range(5, 45)), [[1, 2, 3]])
    assert last_steps.take_shares() == (pytest.approx((2 * 1.0 + 0.5) / 3), 1.0, 1.0)


def test_truncation_scores_and_counts_each_token(token_artifact: Path) -> None:
    loaded = load(token_artifact, provider="cpu")
    setting = open_setting(loaded.artifact, loaded.sessions, Request("tt", sparsity=0.25))
    context, continuations = list(range(5, 30)), [[40, 41, 42], [60]]
    cache = KvCache(setting.shape, "cpu", 40)
    sums, shares = [], []
    for continuation in continuations:
        cache.truncate(0)
        _, mask = setting.read(context[:-1], cache)
        sums.append(0.0)
        for fed, predicted in zip([context[-1], *continuation], continuation, strict=False):
            counted = setting.decode_counted(cache, [fed], mask)
            sums[-1] += float(log_softmax(counted.logits)[0, predicted])
            shares.append(counted.ffn_share)
    scorer = Scorer(setting)
    assert [score.loglikelihood for score in scorer.score(context, continuations)] == pytest.approx(sums, abs=FLOAT32)
    assert scorer.take_shares() == (pytest.approx(np.mean(shares)), 1.0, 1.0)
    assert scorer.take_shares() is None
    dense = Scorer(open_setting(loaded.artifact, loaded.sessions, Request("dense")))
    unread = scorer.score([5], [[6]])  # no context, so dense, as for other methods
    assert unread[0].loglikelihood == pytest.approx(dense.score([5], [[6]])[0].loglikelihood, abs=FLOAT32)
    with pytest.raises(UsageError, match="does not generate"):
        setting.open_step(8)


def test_unknown_protocol(setting: Setting) -> None:
    with pytest.raises(UsageError, match=r"^Protocol 'loose' is not known\. Use strict or griffin\.$"):
        Scorer(setting, "loose")


def test_logits_that_are_not_finite(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.full((1, setting.shape.vocab_size), np.nan)
    monkeypatch.setattr(Setting, "decode", lambda *arguments: logits)
    monkeypatch.setattr(Setting, "decode_counted", lambda *arguments: Counted(logits, 0.5, 0.5, 0.5))
    with pytest.raises(TdaError, match=r"^The logits are not finite\. Build the artifact in another dtype\.$"):
        Scorer(setting).score([5, 6], [[7]])
