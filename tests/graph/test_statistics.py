"""Running statistics and masks of the prefill graph, against plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tda_export.graph import contract
from tda_export.graph.method import Method, griffin, tda
from tda_export.models.source import resolve_model
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.session import Sessions
from tests.graph.test_parity import THRESHOLD, build_tiny

TOKENS = [5, 77, 140, 33, 200, 9, 61, 90, 18, 250, 31, 4]


class Prefill:
    """The prefill graph of a tiny artifact, called with plain arrays."""

    def __init__(self, folder: Path) -> None:
        artifact = open_artifact(folder)
        self.shape = artifact.shape
        self.session = Sessions(artifact, "cpu").prefill

    def __call__(
        self, tokens: list[int], *, attended: int | None = None, buffer: int | None = None, **inputs: Any
    ) -> dict:
        length = len(tokens)
        mask = np.zeros((1, buffer or length), np.int64)
        mask[0, : attended or length] = 1
        feeds = {contract.INPUT_IDS: np.array([tokens]), contract.ATTENTION_MASK: mask}
        past = np.zeros((1, self.shape.num_kv_heads, buffer or 0, self.shape.head_size), self.shape.dtype)
        for layer in range(self.shape.num_layers):
            feeds |= {contract.past_key(layer): past, contract.past_value(layer): past}
        outputs = self.session.run(None, feeds | inputs)
        return dict(zip((node.name for node in self.session.get_outputs()), outputs, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return build_tiny(resolve_model(str(tiny_model)), tmp_path_factory.mktemp("statistics") / "artifact")


@pytest.fixture(scope="module")
def prefill(folder: Path) -> Prefill:
    return Prefill(folder)


def activations(model_folder: Path, tokens: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return h [T, F] and W_down [M, F] of each layer from transformers."""
    model = resolve_model(str(model_folder)).reference()
    captured = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, inputs: captured.append((inputs[0][0].numpy(), module.weight.detach().numpy()))
        )
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return captured


def expected_statistics(h: np.ndarray, down: np.ndarray, *, magnitude: bool) -> tuple[np.ndarray, np.ndarray]:
    """Compute sums of r_i(t)^2 and of h_i(t) by definition, token by token, without the first token."""
    squares, sums = np.zeros(h.shape[1]), np.zeros(h.shape[1])
    norms = np.linalg.norm(down.astype(np.float64), axis=0) if magnitude else np.ones(h.shape[1])
    for token in h[1:].astype(np.float64):
        magnitudes = np.abs(token) * norms
        squares += (magnitudes / np.linalg.norm(magnitudes)) ** 2
        sums += token
    return squares, sums


