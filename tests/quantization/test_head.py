"""The head in a quantisation: rounded last, as the layers' linears are, where it lies by input channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tda_export.calibration.corpus import Corpus
from tda_export.errors import TdaError
from tda_export.models.source import ModelSource, resolve_model
from tda_export.quantization import hessians, run
from tda_export.quantization.folder import write_quantised
from tda_export.quantization.gptq import quantise_rows, row_order
from tda_export.quantization.kl import continuations, loss
from tda_export.quantization.nearest import read_matrix, round_matrix
from tda_export.quantization.run import quantize
from tda_export.quantization.settings import Quantizer, QuantizeSettings
from tda_export.weights.plan import read_rules
from tests.calibration.shown import Shown
from tests.quantization.test_run import (
    CORPUS,
    SETTINGS,
    TOKENS,
    Interruption,
    changed_weights,
    finished,
    interrupt,
)
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("name", ["gemma3", "llama", "llama-tied", "opt-post-norm", "gpt2"])
def test_the_head_is_rounded_as_the_layers_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By GPTQ with what the quantised layers give it, also a piece at a time; a tied embedding keeps its own codes."""
    source = resolve_model(str(save_tiny_model(name, tmp_path / "float")))
    settings = QuantizeSettings(**{**vars(SETTINGS), "rules": read_rules(["head=int4"])})
    found = quantize(source, CORPUS, settings, show=Shown())
    write_quantised(source, tmp_path / "out", found.codes, found.plan, found.about)
    model = resolve_model(str(tmp_path / "out")).reference()
    inputs: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for sequence in TOKENS[2:]:
            model(sequence[None])
    x = torch.cat(inputs)
    weight = source.reference().get_output_embeddings().weight.detach().T.contiguous()
    expected = quantise_rows(weight, row_order(x.T @ x), found.plan.integers["head"]).decode()
    got = found.codes["head"].decode()
    assert np.mean(got == expected) > 0.9  # sums of x x^T round in another order, and one other code changes later ones
    errors = [float((x @ (torch.from_numpy(each) - weight)).norm()) for each in (got, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)
    monkeypatch.setattr(run, "HEAD_ELEMENTS", 3 * 32 * weight.shape[0] + 1)
    pieces = quantize(source, CORPUS, settings, show=Shown()).codes
    assert np.array_equal(pieces["head"].decode(), found.codes["head"].decode())
    rows = read_matrix(source.spec, source.weights(), "embedding")
    nearest = round_matrix("embedding", rows, found.plan.integers["embedding"], symmetric=False)
    assert np.array_equal(found.codes["embedding"].decode(), nearest.decode())


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_a_head_that_no_scale_is_large_enough_for(quantizer: Quantizer, tiny_model: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][5, 7] = 3e7

    source = changed_weights(tiny_model, tmp_path / "model", enlarge)
    message = r"^head: some weights are too large for scales of int8_g32, .* float: --weights-for head=float\.$"
    settings = QuantizeSettings(**{**vars(SETTINGS), "quantizer": quantizer, "kl_sequences": 1})
    with pytest.raises(TdaError, match=message):
        quantize(source, CORPUS, settings, show=Shown())


def test_a_hessian_of_the_head_that_is_not_finite() -> None:
    with pytest.raises(TdaError, match=r"^head: its inputs are not finite\. Check the checkpoint\.$"):
        hessians.named_order(torch.full((2, 2), float("nan")), "head")


def test_the_head_may_change_after_an_interruption(tiny: ModelSource, tmp_path: Path) -> None:
    """No layer depends on it."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 12)
        with pytest.raises(Interruption):
            finished(tiny, tmp_path / "out")
    for head in ({"head": "whole"}, {"rules": read_rules(["head=float"])}):
        expected = finished(tiny, tmp_path / "expected", **head)
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, 0)
            assert finished(tiny, tmp_path / "out", **head) == expected


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_float_head_beside_an_embedding_of_integers(name: str, tmp_path: Path) -> None:
    """A tied head is not rounded with the embedding, and its loss is measured so."""
    source = resolve_model(str(save_tiny_model(name, tmp_path / "float")))
    settings = QuantizeSettings(**{**vars(SETTINGS), "rules": read_rules(["head=float,embedding=int4"])})
    found = quantize(source, CORPUS, settings, show=Shown())
    write_quantised(source, tmp_path / "out", found.codes, found.plan, found.about)
    again = resolve_model(str(tmp_path / "out"))
    assert torch.equal(again.reference().lm_head.weight, source.reference().lm_head.weight)
    dense = list(continuations(source.reference(), TOKENS[:2], 16))
    assert loss(dense, continuations(again.reference(), TOKENS[:2], 16)) == found.loss


def test_a_head_that_is_not_finite_is_refused_first(tiny_model: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 5] = float("nan")

    source = changed_weights(tiny_model, tmp_path / "model", damage)
    settings, corpus = (
        QuantizeSettings(**{**vars(SETTINGS), "kl_sequences": 0}),
        Corpus(TOKENS[:3], "some.txt", "0" * 64),
    )
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 0)
        with pytest.raises(TdaError, match=r"^head: the checkpoint has weights that are not finite\."):
            quantize(source, corpus, settings, show=Shown())
