"""Messages of transformers: important ones are passed on, once, in one line."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tda_export.models import notes
from tda_export.models.notes import LONGEST_NOTE, nothing_but_notes, quiet_transformers, say
from tda_export.models.source import ModelSource, resolve_model
from tests.models.test_source import change_weights, no_notice, set_config


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget earlier messages, and record new ones."""
    monkeypatch.setattr(notes._NOTES, "said", set())
    quiet_transformers()


def logger(name: str) -> logging.Logger:
    return transformers_logging.get_logger(f"transformers.{name}")


@pytest.mark.parametrize(
    "name", ["modeling_utils", "configuration_utils", "models.new_family.configuration_new_family"]
)
def test_warning_is_one_line_and_comes_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        logger(name).warning("The head\n is %s\x1b[1m odd.", "very")
    assert capsys.readouterr().err == "Note: transformers says: The head is very [1m odd.\n"


def test_note_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    say("x" * 10_000)
    assert len(capsys.readouterr().err) == LONGEST_NOTE + len("Note: \n")


@pytest.mark.parametrize("name", ["generation.configuration_utils", "quantizers.quantizer_gguf"])
def test_what_is_no_concern_of_the_user_is_not_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger(name).warning("Something else.")
    logger("modeling_utils").info("Details.")
    assert capsys.readouterr().err == ""


def test_text_longer_than_the_context_is_no_warning(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = resolve_model(str(tiny_model)).tokenizer
    tokenizer.model_max_length = 3
    assert len(tokenizer("a longer text").input_ids) > 3
    assert capsys.readouterr().err == ""


def test_notes_come_through_where_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_but_notes():
        print("a progress bar", file=sys.stderr)
        logger("modeling_utils").warning("Odd.")
    assert capsys.readouterr().err == "Note: transformers says: Odd.\n"


def test_what_a_configuration_says_wrongly_is_shown(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    set_config(folder, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5})
    _ = resolve_model(str(folder)).spec
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("Note: transformers says: `rope_parameters`'s factor field must be a float")


def test_a_whole_model_is_loaded_without_a_word(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = resolve_model(str(tiny_model), notify=no_notice)
    assert source.spec.num_layers == 3
    assert source.tokenizer.is_fast
    assert source.reference() is not None
    assert source.eos_token_ids == [2]
    assert capsys.readouterr().err == ""


def test_tensors_that_the_model_does_not_have_are_not_reported(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    change_weights(folder, lambda tensors: tensors.update({"optimizer.step": torch.zeros(1)}))
    resolve_model(str(folder)).reference()
    assert capsys.readouterr().err == ""


# Tokenizers of Mistral that were converted with another model's splitting

FORMER_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LARGE_VOCABULARY = 100_100  # transformers checks those of more than 100,000


def large_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", *(f"<unused{i}>" for i in range(LARGE_VOCABULARY - len(alphabet) - 1))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("1", "2")]))
    split = pre_tokenizers.Split(Regex(FORMER_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_large_tokenizer(tiny_model: Path, folder: Path, **config: object) -> ModelSource:
    shutil.copytree(tiny_model, folder)
    large_tokenizer().save_pretrained(folder)
    set_config(folder, **config)
    return resolve_model(str(folder), notify=no_notice)


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "transformers_version": "4.50.0"}


def test_splitting_of_an_older_mistral_is_corrected_and_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_large_tokenizer(tiny_model, tmp_path / "model", **MISTRAL)
    assert len(source.tokenizer("12").input_ids) == 2  # Mistral splits digits
    note = "text is split as Mistral's corrected tokenizers do it (transformers' fix_mistral_regex).\n"
    assert capsys.readouterr().err == f"Note: {tmp_path / 'model'}: {note}"
    source.tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert Tokenizer.from_str(json.dumps(saved)).encode("12").ids == source.tokenizer("12").input_ids


@pytest.mark.parametrize("config", [{}, MISTRAL | {"transformers_version": "5.1.0"}], ids=["llama", "newer mistral"])
def test_other_models_keep_their_splitting(
    config: dict[str, object], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = with_large_tokenizer(tiny_model, tmp_path / "model", **config)
    assert len(source.tokenizer("12").input_ids) == 1
    assert capsys.readouterr().err == ""