@pytest.mark.parametrize("method", [tda(), griffin(0.5)], ids=["tda", "griffin"])
def test_statistics_are_those_of_the_definition(method: Method, tiny_model: Path, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_model))
    prefill = Prefill(build_tiny(source, tmp_path / "artifact", method=method))
    outputs = prefill(TOKENS)
    assert outputs[contract.PRESENT_STATS_WEIGHT] == [len(TOKENS) - 1]
    for layer, (h, down) in enumerate(activations(tiny_model, TOKENS)):
        squares, sums = expected_statistics(h, down, magnitude=method.statistic == "magnitude")
        stats = outputs[contract.present_neuron_stats(layer)]
        np.testing.assert_allclose(stats[contract.SCORE_ROW], squares, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(stats[contract.ACTIVATION_ROW], sums, rtol=1e-4, atol=1e-5)
        scores = np.sqrt(squares / (len(TOKENS) - 1))
        if method.selection == "threshold":
            kept = np.flatnonzero(scores >= THRESHOLD)
        else:
            kept = np.sort(np.argsort(-scores)[: method.kept(len(scores))])
        np.testing.assert_array_equal(outputs[contract.present_mask_indices(layer)], kept)
        assert outputs[contract.present_mask_indices(layer)].dtype == np.int32


def test_tail_mean_is_the_mean_output_of_the_dropped(prefill: Prefill, tiny_model: Path) -> None:
    outputs = prefill(TOKENS)
    for layer, (h, down) in enumerate(activations(tiny_model, TOKENS)):
        dropped = np.ones(h.shape[1], bool)
        dropped[outputs[contract.present_mask_indices(layer)]] = False
        expected = down[:, dropped] @ h[1:, dropped].mean(axis=0)
        np.testing.assert_allclose(outputs[contract.present_tail_mean(layer)], expected, rtol=1e-3, atol=1e-5)


def test_past_statistics_decay_and_add(prefill: Prefill) -> None:
    fresh = prefill(TOKENS)
    name, rng = contract.present_neuron_stats(1), np.random.default_rng(0)
    past = rng.random((2, prefill.shape.ffn_size), np.float32)
    blended = prefill(
        TOKENS,
        **{
            contract.past_neuron_stats(1): past,
            contract.PAST_STATS_WEIGHT: np.array([8.0], np.float32),
            contract.STATS_DECAY: np.array([0.25], np.float32),
        },
    )
    np.testing.assert_allclose(blended[name], fresh[name] + 0.25 * past, rtol=1e-5)
    assert blended[contract.PRESENT_STATS_WEIGHT] == fresh[contract.PRESENT_STATS_WEIGHT] + 2.0


def test_padding_and_buffers_change_nothing(prefill: Prefill) -> None:
    plain = prefill(TOKENS)
    for other in (
        prefill([*TOKENS, 0, 0, 0], attended=len(TOKENS)),  # right padding
        prefill(TOKENS, buffer=40),  # a fixed buffer, longer than the prompt
    ):
        assert other[contract.PRESENT_STATS_WEIGHT] == plain[contract.PRESENT_STATS_WEIGHT]
        np.testing.assert_allclose(other[contract.LOGITS], plain[contract.LOGITS], atol=1e-4)
        for layer in range(prefill.shape.num_layers):
            name = contract.present_neuron_stats(layer)
            np.testing.assert_allclose(other[name], plain[name], rtol=1e-4, atol=1e-6)


def test_one_token_keeps_every_neuron(prefill: Prefill) -> None:
    outputs = prefill(TOKENS[:1])
    assert outputs[contract.PRESENT_STATS_WEIGHT] == [0]
    for layer in range(prefill.shape.num_layers):
        assert len(outputs[contract.present_mask_indices(layer)]) == prefill.shape.ffn_size


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 96), (2.0, 0)])
def test_both_ends_of_the_thresholds(prefill: Prefill, threshold: float, kept: int) -> None:
    layers = prefill.shape.num_layers
    outputs = prefill(TOKENS, **{contract.THRESHOLDS: np.full(layers, threshold, np.float32)})
    assert [len(outputs[contract.present_mask_indices(i)]) for i in range(layers)] == [kept] * layers


@pytest.mark.parametrize(("number", "rows"), [(0, 12), (1, 1), (5, 5), (99, 12)])
def test_num_logits(prefill: Prefill, number: int, rows: int) -> None:
    every = prefill(TOKENS, **{contract.NUM_LOGITS: np.array([0])})[contract.LOGITS][0]
    some = prefill(TOKENS, **{contract.NUM_LOGITS: np.array([number])})[contract.LOGITS][0]
    assert some.shape == (rows, prefill.shape.vocab_size)
    np.testing.assert_allclose(some, every[-rows:], atol=1e-4)


def test_batch_of_two_is_refused(prefill: Prefill) -> None:
    shape = prefill.shape
    past = np.zeros((2, shape.num_kv_heads, 0, shape.head_size), np.float32)
    feeds = {contract.INPUT_IDS: np.array([TOKENS] * 2), contract.ATTENTION_MASK: np.ones((2, len(TOKENS)), np.int64)}
    feeds |= {name(i): past for i in range(shape.num_layers) for name in (contract.past_key, contract.past_value)}
    with pytest.raises(Exception, match="invalid dimensions for input"):
        prefill.session.run(None, feeds)
