"""Free generation, against reading the whole text again for every token."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.free import BLOCK_TOKENS, evaluate_free
from tda_export.evaluation.greedy import greedy_tokens, likeliest
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.setting import Setting
from tda_export.runtime import Model
from tda_export.runtime.deployment import Refresh
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.scoring import compare, continuation_logits

NEW = BLOCK_TOKENS + 6
FLOAT32 = 1e-4


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(3, 200, 20).tolist() for _ in range(3)]


def written(model: Model, setting: Setting, prompt: list[int], mask: str) -> list[int]:
    """Return a greedy text. The whole text so far is read again for every token."""
    tokens: list[int] = []
    while len(tokens) < NEW:
        # The prompt's last logits are those of a dense continuation of one token, its own last.
        read = (prompt[:-1], prompt[-1:], "dense") if not tokens else (prompt, tokens, mask)
        logits = continuation_logits(model, *read[:2], mask=read[2], deployment=setting.deployment)  # type: ignore[arg-type]
        tokens.append(int(logits[-1].argmax()))
    return tokens


def test_beside_texts_that_are_read_again_for_every_token(model: Model, prompts: list[list[int]]) -> None:
    setting = open_setting(model.artifact, model.sessions, Request(sparsity=0.5))
    quality = evaluate_free(model.artifact, setting, prompts, NEW)
    lengths, blocks = [], []
    for prompt in prompts:
        dense, sparse = (written(model, setting, prompt, mask) for mask in ("dense", "tda"))
        lengths.append(next((i for i in range(NEW) if dense[i] != sparse[i]), NEW))
        logits = [
            continuation_logits(model, prompt, dense[:-1], mask=mask, deployment=setting.deployment)  # type: ignore[arg-type]
            for mask in ("dense", "tda")
        ]
        blocks.append([compare(*(each[part] for each in logits)).kl for part in (slice(0, 64), slice(64, None))])
    assert 0 < min(lengths) < NEW
    assert quality.divergence == pytest.approx(statistics.mean(lengths))
    assert quality.divergence_stderr == pytest.approx(statistics.stdev(lengths) / math.sqrt(3))
    assert quality.divergence_median == statistics.median(lengths)
    assert quality.identical == sum(length == NEW for length in lengths) / 3
    assert quality.kl == pytest.approx(np.mean(blocks, axis=0).tolist(), abs=FLOAT32)
    assert quality.kl_stderr == pytest.approx((np.std(blocks, axis=0, ddof=1) / math.sqrt(3)).tolist(), abs=FLOAT32)
    assert 0.15 * quality.dense_ffn_bytes < quality.ffn_bytes < 0.6 * quality.dense_ffn_bytes
    assert quality.refresh_ffn_bytes == 0.0


def test_dense_writes_what_dense_writes(model: Model, prompts: list[list[int]]) -> None:
    setting = open_setting(model.artifact, model.sessions, Request("dense"))
    quality = evaluate_free(model.artifact, setting, prompts, NEW)
    assert (quality.divergence, quality.identical) == (NEW, 1.0)
    assert quality.kl == pytest.approx([0.0, 0.0], abs=1e-6)
    assert quality.ffn_bytes == quality.dense_ffn_bytes


def test_refreshes_count_and_keep_nearer(model: Model, prompts: list[list[int]]) -> None:
    without = open_setting(model.artifact, model.sessions, Request(sparsity=0.5))
    often = open_setting(model.artifact, model.sessions, Request(sparsity=0.5, refresh=Refresh(4)))
    never, refreshed = (evaluate_free(model.artifact, each, prompts, NEW) for each in (without, often))
    assert refreshed.refresh_ffn_bytes > 0.0
    assert sum(refreshed.kl) < sum(never.kl)


def test_bytes_with_refreshes(model: Model, prompts: list[list[int]]) -> None:
    """Of 69 tokens every fourth is dense, 17 in all. The others read the neurons of the mask of all text before."""
    setting = open_setting(model.artifact, model.sessions, Request(sparsity=0.5, refresh=Refresh(4)))
    shape = model.artifact.shape
    one_level = dataclasses.replace(setting.deployment, token_thresholds=np.zeros(shape.num_layers, np.float32))
    setting = dataclasses.replace(setting, counting=None, deployment=one_level)
    quality = evaluate_free(model.artifact, setting, prompts[:2], NEW)
    sparse_rows = []
    for prompt in prompts[:2]:
        text, rows = written(model, setting, prompt, "dense"), 0
        for start in range(0, 69, 4):
            cache = KvCache(shape, "cpu", len(prompt) + NEW)
            _, mask = setting.read(prompt + text[:start], cache)
            neurons = sum(len(mask.indices(layer)) for layer in range(shape.num_layers))
            rows += neurons * (3 if start < 68 else 1)
        sparse_rows.append(rows)
    row = 3 * shape.hidden_size * 4  # bytes of a neuron: gate, up and down in float32
    every = shape.num_layers * shape.ffn_size
    assert quality.dense_ffn_bytes == every * row
    expected = [(rows + 17 * every) * row / 69 for rows in sparse_rows]
    assert quality.ffn_bytes == pytest.approx(statistics.mean(expected), rel=1e-9)
    more = [17 * (every - rows / 52) * row / 69 for rows in sparse_rows]  # more than as many sparse tokens
    assert quality.refresh_ffn_bytes == pytest.approx(statistics.mean(more), rel=1e-9)


def test_greedy_tokens_are_those_of_the_driver(model: Model, prompts: list[list[int]]) -> None:
    setting = open_setting(model.artifact, model.sessions, Request(sparsity=0.5, refresh=Refresh(4)))
    step = setting.open_step(64)
    for prompt in prompts:
        step.cache.truncate(0)
        logits = step.begin(prompt, setting.deployment)
        step.follow(setting.deployment)
        tokens = greedy_tokens(setting, step, likeliest(logits))
        driver = [token.id for token in model.generate(prompt, max_new_tokens=24, deployment=setting.deployment)]
        assert [next(tokens) for _ in driver] == driver


def test_refusals(model: Model, prompts: list[list[int]]) -> None:
    setting = open_setting(model.artifact, model.sessions, Request())
    with pytest.raises(UsageError, match="takes 2 prompts or more, and 2 new tokens or more"):
        evaluate_free(model.artifact, setting, prompts[:1], 4)
    with pytest.raises(UsageError, match="takes 2 prompts or more, and 2 new tokens or more"):
        evaluate_free(model.artifact, setting, prompts, 1)
    with pytest.raises(TdaError, match="20 and 493 tokens are more than the model's 512 positions"):
        evaluate_free(model.artifact, setting, prompts, 493)


def test_logits_that_are_not_finite_are_no_token() -> None:
    assert likeliest(np.array([0.0, 2.0, 1.0])) == 1
    assert likeliest(np.array([0.0, np.nan, 1.0])) == -1
