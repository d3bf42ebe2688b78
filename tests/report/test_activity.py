"""Activity measures against a slow and obvious reference."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tda_export.calibration.capture import capture_activations
from tda_export.calibration.cett import relative_magnitudes
from tda_export.graph import contract
from tda_export.graph.reference import reference_scores
from tda_export.models.source import resolve_model
from tda_export.report.activity import (
    Reader,
    _float32,
    activate,
    cosine,
    first_quarter,
    float32_weight,
    inertia,
    jaccard,
    overlap_by_layer,
    relative,
    similarity,
    top_half,
)
from tda_export.report.activity_sections import activity_section, activity_steps, brightness, random_tokens
from tda_export.report.texts import SIMILARITY_PROMPTS, shuffled
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.session import device_tensor
from tda_export.runtime.text import Text
from tests.conftest import build_tda, run_ok
from tests.tiny import save_tiny_model

TOKENS = [72, 101, 108, 108, 111, 32, 119]


def transformers_magnitudes(model: Path, tokens: list[int]) -> list[np.ndarray]:
    source = resolve_model(str(model))
    found: dict[int, np.ndarray] = {}

    def keep(layer: int, h: torch.Tensor, down: torch.Tensor) -> None:
        found[layer] = relative_magnitudes(h, down.norm(dim=0)).numpy()

    reference = source.reference()
    with torch.inference_mode(), capture_activations(reference, source.spec, keep):
        reference.base_model(torch.tensor([tokens]), use_cache=False)
    return [found[layer] for layer in range(source.spec.num_layers)]


def test_relative_magnitudes_are_those_of_transformers(tiny_model: Path, tiny_artifact: Path) -> None:
    reader = Reader(open_artifact(tiny_artifact), "cpu")
    found = reader.relative_magnitudes(TOKENS, [0, 2])
    expected = transformers_magnitudes(tiny_model, TOKENS)
    for ours, theirs in zip(found, (expected[0], expected[2]), strict=True):
        assert ours.dtype == np.float32
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_relative_magnitudes_with_biases_in_half_precision(tmp_path: Path) -> None:
    model = save_tiny_model("llama-biases", tmp_path / "model")
    calibration, artifact = tmp_path / "c.safetensors", tmp_path / "artifact"
    small = ("--method", "tda", "--sequences", 2, "--prompt-tokens", 8, "--continuation-tokens", 4)
    run_ok("calibrate", model, "-o", calibration, "--sparsity", 0.5, *small)
    run_ok(
        *build_tda(model, calibration),
        "-o",
        artifact,
        "--dtype",
        "fp16",
        "--no-verify",
    )
    found = Reader(open_artifact(artifact), "cpu").relative_magnitudes(TOKENS, [1])[0]
    assert found == pytest.approx(transformers_magnitudes(model, TOKENS)[1], abs=1e-2)


def test_scores_are_those_of_transformers(tiny_model: Path, tiny_artifact: Path) -> None:
    source = resolve_model(str(tiny_model))
    reader = Reader(open_artifact(tiny_artifact), "cpu")
    expected = torch.stack(reference_scores(source.reference(), source.spec, TOKENS, magnitude=True)).numpy()
    assert reader.scores(TOKENS) == pytest.approx(expected, abs=1e-5)
    assert reader.scores(TOKENS) == pytest.approx(expected, abs=1e-5)  # the call before has no effect


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("silu", torch.nn.functional.silu),
        ("relu", torch.nn.functional.relu),
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations(name: str, reference: object) -> None:
    x = np.array([-200.0, -3.0, -0.5, 0.0, 0.1, 2.0, 200.0], np.float32)
    found = activate(name, x)
    assert found.dtype == np.float32
    assert found == pytest.approx(reference(torch.from_numpy(x)).numpy(), abs=1e-5)  # type: ignore[operator]
    with pytest.raises(ValueError, match="'swish'"):
        activate("swish", x)


def test_relative_of_extremes() -> None:
    found = relative(np.array([[1e30, 1e30], [1e-30, 0.0], [0.0, 0.0]], np.float32))
    assert found == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [1.0, 0.0], [0.0, 0.0]]))


def test_top_half() -> None:
    assert top_half(np.array([[3.0, 1.0, 2.0, 2.0, 0.0]])).tolist() == [[True, False, True, False, False]]


def slow_similarity(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, layers, neurons = scores.shape
    cosines, overlaps = np.zeros((count, count)), np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            for layer in range(layers):
                a, b = scores[i, layer].tolist(), scores[j, layer].tolist()
                dot = sum(x * y for x, y in zip(a, b, strict=True))
                cosines[i, j] += dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)) / layers
                best = [set(sorted(range(neurons), key=lambda n: -s[n])[: neurons // 2]) for s in (a, b)]
                overlaps[i, j] += len(best[0] & best[1]) / len(best[0] | best[1]) / layers
    return cosines, overlaps


def test_similarity() -> None:
    scores = np.random.default_rng(0).random((4, 3, 10))
    found, (cosines, overlaps) = similarity(scores), slow_similarity(scores)
    assert found.cosine == pytest.approx(cosines)
    assert found.jaccard == pytest.approx(overlaps)
    pairs = overlap_by_layer(scores)
    assert pairs.shape == (3, 6)
    assert pairs.mean(axis=0)[0] == pytest.approx(overlaps[0, 1])
    assert pairs.mean(axis=0)[5] == pytest.approx(overlaps[2, 3])


def test_inertia_of_a_text_that_never_changes() -> None:
    row = np.random.default_rng(0).random(20)
    found = inertia(np.stack([row] * 8))
    assert (found.cosine, found.jaccard, found.kept) == pytest.approx((1.0, 1.0, 1.0))


def test_inertia_in_small() -> None:
    r = np.array([[4, 3, 0, 0], [4, 0, 3, 0], [0, 0, 3, 4], [4, 3, 0, 0]], float) / 5
    found = inertia(r)
    assert first_quarter(len(r)) == 1
    assert found.cosine == pytest.approx((16 / 25 + 9 / 25 + 0) / 3)
    assert found.jaccard == pytest.approx((1 / 3 + 1 / 3 + 0) / 3)
    assert found.kept == pytest.approx((1 + 0 + 2) / 6)  # neurons 0 and 1


def test_chance() -> None:
    r = np.random.default_rng(0).random((64, 4000))
    found = inertia(r)
    assert found.jaccard == pytest.approx(1 / 3, abs=0.01)
    assert found.kept == pytest.approx(0.5, abs=0.02)
    assert cosine(r[0], r[0]) == pytest.approx(1.0)
    assert jaccard(np.array([False]), np.array([False])) == 0.0


def test_brightness_sorts_by_the_first_quarter_without_sinks() -> None:
    r = np.zeros((5, 4))
    r[0] = [1, 0, 0, 0]  # an attention sink
    r[1] = [0.1, 0.9, 0.4, 0.2]
    picture = brightness(relative(r), sinks=1)
    assert picture.shape == (5, 4)
    assert picture[1].tolist() == sorted(picture[1], reverse=True)
    assert picture[0].tolist() == [0, 0, 0, pytest.approx(math.log(2 / 0.1) / math.log(40))]  # r √F = 2


def test_random_tokens(tiny_artifact: Path) -> None:
    artifact = open_artifact(tiny_artifact)
    drawn = random_tokens(artifact, 1000, 0)
    assert len(drawn) == 1000
    assert set(drawn) == set(range(artifact.shape.vocab_size)) - artifact.eos_token_ids
    assert random_tokens(artifact, 9, 0) == drawn[:9] != random_tokens(artifact, 9, 1)


def test_prompts_are_thirteen() -> None:
    assert len(SIMILARITY_PROMPTS) == len({prompt.label for prompt in SIMILARITY_PROMPTS}) == 13
    assert all(len((prompt.text or "").encode()) < 120 for prompt in SIMILARITY_PROMPTS)  # at most one byte a token
    first = SIMILARITY_PROMPTS[0].text or ""
    assert shuffled(first) == SIMILARITY_PROMPTS[3].text != first
    assert sorted(shuffled(first).rstrip(".").split()) == sorted(first.rstrip(".").split())


class Prefixed(Text):
    """A tokenizer that puts a token before every text."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return ([1] if special_tokens else []) + super().encode(text, special_tokens=False)


