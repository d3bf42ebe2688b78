"""Impossible sizes in config.json, and sizes that differ from the checkpoint."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tda_export.errors import TdaError
from tda_export.models.config_sizes import LIMITS, check_sizes
from tda_export.models.source import resolve_model
from tests.models.test_source import set_config


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "head_dim", "max_position_embeddings"])
@pytest.mark.parametrize("value", [0, -1, 10**9, 1e39, 2.5, "four", True, [3]])
def test_size_that_cannot_be_is_named_before_anything_of_it_is_made(
    field: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *arguments, **options: pytest.fail("asked"))
    set_config(folder, **{field: value})
    message = (
        rf"^{folder}: {field} in config\.json is .+, which is not a whole number from 1 to [\d,]+\. "
        r"Correct it, or give another copy of the model\.$"
    )
    for part in ("spec", "config", "tokenizer"):
        with pytest.raises(TdaError, match=message):
            getattr(resolve_model(str(folder)), part)


@pytest.mark.parametrize("field", LIMITS)
def test_every_size_is_checked(field: str) -> None:
    check_sizes({field: 1}, "model", "config.json")
    check_sizes({field: None}, "model", "config.json")
    with pytest.raises(TdaError, match=rf"^model: {re.escape(field)} in config\.json is 0, which"):
        check_sizes({field: 0}, "model", "config.json")


def test_weights_under_another_name_are_refused(folder: Path) -> None:
    """transformers would load them, but the artifact would have those of model.safetensors."""
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    set_config(folder, transformers_weights="other.safetensors")
    message = (
        rf"^{folder}: config\.json has transformers_weights, weights in a file of another name, which is not read\. "
        r"Name that file model\.safetensors, and remove the field\.$"
    )
    with pytest.raises(TdaError, match=message):
        _ = resolve_model(str(folder)).spec


@pytest.mark.parametrize("heads", [65, 1000])
def test_more_heads_than_elements(heads: int, folder: Path) -> None:
    """A head of 0 elements would otherwise count as a multiple of 16."""
    set_config(folder, num_attention_heads=heads, num_key_value_heads=heads, head_dim=None)
    with pytest.raises(TdaError, match=rf"^{folder}: |LlamaForCausalLM: head_size is 0"):
        _ = resolve_model(str(folder)).spec


def test_more_layers_than_the_checkpoint_has_tensors(folder: Path) -> None:
    set_config(folder, num_hidden_layers=5000)
    message = (
        rf"^{folder}: num_hidden_layers in config\.json is 5000 and the checkpoint has 30 tensors\. "
        r"Take config\.json and the weights from the same place\.$"
    )
    with pytest.raises(TdaError, match=message):
        _ = resolve_model(str(folder)).spec


def test_configuration_of_a_far_larger_model_is_refused_before_it_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would make the missing weights, here 268 GB."""
    load = "transformers.AutoModelForCausalLM.from_pretrained"
    monkeypatch.setattr(load, lambda *arguments, **options: pytest.fail("loaded"))
    set_config(folder, hidden_size=2**16, intermediate_size=2**18, num_attention_heads=4096)
    message = (
        rf"^{folder}: the configuration is of a model of [\d,]{{14,}} weights, and the checkpoint has [\d,]{{6,7}}\. "
        r"Take config\.json and the weights from the same place\.$"
    )
    with pytest.raises(TdaError, match=message):
        resolve_model(str(folder)).reference()
