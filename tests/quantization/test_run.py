"""A whole quantisation: layers of every family, interruptions, and the measured loss."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tda_export.bench.random_model import byte_tokenizer
from tda_export.calibration.corpus import Corpus, load_corpus
from tda_export.errors import TdaError, UsageError
from tda_export.models.layerwise import LayerwiseModel, layer_module
from tda_export.models.linear_modules import watch_sites
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import linear_sites
from tda_export.quantization import hessians, resume, run
from tda_export.quantization.folder import write_quantised
from tda_export.quantization.hessians import site_hessian
from tda_export.quantization.kl import continuations, loss
from tda_export.quantization.layers import first_inputs, layer_calls, pass_on
from tda_export.quantization.resume import PartialLayers
from tda_export.quantization.run import quantize
from tda_export.quantization.settings import Quantizer, QuantizeSettings, split
from tda_export.ranks import ALONE
from tda_export.weights.plan import read_rules
from tests.calibration.shown import Shown
from tests.models.test_source_gguf import write_gguf
from tests.tiny import FAMILIES, save_tiny_model

TOKENS = torch.randint(3, 259, (5, 24), generator=torch.Generator().manual_seed(0))
CORPUS = Corpus(TOKENS, "some.txt", "0" * 64)
SETTINGS = QuantizeSettings(sequences=3, kl_sequences=2, prompt_tokens=16, continuation_tokens=8)


class Interruption(Exception):
    pass


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_layers_alone_do_what_the_model_does(name: str, family: Any) -> None:
    """Inputs of each layer and of its sites, and so the Hessians, are those of a whole pass."""
    model, spec = family(name)
    calls, inputs = layer_calls(model, spec, TOKENS[0]), first_inputs(model, spec, TOKENS[:2])
    read: dict[tuple[int, str], torch.Tensor] = {}
    left: list[torch.Tensor] = []
    last = layer_module(model, spec, spec.num_layers - 1)
    handle = last.register_forward_hook(
        lambda module, arguments, output: left.append(output[0] if isinstance(output, tuple) else output)
    )

    def observe(layer: int, site: str, x: torch.Tensor) -> None:
        if site == "qkv":
            x = torch.cat([10 * x[:1], x[1:]])
        read[layer, site] = read.get((layer, site), torch.zeros(())) + x.T @ x

    with torch.no_grad(), watch_sites(model, spec, observe):
        for sequence in TOKENS[:2]:
            model.base_model(sequence[None], use_cache=False)
    handle.remove()
    for layer in range(spec.num_layers):
        for site in linear_sites(spec):
            hessian = site_hessian(model, spec, layer, site, calls[layer], inputs)
            assert torch.allclose(hessian, read[layer, site], rtol=1e-4, atol=1e-3)
        pass_on(calls[layer], inputs, model.device)
    for mine, theirs in zip(inputs, left, strict=True):
        assert torch.allclose(mine, theirs.view_as(mine), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_folder_is_the_model_whose_loss_was_measured(name: str, tmp_path: Path) -> None:
    """In every family, also with packed, transposed and rotated weights."""
    source = resolve_model(str(save_tiny_model(name, tmp_path / "float")))
    before = {name: value.clone() for name, value in source.reference().state_dict().items()}
    quantised = quantize(source, CORPUS, SETTINGS, show=Shown(), output=tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in source.reference().state_dict().items())
    write_quantised(source, tmp_path / "out", quantised.codes, quantised.plan, quantised.about)
    again = resolve_model(str(tmp_path / "out"))
    dense = list(continuations(source.reference(), TOKENS[:2], 16))
    measured = loss(dense, continuations(again.reference(), TOKENS[:2], 16))
    assert again.quantisation is not None
    assert again.quantisation["loss"] == measured.describe()
    assert measured.tokens == 16
    assert 0 < measured.kl < 1
    for name, codes in quantised.codes.items():
        assert np.array_equal(again.codes[name].decode(), codes.decode())


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    """The transformers model, from which the weights come, stays unchanged."""
    source = write_gguf(tmp_path / "model.gguf")
    vars(source)["tokenizer"] = byte_tokenizer()
    before = {name: value.clone() for name, value in source.reference().state_dict().items()}
    corpus = Corpus(TOKENS % 8, "some.txt", "0" * 64)
    quantised = quantize(source, corpus, SETTINGS, show=Shown(), output=tmp_path / "out")
    write_quantised(source, tmp_path / "out", quantised.codes, quantised.plan, quantised.about)
    assert all(torch.equal(value, before[name]) for name, value in source.reference().state_dict().items())
    again = resolve_model(str(tmp_path / "out"))
    assert again.spec == source.spec
    assert again.generation_config == source.generation_config
    measured = loss(
        list(continuations(source.reference(), corpus.tokens[:2], 16)),
        continuations(again.reference(), corpus.tokens[:2], 16),
    )
    assert measured == quantised.loss
    assert again.tokenizer("Hi").input_ids == source.tokenizer("Hi").input_ids


def test_gptq_loses_less_than_rounding(tiny: ModelSource) -> None:
    tokens = torch.randint(3, 259, (80, 64), generator=torch.Generator().manual_seed(1))

    def kl(**options: Any) -> float:
        settings = QuantizeSettings(sequences=64, kl_sequences=16, prompt_tokens=32, continuation_tokens=32, **options)
        found = quantize(tiny, Corpus(tokens[: settings.all_sequences], "some.txt", "0" * 64), settings, show=Shown())
        assert found.loss is not None
        return found.loss.kl

    best = kl()
    assert best < 0.85 * kl(quantizer="rtn")
    assert best < kl(symmetric=True)
    assert kl(weights="int8", quantizer="rtn") < 0.05 * best


def changed_weights(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> ModelSource:
    """Copy a model with other weights."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return resolve_model(str(folder))