@pytest.mark.parametrize(("kind", "cases"), [(Text, 3), (Prefixed, 2)])
def test_activity_section(tiny_artifact: Path, kind: type[Text], cases: int) -> None:
    artifact = open_artifact(tiny_artifact)
    text, done = kind(artifact), []
    section = activity_section(Reader(artifact, "cpu"), text, done.append)
    assert sum(done) == activity_steps(bool(text.encode("")))
    assert len(section.tables[0].rows) == 3 * 2 * cases
    assert len(section.figures) == 4
    assert str(section.figures[1].chart).count("<image") == 2 * cases
    assert ("begins every sequence" in section.paragraphs[2]) == (kind is Prefixed)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_of_any_dtype(tmp_path: Path, dtype: str) -> None:
    values = torch.tensor([[1.0, -2.5], [0.3, 1e-4]]).to(getattr(torch, dtype))
    (tmp_path / contract.WEIGHTS_FILE).write_bytes(values.view(torch.uint8).numpy().tobytes())
    weights = {"w": {"dtype": dtype, "offset": 0, "shape": [2, 2]}}
    found = float32_weight(Artifact(tmp_path, {"weights": weights}, None, {}), "w")  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert (found == values.float().numpy()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_reader_on_a_gpu(tiny_model: Path, tiny_calibration: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / dtype
    run_ok(
        *build_tda(tiny_model, tiny_calibration),
        "-o",
        path,
        "--dtype",
        dtype,
        "--no-verify",
    )
    source, reader = resolve_model(str(tiny_model)), Reader(open_artifact(path), "cuda")
    tolerance = {"fp16": 1e-2, "bf16": 5e-2}[dtype]
    found = reader.relative_magnitudes(TOKENS, [1])[0]
    assert found == pytest.approx(transformers_magnitudes(tiny_model, TOKENS)[1], abs=tolerance)
    expected = torch.stack(reference_scores(source.reference(), source.spec, TOKENS, magnitude=True)).numpy()
    assert reader.scores(TOKENS) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_of_any_dtype(dtype: str) -> None:
    values = np.array([[1.0, -2.5, 0.0]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(dtype)
    found = _float32(device_tensor(bits, "cpu", dtype))
    assert found.dtype == np.float32
    assert (found == values).all()
