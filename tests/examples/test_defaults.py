"""Inputs that an application may leave out, in plain ONNX Runtime. The results are those of the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tokenizers import Tokenizer

from tda_export.calibration.file import read_calibration
from tda_export.graph import contract
from tda_export.graph.prefill import calibrated_prior
from tests.examples.applications import genai
from tests.examples.plain import PlainArtifact

TOKENS = np.arange(40, 60)[None]


@pytest.fixture(scope="module")
def plain(tiny_artifact: Path) -> PlainArtifact:
    return PlainArtifact(tiny_artifact)


@pytest.fixture(scope="module")
def prefilled(plain: PlainArtifact) -> dict[str, np.ndarray]:
    return plain.run(contract.PREFILL_FILE, plain.needed(TOKENS))


@pytest.fixture(scope="module")
def masks(plain: PlainArtifact, prefilled: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {contract.mask_indices(i): prefilled[contract.present_mask_indices(i)] for i in plain.layers}


@pytest.fixture(scope="module")
def tails(plain: PlainArtifact, prefilled: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {contract.tail_mean(i): prefilled[contract.present_tail_mean(i)] for i in plain.layers}


def default_token_thresholds(plain: PlainArtifact) -> dict[str, np.ndarray]:
    return {contract.TOKEN_THRESHOLDS: np.array(plain.manifest["token_thresholds"], np.float32)}


def every_neuron(plain: PlainArtifact) -> dict[str, np.ndarray]:
    return {contract.mask_indices(i): np.arange(plain.shape.ffn_size, dtype=np.int32) for i in plain.layers}


def no_tails(plain: PlainArtifact) -> dict[str, np.ndarray]:
    return {contract.tail_mean(i): np.zeros(plain.shape.hidden_size, np.float32) for i in plain.layers}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_prefill_without_statistics_and_thresholds(plain: PlainArtifact, prefilled: dict[str, np.ndarray]) -> None:
    tokens = plain.manifest["prior_tokens"]
    assert tokens > 0
    prior = calibrated_prior(read_calibration(plain.folder / contract.CALIBRATION_FILE).sums, tokens)
    given = {contract.past_neuron_stats(i): prior.stats[i] for i in plain.layers} | {
        contract.PAST_STATS_WEIGHT: np.array([tokens], np.float32),
        contract.STATS_DECAY: np.ones(1, np.float32),
        contract.THRESHOLDS: np.array(plain.manifest["thresholds"], np.float32),
        contract.NUM_LOGITS: np.ones(1, np.int64),
    }
    assert_equal(prefilled, plain.run(contract.PREFILL_FILE, plain.needed(TOKENS) | given))
    without_prior = given | {contract.PAST_STATS_WEIGHT: np.zeros(1, np.float32)}
    other = plain.run(contract.PREFILL_FILE, plain.needed(TOKENS) | without_prior)
    assert not np.array_equal(prefilled[contract.PRESENT_STATS_WEIGHT], other[contract.PRESENT_STATS_WEIGHT])


def test_decode_without_token_thresholds(
    plain: PlainArtifact,
    prefilled: dict[str, np.ndarray],
    masks: dict[str, np.ndarray],
    tails: dict[str, np.ndarray],
) -> None:
    """The default is the budget's thresholds, not 0."""
    feeds = plain.needed(TOKENS[:, :1], prefilled) | masks | tails
    left_out = plain.run(contract.DECODE_FILE, feeds)
    assert_equal(left_out, plain.run(contract.DECODE_FILE, feeds | default_token_thresholds(plain)))
    off = {contract.TOKEN_THRESHOLDS: np.zeros(plain.shape.num_layers, np.float32)}
    other = plain.run(contract.DECODE_FILE, feeds | off)
    assert not np.allclose(left_out[contract.LOGITS], other[contract.LOGITS], atol=1e-3)


def test_decode_without_tail_means(
    plain: PlainArtifact,
    prefilled: dict[str, np.ndarray],
    masks: dict[str, np.ndarray],
    tails: dict[str, np.ndarray],
) -> None:
    feeds = plain.needed(TOKENS[:, :1], prefilled) | masks
    left_out = plain.run(contract.DECODE_FILE, feeds)
    assert_equal(left_out, plain.run(contract.DECODE_FILE, feeds | no_tails(plain)))
    other = plain.run(contract.DECODE_FILE, feeds | tails)
    assert not np.allclose(left_out[contract.LOGITS], other[contract.LOGITS], atol=1e-3)


def test_decode_without_anything_keeps_every_neuron(plain: PlainArtifact, prefilled: dict[str, np.ndarray]) -> None:
    feeds = plain.needed(TOKENS[:, :1], prefilled)
    given = every_neuron(plain) | no_tails(plain) | default_token_thresholds(plain)
    assert_equal(plain.run(contract.DECODE_FILE, feeds), plain.run(contract.DECODE_FILE, feeds | given))


def test_explicit_decode_is_decode_without_defaults(
    plain: PlainArtifact,
    prefilled: dict[str, np.ndarray],
    masks: dict[str, np.ndarray],
    tails: dict[str, np.ndarray],
) -> None:
    feeds = plain.needed(TOKENS[:, :1], prefilled) | masks | tails | default_token_thresholds(plain)
    expected = plain.run(contract.DECODE_FILE, feeds)
    assert_equal(expected, plain.run(contract.EXPLICIT_DECODE_FILE, feeds))
    decode, explicit = (
        onnx.load(plain.folder / file, load_external_data=False).graph
        for file in (contract.DECODE_FILE, contract.EXPLICIT_DECODE_FILE)
    )
    assert [node.SerializeToString() for node in decode.node] == [node.SerializeToString() for node in explicit.node]
    assert not {tensor.name for tensor in explicit.initializer} & {value.name for value in explicit.input}


def test_explicit_decode_of_prices(priced_artifact: Path) -> None:
    """The price may be left out of decode alone; the default is the budget's."""
    plain = PlainArtifact(priced_artifact)
    feeds = plain.needed(TOKENS[:, :1], plain.run(contract.PREFILL_FILE, plain.needed(TOKENS)))
    own = {contract.PRICE: np.array([plain.manifest["price"]], np.float32)}
    expected = plain.run(contract.DECODE_FILE, feeds)
    assert_equal(expected, plain.run(contract.DECODE_FILE, feeds | own))
    assert_equal(expected, plain.run(contract.EXPLICIT_DECODE_FILE, feeds | own))
    dense = plain.run(contract.DECODE_FILE, feeds | {contract.PRICE: np.zeros(1, np.float32)})
    assert not np.allclose(dense[contract.LOGITS], expected[contract.LOGITS], atol=1e-3)
    with pytest.raises(ValueError, match="price"):
        plain.run(contract.EXPLICIT_DECODE_FILE, feeds)


def test_genai_reads_a_prompt_of_one_token_by_decode(tiny_artifact: Path, plain: PlainArtifact) -> None:
    """A limit of its pipelines: without a prefill, decode's defaults count."""
    tokenizer = Tokenizer.from_file(str(tiny_artifact / contract.TOKENIZER_FILE))
    tokens, past, answer = np.array([tokenizer.encode("a").ids]), None, []
    assert tokens.shape == (1, 1)
    for _ in range(8):
        past = plain.run(contract.DECODE_FILE, plain.needed(tokens, past))
        tokens = past[contract.GREEDY_TOKENS]
        answer.append(int(tokens[0, 0]))
    assert genai(tiny_artifact, "a", "tda", 8) == answer