def test_a_model_whose_logits_are_not_finite(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN after all layers, which no Hessian sees. It is found before any layer is quantised."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    source = changed_weights(tiny_model, tmp_path / "model", damage)
    monkeypatch.setattr(run, "_Run", None)
    with pytest.raises(TdaError, match=r"model: the logits are not finite\. Download the weights again\.$"):
        quantize(source, CORPUS, SETTINGS, show=Shown())


def test_a_loss_that_is_not_finite() -> None:
    dense = [torch.zeros(2, 4).log_softmax(dim=-1)] * 2
    message = r"^The KL of the quantised model to the float model is not finite\. Leave matrices float by --w"
    for wrong in (float("nan"), float("-inf")):
        with pytest.raises(TdaError, match=message):
            loss(dense, iter([dense[0], torch.full((2, 4), wrong)]))


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_weights_that_no_scale_is_large_enough_for(quantizer: Quantizer, tiny_model: Path, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = 2e6

    source = changed_weights(tiny_model, tmp_path / "model", enlarge)
    message = r"^layers\.1\.up: some weights are too large for scales of int4_g32, which are float16\. Leave the matrix"
    settings = QuantizeSettings(**{**vars(SETTINGS), "quantizer": quantizer})
    with pytest.raises(TdaError, match=message + r" float: --weights-for layers\.1\.up=float\.$"):
        quantize(source, CORPUS, settings, show=Shown())
    rules = read_rules(["layers.1.up=float"])
    quantize(source, CORPUS, QuantizeSettings(**{**vars(settings), "rules": rules}), show=Shown())


def test_progress_reaches_its_end(tiny: ModelSource) -> None:
    show = Shown()
    quantize(tiny, CORPUS, SETTINGS, show=show)
    assert show.bars == [["Reading the float model", 3, 3], ["Quantising", 5, 5], ["Measuring", 2, 2]]


def test_rounding_needs_no_data(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a model: matrices are read and rounded one by one."""
    monkeypatch.setattr(ModelSource, "reference", None)
    settings = QuantizeSettings(quantizer="rtn", kl_sequences=0)
    found = quantize(tiny, None, settings, show=Shown())
    assert found.loss is None
    assert "loss" not in found.about
    assert found.about["quantizer"] == {"name": "rtn", "symmetric": False}
    assert len(found.codes) == 23


def test_a_rank_without_sequences(tiny: ModelSource) -> None:
    """There may be more ranks than held-out sequences, and rounding to nearest reads no others."""
    settings, none = QuantizeSettings(quantizer="rtn", kl_sequences=2), TOKENS[:0]
    plan, model = settings.plan(tiny.spec), LayerwiseModel(tiny, "cpu")
    alone = run._Run(tiny, plan, settings, "cpu", model, none, none, None, ALONE)
    alone.begin()
    for layer in range(tiny.spec.num_layers):
        alone.layer(layer)
    alone.head()
    assert list(alone.log_probabilities()) == []
    assert len(alone.codes) == 23


def test_first_tokens_weigh_more(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    first = quantize(tiny, CORPUS, SETTINGS, show=Shown()).codes
    monkeypatch.setattr(hessians, "FIRST_TOKEN_WEIGHT", 1.0)
    other = quantize(tiny, CORPUS, SETTINGS, show=Shown()).codes
    assert not np.array_equal(first["layers.0.k"].codes, other["layers.0.k"].codes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(source: ModelSource, output: Path, **options: Any) -> dict[str, bytes]:
    found = quantize(source, CORPUS, QuantizeSettings(**{**vars(SETTINGS), **options}), show=Shown(), output=output)
    write_quantised(source, output, found.codes, found.plan, found.about)
    return files(output)


def interrupt(patch: pytest.MonkeyPatch, call: int) -> None:
    original, calls = run.quantise_together, iter(range(10**6))

    def broken(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Interruption
        return original(*arguments, **options)

    patch.setattr(run, "quantise_together", broken)


@pytest.mark.parametrize(("name", "call"), [("llama", 3), ("llama", 9), ("llama", 12), ("gpt-neox", 5)])
def test_an_interrupted_run_gives_the_same_folder(name: str, call: int, tmp_path: Path) -> None:
    source = resolve_model(str(save_tiny_model(name, tmp_path / "float")))
    expected = finished(source, tmp_path / "whole")
    sites = len(linear_sites(source.spec))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, call)
        with pytest.raises(Interruption):
            finished(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = run.quantise_together
        patch.setattr(
            run, "quantise_together", lambda *given, **options: calls.append(1) or original(*given, **options)
        )
        assert finished(source, tmp_path / "out") == expected
    assert len(calls) == (3 - call // sites) * sites + 1  # the head is the last; finished layers are not repeated


def test_layers_of_another_quantisation_are_not_used(tiny: ModelSource, tmp_path: Path) -> None:
    expected = finished(tiny, tmp_path / "expected", symmetric=True)
    finished(tiny, tmp_path / "out")
    assert finished(tiny, tmp_path / "out", symmetric=True) == expected


def test_damaged_layers_are_done_again(tiny: ModelSource, tmp_path: Path) -> None:
    expected = finished(tiny, tmp_path / "out")
    layer = tmp_path / "out.partial" / "layer-00001.safetensors"
    layer.write_bytes(layer.read_bytes()[:-100])
    assert finished(tiny, tmp_path / "out") == expected


def test_finished_layers_are_removed(tiny: ModelSource, tmp_path: Path) -> None:
    finished(tiny, tmp_path / "out")
    partial = PartialLayers(tmp_path / "out", {})
    assert len(list(partial.folder.iterdir())) == 3
    others = ["layer-00001.safetensors", "layer-00002.safetensors", "layer-norms.safetensors", "notes.txt"]
    save_file({"w": torch.zeros(1)}, partial.folder / others[0])  # not our file
    (partial.folder / others[1]).unlink()
    (partial.folder / others[1]).mkdir()
    (partial.folder / others[2]).write_bytes((partial.folder / "layer-00000.safetensors").read_bytes())
    (partial.folder / others[3]).write_text("mine")
    partial.remove()
    assert sorted(path.name for path in partial.folder.iterdir()) == others
    shutil.rmtree(partial.folder)
    finished(tiny, tmp_path / "out")
    partial.remove()
    assert not partial.folder.exists()
    partial.remove()


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_cannot_be_kept(
    layer: int, tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = resume.save_file

    def fill_the_disk(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        if f"layers.{layer}.q" in tensors:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(resume, "save_file", fill_the_disk)
    goes_on = f" Start it again to resume after the layers in {tmp_path}/out.partial." if layer else ""
    expected = (
        f"{tmp_path}/out.partial/layer-0000{layer}.safetensors: could not be written (No space left on device). "
        f"Nothing was left behind. Free some space, or choose another output. The quantisation has stopped.{goes_on}"
    )
    with pytest.raises(TdaError, match=f"^{re.escape(expected)}$"):
        quantize(tiny, CORPUS, SETTINGS, show=Shown(), output=tmp_path / "out")


def test_codes_of_layers_lie_beside_the_output(tiny: ModelSource, tmp_path: Path) -> None:
    """They are not in memory. Without an output the same codes are in memory, packed."""
    inside = quantize(tiny, CORPUS, SETTINGS, show=Shown())
    found = quantize(tiny, CORPUS, SETTINGS, show=Shown(), output=tmp_path / "out")
    assert list(found.codes) == list(inside.codes)
    for name, codes in found.codes.items():
        for field in ("codes", "scales", "zero_points"):
            assert np.array_equal(getattr(codes, field), getattr(inside.codes[name], field))
    layer = tmp_path / "out.partial" / "layer-00001.safetensors"
    layer.unlink()
    message = f"^{re.escape(str(layer))}: it was written, and can no longer be read \\(.*\\)\\. Start again; the other"
    with pytest.raises(TdaError, match=message):
        write_quantised(tiny, tmp_path / "out", found.codes, found.plan, found.about)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_layers_that_is_in_the_way(tiny: ModelSource, tmp_path: Path) -> None:
    partial = PartialLayers(tmp_path / "out", {})
    place, layer = partial.folder, partial.folder / "layer-00000.safetensors"
    message = f"^{re.escape(str(place))} exists, and finished layers are stored there until all are done\\. Move it"
    partial.check()
    place.write_text("a file")
    with pytest.raises(UsageError, match=message):
        partial.check()
    place.unlink()
    layer.mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        partial.check()
    layer.rmdir()
    save_file({"w": torch.zeros(1)}, layer)
    with pytest.raises(UsageError, match=message):
        partial.check()
    finished(tiny, tmp_path / "out")
    partial.check()
    layer.write_bytes(layer.read_bytes()[:-100])
    partial.check()  # damaged layers are done again


def test_inputs_that_are_not_finite(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run.site_hessian
    monkeypatch.setattr(run, "site_hessian", lambda *arguments: original(*arguments) / 0)
    with pytest.raises(TdaError, match=r"^Layer 0, qkv: its inputs are not finite\. Check the checkpoint\.$"):
        quantize(tiny, CORPUS, SETTINGS, show=Shown())


@pytest.mark.parametrize(
    ("found", "options", "read", "held_out"),
    [
        (80, {}, 64, 16),
        (40, {}, 32, 8),
        (2, {}, 1, 1),
        (64, {"kl_sequences": 0}, 64, 0),
        (9, {"kl_sequences": 0}, 9, 0),
        (16, {"quantizer": "rtn"}, 0, 16),
        (3, {"quantizer": "rtn"}, 0, 3),
        (24, {"quantizer": "rtn", "bits_per_weight": 6.0}, 8, 16),
        (8, {"quantizer": "rtn", "bits_per_weight": 6.0, "kl_sequences": 0}, 8, 0),
    ],
)
def test_sequences_are_read_or_held_out(found: int, options: dict[str, Any], read: int, held_out: int) -> None:
    tokens = torch.arange(found * 4).view(found, 4)
    others, first = split(
        Corpus(tokens, "some.txt", "0" * 64), QuantizeSettings(**{"sequences": 64, "kl_sequences": 16, **options})
    )
    assert (len(others), len(first)) == (read, held_out)
    assert torch.equal(torch.cat([first, others]), tokens)


def test_every_quantiser_is_measured_on_the_same_text() -> None:
    """It is the built-in text, as the command draws it for each quantiser."""
    tokenizer = byte_tokenizer()
    measured = []
    for options in ({"quantizer": "rtn"}, {"sequences": 3}, {"sequences": 9}):
        settings = QuantizeSettings(**{"kl_sequences": 2, "prompt_tokens": 16, "continuation_tokens": 8, **options})
        corpus = load_corpus(
            "builtin", tokenizer, text_column=None, sequences=settings.all_sequences, length=24, seed=0, vocab_size=259
        )
        measured.append(split(corpus, settings)[1])
    assert torch.equal(measured[0], measured[1])
    assert torch.equal(measured[0], measured[2])


def test_too_little_text() -> None:
    message = r"^GPTQ reads sequences and measures on others, and 1 is too few for that\. Give text for more, or"
    with pytest.raises(UsageError, match=message):
        split(Corpus(TOKENS[:1], "some.txt", "0" * 64), QuantizeSettings())
    message = r"^--bits-per-weight reads .* Give text for more, or --kl-sequences 0\.$"
    with pytest.raises(UsageError, match=message):
        split(Corpus(TOKENS[:1], "some.txt", "0" * 64), QuantizeSettings(quantizer="rtn", bits_per_weight=6.0))


def test_nothing_to_quantise(tiny: ModelSource) -> None:
    settings = QuantizeSettings(rules=read_rules(["*=float"]))
    with pytest.raises(UsageError, match=r"^All matrices would stay floats, so there is nothing to quantise\. Change"):
        settings.plan(tiny.spec)
