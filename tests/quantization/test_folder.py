"""Quantised folders are read back exactly, for all ways in which families store tensors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tda_export.errors import TdaError
from tda_export.models.layout import Layout
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import linear_parts
from tda_export.quantization.folder import is_quantised_folder, write_quantised
from tda_export.quantization.nearest import read_matrix, round_matrix
from tda_export.weights.matrix import Major
from tda_export.weights.plan import FormatPlan, part_name, plan_formats, read_rules
from tests.tiny import FAMILIES, save_tiny_model


def rounded(
    source: ModelSource,
    output: Path,
    weights: str = "int8",
    rules: str = "",
    group: int = 32,
    head_major: Major = "output",
) -> FormatPlan:
    """Quantise a tiny model without data and return the plan."""
    spec = source.spec
    plan = plan_formats(
        spec.num_layers,
        linear_parts(spec),
        tied_head=spec.tied_head,
        weights=weights,
        group=group,
        rules=read_rules([rules]) if rules else [],
        head_major=head_major,
    )
    matrices = {name: read_matrix(spec, source.weights(), name, head_major=plan.head_major) for name in plan.integers}
    codes = {
        name: round_matrix(name, matrices[name], format, symmetric=False) for name, format in plan.integers.items()
    }
    write_quantised(source, output, codes, plan, {})
    return plan


def made(
    name: str, folder: Path, rules: str = "", weights: str = "int8", head_major: Major = "output"
) -> tuple[ModelSource, ModelSource]:
    """A tiny model, and its quantised folder."""
    source = resolve_model(str(save_tiny_model(name, folder / "float")))
    (folder / "float" / "LICENSE.md").write_text("Do what you like.")
    rounded(source, folder / "quantised", weights, rules, head_major=head_major)
    return source, resolve_model(str(folder / "quantised"))


@pytest.mark.parametrize("head_major", ["input", "output"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_comes_back_exactly(name: str, head_major: Major, tmp_path: Path) -> None:
    """Parts equal the codes, other tensors equal the checkpoint, and transformers computes with these weights. A head
    by input is one of its own."""
    source, quantised = made(name, tmp_path, head_major=head_major)
    spec = quantised.spec
    assert spec == replace(source.spec, tied_head=source.spec.tied_head and head_major == "output")
    formats = quantised.formats
    assert formats is not None
    assert formats.head_major == head_major
    assert quantised.fingerprint != source.fingerprint
    layout, checkpoint = Layout(spec, quantised.weights()), Layout(spec, source.weights())
    codes = quantised.codes
    assert ("head" in codes) == (not spec.tied_head)
    if not spec.tied_head:
        head, exact = quantised.reference().get_output_embeddings().weight.detach().numpy(), codes["head"].decode()
        assert np.array_equal(head.T if head_major == "input" else head, exact)
    for layer in range(spec.num_layers):
        for part in linear_parts(spec):
            exact = codes[part_name(layer, part)].decode()
            assert np.array_equal(layout.part(layer, part).load().numpy().T, exact)
            assert np.abs(exact - checkpoint.part(layer, part).load().numpy().T).max() < 0.03
    reference = quantised.reference()
    weights = quantised.weights()
    for parameter, value in reference.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights.load(parameter).float())
        assert weights.shape(parameter) == tuple(value.shape)
    original = dict(source.reference().named_parameters(remove_duplicate=False))
    inside = [value for parameter, value in reference.named_parameters() if not torch.equal(value, original[parameter])]
    assert all(value.dim() == 2 for value in inside)
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        difference = reference(tokens).logits - source.reference()(tokens).logits
    assert 0 < difference.abs().max() < 0.5


@pytest.mark.parametrize("name", ["llama", "phi3", "phi4-mini", "gpt-neox", "gpt2"])
def test_matrices_that_stay_floats(name: str, tmp_path: Path) -> None:
    """Also if they share a tensor of the checkpoint with integers, and if layers differ."""
    rules = "layers.*.v=float,layers.1.up=float,layers.2.*=float,embedding=float,head=int4"
    source, quantised = made(name, tmp_path, rules, "int4")
    spec, codes = source.spec, quantised.codes
    mine, theirs = Layout(spec, quantised.weights()), Layout(spec, source.weights())
    for layer in range(spec.num_layers):
        for part in linear_parts(spec):
            float_part = part == "v" or (layer == 1 and part == "up") or layer == 2
            assert (part_name(layer, part) in codes) == (not float_part)
            if float_part:
                assert torch.equal(mine.part(layer, part).load(), theirs.part(layer, part).load())
            else:
                assert np.array_equal(mine.part(layer, part).load().numpy().T, codes[part_name(layer, part)].decode())
    quantised.reference()


def test_head_of_its_own_where_the_configuration_ties_it(tmp_path: Path) -> None:
    folder = save_tiny_model("llama-tied", tmp_path / "float")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(folder))
    for weights in ("int8", "float"):
        rounded(source, tmp_path / weights, "int8", "head=float" if weights == "float" else "")
        quantised = resolve_model(str(tmp_path / weights))
        assert not quantised.spec.tied_head
        assert ("head" in quantised.codes) == (weights == "int8")
        reference = quantised.reference()
        assert (reference.lm_head.weight - tensors["lm_head.weight"]).abs().max() < 0.03


@pytest.mark.parametrize(
    ("rules", "tied", "formats"),
    [
        ("head=int4", False, ("int8_g32", "int4_g32")),
        ("embedding=int4", False, ("int4_g32", "int8_g32")),
        ("embedding=float", False, ("float", "int8_g32")),
        ("head=float", False, ("int8_g32", "float")),
        ("embedding=int4,head=float", False, ("int4_g32", "float")),
        ("head=float,embedding=float", True, ("float", None)),
    ],
)
def test_formats_of_a_tied_head_by_input(
    rules: str, tied: bool, formats: tuple[str, str | None], tmp_path: Path
) -> None:
    """It has a format of its own, unless both stay floats: then it is the embedding."""
    source, quantised = made("llama-tied", tmp_path, rules, "int4", "input")
    plan = quantised.formats
    assert plan is not None
    by_input = formats[1] not in (None, "float")
    assert (quantised.spec.tied_head, plan.head_major) == (tied, "input" if by_input else "output")
    assert tuple(plan.to_dict().get(name) for name in ("embedding", "head")) == formats
    reference, dense = quantised.reference(), source.reference().lm_head.weight
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) == tied
    assert (reference.lm_head.weight - dense).abs().max() < 0.3
    assert torch.equal(reference.lm_head.weight, dense) != by_input
    assert json.loads((quantised.folder / "config.json").read_text())["tie_word_embeddings"] == tied


def test_a_folder_of_the_first_version(tmp_path: Path) -> None:
    """It has no `head_major`, and its head lies by output."""
    _, quantised = made("llama", tmp_path)
    head = quantised.reference().lm_head.weight.clone()
    path = quantised.folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= {"version": 1}
    del content["quantization_config"]["head_major"]
    path.write_text(json.dumps(content))
    again = resolve_model(str(quantised.folder))
    assert again.formats is not None
    assert again.formats.head_major == "output"
    assert torch.equal(again.reference().lm_head.weight, head)


def test_bfloat16_tensors_keep_their_dtype(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "float")
    halved = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    rounded(resolve_model(str(folder)), tmp_path / "quantised", "int4")
    source = resolve_model(str(tmp_path / "quantised"))
    weights = source.weights()
    assert weights.load("model.norm.weight").dtype == torch.bfloat16
    assert weights.load("model.layers.0.mlp.up_proj.weight").dtype == torch.float32
    assert source.reference().dtype == torch.float32


def test_float_models_have_no_codes(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model))
    assert source.quantisation is None
    assert len(source.codes) == 0


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    made("llama", folder)
    return folder / "quantised"


def test_what_else_is_in_the_folder(good: Path) -> None:
    source = resolve_model(str(good))
    assert source.tokenizer("Hi").input_ids == resolve_model(str(good.parent / "float")).tokenizer("Hi").input_ids
    assert source.eos_token_ids == resolve_model(str(good.parent / "float")).eos_token_ids
    assert (good / "LICENSE.md").read_text() == "Do what you like."
    assert is_quantised_folder(good)
    assert not is_quantised_folder(good.parent / "float")
    content = json.loads((good / "config.json").read_text())
    quantisation = content.pop("quantization_config")
    assert content == json.loads((good.parent / "float" / "config.json").read_text()) | {"tie_word_embeddings": False}
    assert (quantisation["quant_method"], quantisation["version"]) == ("tda_export", 2)
    assert quantisation["formats"]["layers.2.down"] == "int8_g32"


def damaged(good: Path, folder: Path, name: str, change: object) -> ModelSource:
    """Copy a folder with a tensor replaced or removed."""
    shutil.copytree(good, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "model.safetensors")
    return resolve_model(str(folder))


DAMAGES = {
    "missing": ("layers.1.q.scales", lambda tensor: None, r"layers\.1\.q\.scales is missing"),
    "shape": (
        "layers.2.up",
        lambda tensor: tensor[1:].clone(),
        r"layers\.2\.up should be uint8 \[64, 96\] and is uint8 \[63, 96\]",
    ),
    "dtype": (
        "embedding.scales",
        lambda tensor: tensor.float(),
        r"embedding\.scales should be float16 \[259, 2\] and is F32 \[259, 2\]",
    ),
    "zero points": (
        "head.zero_points",
        lambda tensor: tensor[:, :1].clone(),
        r"head\.zero_points should be uint8 \[259, 2\] and is uint8 \[259, 1\]",
    ),
    "NaN": ("layers.0.o.scales", lambda tensor: tensor * float("nan"), r"layers\.0\.o\.scales has scales that are no"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(good: Path, tmp_path: Path, damage: str) -> None:
    name, change, message = DAMAGES[damage]
    source = damaged(good, tmp_path / "bad", name, change)
    with pytest.raises(TdaError, match=rf"^\S+model\.safetensors: {message}.*\. Make it again with 'tda-export"):
        source.reference()


CONTENTS = {
    "version": (
        {"version": 3},
        r"quantization_config has version 3, and this version of tda-export reads 1 and 2\. Upgrade",
    ),
    "head": (
        {"head_major": "x"},
        r"quantization_config: head_major is x\. Make it again with 'tda-export quantize'\.$",
    ),
    "no formats": ({"formats": None}, r"quantization_config: formats are None, not names with formats\. Make it again"),
    "format": ({"formats": {"layers.0.q": "int3"}}, r"the format of layers\.0\.q is int3, which is not known\. Make"),
    "matrices": ({"formats": {"layers.9.q": "float"}}, r"quantization_config: embedding has no format\. Make it again"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_unknown_contents_are_named(good: Path, tmp_path: Path, case: str) -> None:
    change, message = CONTENTS[case]
    shutil.copytree(good, tmp_path / "bad")
    config = json.loads((good / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TdaError, match=message):
        resolve_model(str(tmp_path / "bad")).weights()


def test_a_matrix_too_many_is_named(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bad")
    config = json.loads((good / "config.json").read_text())
    config["quantization_config"]["formats"]["layers.3.q"] = "int8_g32"
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TdaError, match=r"layers\.3\.q is no matrix of this model\. Make it again"):
        _ = resolve_model(str(tmp_path / "bad")).spec


def test_weights_that_are_no_numbers_are_not_rounded(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model))
    weights = source.weights()

    class Broken:
        def __contains__(self, name: str) -> bool:
            return True

        def shape(self, name: str) -> tuple[int, ...]:
            return weights.shape(name)

        def load(self, name: str) -> torch.Tensor:
            return weights.load(name) / 0

    with pytest.raises(TdaError, match=r"^layers\.1\.o: the checkpoint has weights that are not finite\. "):
        read_matrix(source.spec, Broken(), "layers.1.o")
