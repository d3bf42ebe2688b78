"""benchmarks/copies.py: copies compute the same function. benchmarks/quantised_kl.py: the KL on a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tda_export.bench.random_model import byte_tokenizer
from tda_export.models.source import resolve_model
from tests.bench.test_scripts import load
from tests.conftest import run_ok
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("kind", ["scaled", "rotated"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-biases", "llama-multi-head"])
def test_copies_compute_the_same(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("copies", monkeypatch)
    folder = save_tiny_model(name, tmp_path / "float")
    monkeypatch.setattr("sys.argv", ["copies.py", str(folder), kind, str(tmp_path / "copy")])
    script.main()
    assert f"{kind}, seed 0, logits within " in capsys.readouterr().out
    mine, theirs = resolve_model(str(tmp_path / "copy")), resolve_model(str(folder))
    tokens = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert (mine.reference()(tokens).logits - theirs.reference()(tokens).logits).abs().max() < 1e-3
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        weights = [source.weights().load(f"model.layers.1.{part}.weight") for source in (mine, theirs)]
        assert (weights[0] - weights[1]).abs().mean() > 0.1 * weights[1].abs().mean()
    assert mine.spec.tied_head == (name == "llama-tied" and kind == "scaled")
    assert mine.tokenizer("Hi").input_ids == theirs.tokenizer("Hi").input_ids


def test_what_is_no_copy_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("copies", monkeypatch)

    def wrong(model: torch.nn.Module, generator: torch.Generator) -> None:
        model.model.norm.weight.data = 2 * model.model.norm.weight.data  # type: ignore[union-attr]

    monkeypatch.setitem(script.KINDS, "scaled", wrong)
    folder = save_tiny_model("llama", tmp_path / "float")
    monkeypatch.setattr("sys.argv", ["copies.py", str(folder), "scaled", str(tmp_path / "copy")])
    with pytest.raises(SystemExit):
        script.main()
    assert "which is more than 0.001: this is no copy." in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_other_families_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("copies", monkeypatch)
    folder = save_tiny_model("gpt2", tmp_path / "float")
    monkeypatch.setattr("sys.argv", ["copies.py", str(folder), "scaled", str(tmp_path / "copy")])
    with pytest.raises(SystemExit):
        script.main()
    assert "is a GPT2LMHeadModel, and copies are made of LlamaForCausalLM." in capsys.readouterr().err


def test_kl_on_a_text(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("quantised_kl", monkeypatch)
    for weights in ("int4", "int8"):
        arguments = ("--weights", weights, "--quantizer", "rtn", "--kl-sequences", "0")
        run_ok("quantize", tiny_model, "-o", tmp_path / weights, *arguments)
    text = tmp_path / "some.txt"
    text.write_text("A few words of text, again and again. " * 20)
    lengths = ["--windows", "3", "--prompt-tokens", "32", "--continuation-tokens", "16"]
    models = [str(tiny_model), str(tmp_path / "int4"), str(tmp_path / "int8"), str(tiny_model)]
    monkeypatch.setattr("sys.argv", ["quantised_kl.py", *models, "--text", str(text), *lengths])
    script.main()
    four, eight, itself = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert four["tokens"] == 48
    assert 0 == itself["kl"] < eight["kl"] < four["kl"] < 1
    monkeypatch.setattr("sys.argv", ["quantised_kl.py", *models[:2], "--text", str(text), "--windows", "99"])
    with pytest.raises(SystemExit):
        script.main()
    assert "windows of 512 tokens." in capsys.readouterr().err


@pytest.mark.parametrize("begins", [False, True])
def test_windows_begin_with_what_the_tokenizer_puts_before_a_text(
    begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, tokenizer = load("quantised_kl", monkeypatch), byte_tokenizer()
    before = []
    if begins:
        before = [tokenizer.bos_token_id]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, before[0])]
        )
    windows = script.text_windows(tokenizer, "abcdefghijk", 4).tolist()
    assert [window[: len(before)] for window in windows] == [before] * len(windows)
    texts = [tokenizer.decode(window[len(before) :]) for window in windows]
    assert texts == (["abc", "def", "ghi"] if begins else ["abcd", "efgh"])
    assert script.text_windows(tokenizer, "ab", 4).shape == (0, 4)
