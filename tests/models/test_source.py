"""All ways to name a model, and their errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from tda_export.errors import TdaError
from tda_export.models import source as source_module
from tda_export.models.families import FAMILIES
from tda_export.models.source import HUB_FILES, HUB_IGNORED, ModelSource, resolve_model
from tests.tiny import save_tiny_model

WAY_OUT = r"Give a model folder, a \.gguf file, a hub id \(org/name\) or smollm2-135m\.$"


def no_notice(line: str) -> None:
    raise AssertionError(f"unexpected notice: {line}")


# A folder


def test_folder(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model), notify=no_notice)
    assert source == ModelSource(str(tiny_model), tiny_model)
    assert source.spec.architecture == "LlamaForCausalLM"
    assert source.tokenizer("abc").input_ids == source.tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    assert source.generation_config["eos_token_id"] == 2
    assert source.weights().shape("model.embed_tokens.weight") == (259, 64)


def test_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model", notify=no_notice).folder == folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_has_the_weights_of_the_checkpoint(tiny_model: Path, dtype: torch.dtype) -> None:
    source = resolve_model(str(tiny_model))
    model, weights = source.reference(dtype=dtype), source.weights()
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, weights.load(name).to(dtype))


def test_reference_has_soft_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of transformers, such as 5.17, choose SDPA for Gemma 2, without soft caps. Others refuse it."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    model = resolve_model(str(save_tiny_model("gemma2", tmp_path / "model")), notify=no_notice).reference()
    assert model.config._attn_implementation == "eager"
    assert model(torch.arange(12)[None]).logits.isfinite().all()


def test_generation_config_falls_back_to_the_configuration(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert resolve_model(str(folder)).generation_config["eos_token_id"] == 2


def test_damaged_generation_config_is_no_missing_one(folder: Path) -> None:
    """It may have the stop tokens, without which the model would not stop."""
    (folder / "generation_config.json").write_text("{nope")
    with pytest.raises(TdaError, match=r"generation_config\.json"):
        _ = resolve_model(str(folder)).generation_config


def test_folder_that_holds_no_model(tmp_path: Path) -> None:
    name = re.escape(str(tmp_path))
    message = rf"^{name}: there is no config\.json, so this is not a Hugging Face model folder\. {WAY_OUT}"
    with pytest.raises(TdaError, match=message):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "../missing", "~/missing/here", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(TdaError, match=rf"^{re.escape(name)}: no such folder\. {WAY_OUT}"):
        resolve_model(name)


def test_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"anything")
    with pytest.raises(TdaError, match=rf"model\.bin: neither a model folder nor a \.gguf file\. {WAY_OUT}"):
        resolve_model(str(path))


# Damaged folders: one line that names the model


def set_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").write_text("{nope"),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: set_config(folder, model_type="unheard-of"),
        lambda folder: set_config(folder, hidden_size=63, head_dim=None),
        lambda folder: set_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
    ],
    ids=["no-json", "empty", "unknown-type", "odd-size", "incomplete-rope"],
)
def test_damaged_configuration(damage: Callable[[Path], Any], folder: Path) -> None:
    damage(folder)
    with pytest.raises(TdaError, match=rf"^{folder}: the model cannot be loaded \(.+\)\. {WAY_OUT}") as caught:
        _ = resolve_model(str(folder)).spec
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{nope", "{}"])
def test_damaged_tokenizer(content: str | None, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(TdaError, match=rf"^{folder}: the model cannot be loaded \(.+\)\. {WAY_OUT}") as caught:
        _ = resolve_model(str(folder)).tokenizer
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "gpt2"])
def test_missing_tokenizer_is_not_replaced_by_an_empty_one(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(name, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(TdaError, match=rf"^{folder}: its tokenizer has no tokens except special ones: .+ again\.$"):
        _ = resolve_model(str(folder)).tokenizer


def test_slow_tokenizer_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *arguments, **options: Slow())
    with pytest.raises(
        TdaError, match=r"its tokenizer has no fast version \(tokenizer\.json\), which artifacts need\.$"
    ):
        _ = resolve_model(str(tiny_model)).tokenizer


def test_reference_refuses_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    source = resolve_model(str(folder))
    for load in (source.reference, source.weights):
        with pytest.raises(TdaError, match=r"pickled \.bin files are not"):
            load()


def test_no_code_of_a_checkpoint_is_run(folder: Path) -> None:
    (folder / "code.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    set_config(folder, model_type="foreign", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(TdaError, match="the model cannot be loaded"):
        _ = resolve_model(str(folder)).config


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model_type": "unheard-of"},
        {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}},
        {"auto_map": {"AutoModelForCausalLM": "code.Model"}},
    ],
    ids=["plain", "unknown-type", "own-configuration", "own-model"],
)
def test_unsupported_architecture_is_named_before_transformers_sees_it(
    fields: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    set_config(folder, architectures=["ForeignForCausalLM"], **fields)
    message = (
        rf"^Architecture ForeignForCausalLM is not supported; supported are {', '.join(sorted(FAMILIES))}\. "
        r"Choose a model of one of these\.$"
    )
    with pytest.raises(TdaError, match=message):
        _ = resolve_model(str(folder)).spec


@pytest.mark.parametrize("architectures", [None, []])
def test_architecture_need_not_be_named(architectures: list[str] | None, folder: Path) -> None:
    set_config(folder, architectures=architectures)
    assert resolve_model(str(folder)).spec.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("architectures", [3, {"a": 1}, "LlamaForCausalLM"], ids=["number", "object", "text"])
def test_architectures_of_a_wrong_type(architectures: object, folder: Path) -> None:
    set_config(folder, architectures=architectures)
    with pytest.raises(TdaError, match=rf"^{folder}: .*architectures"):
        _ = resolve_model(str(folder)).spec


# Weights that do not fit the configuration, which transformers would initialise at random


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("name", [DOWN, "lm_head.weight", "model.norm.weight"])
def test_missing_tensor_is_named(name: str, folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(name))
    message = (
        rf"^{folder}: the checkpoint does not fit its configuration \(missing: {re.escape(name)}\)\. "
        r"Take config\.json and the weights from the same place\.$"
    )
    with pytest.raises(TdaError, match=message):
        resolve_model(str(folder)).reference()


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    change_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name])
    message = r"\(missing: model\.layers\.2\.input_layernorm\.weight and 8 more\)"
    with pytest.raises(TdaError, match=message):
        resolve_model(str(folder)).reference()


def test_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({DOWN: torch.zeros(64, 95)}))
    with pytest.raises(TdaError, match=rf"^{folder}: .*{re.escape(DOWN)}") as caught:
        resolve_model(str(folder)).reference()
    assert "\n" not in str(caught.value)


def test_head_of_a_tied_checkpoint_is_not_missed(tmp_path: Path) -> None:
    folder = save_tiny_model("llama-tied", tmp_path / "tied")
    source = resolve_model(str(folder))
    assert "lm_head.weight" not in source.weights()
    model = source.reference()
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "opt"])
def test_own_head_of_a_checkpoint_that_calls_it_tied_is_kept(family: str, tmp_path: Path) -> None:
    """transformers ties a head only if it is missing or equal."""
    folder = save_tiny_model(family, tmp_path / "model")
    embedding = f"{resolve_model(str(folder)).spec.names.embedding}.weight"
    assert resolve_model(str(folder)).spec.tied_head
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert resolve_model(str(folder)).spec.tied_head
    head = torch.randn(259, 64)
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    source = resolve_model(str(folder))
    assert not source.spec.tied_head
    assert torch.equal(source.reference().lm_head.weight, head)
    assert torch.equal(source.weights().load("lm_head.weight"), head)


def test_head_of_another_shape_than_the_embedding_that_it_is_tied_to(tmp_path: Path) -> None:
    folder = save_tiny_model("llama-tied", tmp_path / "model")
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 64)}))
    message = (
        r"^lm_head\.weight has shape \[3, 64\] and model\.embed_tokens\.weight, which config\.json ties it to, "
        r"\[259, 64\]\. Take config\.json and the weights from the same place\.$"
    )
    with pytest.raises(TdaError, match=message):
        _ = resolve_model(str(folder)).spec


def test_tensors_that_the_model_does_not_have_are_left_alone(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"optimizer.step": torch.zeros(1)}))
    assert resolve_model(str(folder)).reference().config.num_hidden_layers == 3


# The hub


class Hub:
    """Replaces `snapshot_download`: returns a folder, or fails."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def __call__(self, model: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (allow_patterns, ignore_patterns) == (HUB_FILES, HUB_IGNORED)
        self.asked.append(model)
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_model_is_fetched_with_one_notice(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tiny_model)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    notices: list[str] = []
    source = resolve_model("org/name", notify=notices.append)
    assert source == ModelSource("org/name", tiny_model)
    assert source.spec.num_layers == 3
    assert notices == ["Looking for org/name on the Hugging Face hub"]
    assert hub.asked == ["org/name"]


@pytest.mark.parametrize("name", ["org/name", "gpt2", "smollm2-135M"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("401 Client Error.\n\nRepository Not Found\nfor url"), r"401 Client Error\."),
        (ValueError(""), "ValueError"),
    ],
    ids=["lines", "silent"],
)
def test_hub_failure_is_one_line(name: str, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(error))
    with pytest.raises(
        TdaError,
        match=rf"^{name}: no such folder, and it could not be downloaded from the hub \({reason}\)\. {WAY_OUT}",
    ) as caught:
        resolve_model(name, notify=lambda line: None)
    assert "\n" not in str(caught.value)


def test_one_layout_of_the_weights_is_downloaded_and_nothing_pickled() -> None:
    wanted = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "spiece.model",
    ]
    unwanted = [
        "pytorch_model.bin",
        "model.pt",
        "weights.ckpt",
        "training_args.bin",
        "code.py",
        "README.md",
        "consolidated.safetensors",
        "consolidated.safetensors.index.json",
        "original/params.json",
        "original/tokenizer.model",
        "onnx/model.safetensors",
        "onnx/config.json",
    ]
    kept = filter_repo_objects(wanted + unwanted, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    assert list(kept) == wanted


# The built-in model


def test_builtin_name_is_a_gguf_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(name: str, *, notify: Callable[[str], None]) -> Path:
        notify(f"fetching {name}")
        return tmp_path / "file.gguf"

    monkeypatch.setattr(source_module, "fetch_builtin", fetched)
    notices: list[str] = []
    source = resolve_model("smollm2-135m", notify=notices.append)
    assert source == ModelSource("smollm2-135m", tmp_path, "file.gguf")
    assert notices == ["fetching smollm2-135m"]
