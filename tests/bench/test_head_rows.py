"""benchmarks/head_rows.py: the prices of the head's rows, dropping them, and a small run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tda_export.calibration.prices import read_prompt, sampled_labels
from tda_export.models.source import resolve_model
from tests.bench.test_scripts import load
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load("head_rows", patch)


def test_squares_are_those_of_the_gradient_by_hand(script: ModuleType, tiny_model: Path) -> None:
    """By a channel i, the log-likelihood of label y has the gradient w_yi - sum over v of p_v w_vi."""
    model = resolve_model(str(tiny_model)).reference().requires_grad_(False)
    tokens = torch.arange(5, 85).view(2, 40)
    found = script.head_squares(model, tokens, {"prompt_tokens": 16, "seed": 3}, 2)
    weight, squares = model.get_output_embeddings().weight, []
    for index, sequence in enumerate(tokens):
        cache = read_prompt(model, sequence[:16])
        logits = model(sequence[None, 16:], past_key_values=cache, use_cache=True).logits[0, :-1]
        mean = logits.softmax(dim=-1) @ weight
        for labels in sampled_labels(2, 3, 2 * index)(logits):
            squares += [(weight[label] - expected).square() for label, expected in zip(labels, mean, strict=True)]
    torch.testing.assert_close(found.float(), torch.stack(squares).mean(dim=0), rtol=1e-4, atol=1e-8)


def test_rows_below_the_price_are_dropped(script: ModuleType, tiny_model: Path) -> None:
    model = resolve_model(str(tiny_model)).reference().requires_grad_(False)
    head, x = model.get_output_embeddings(), torch.tensor([[[3.0, -1.0] + [0.5] * 62, [0.0] * 64]])
    x = x[..., : head.weight.shape[1]]
    with script.dropping_of_head(model, torch.ones(x.shape[-1]), 1.0) as count:
        found = head(x)
    expected = 3 * head.weight[:, 0] - head.weight[:, 1]  # x² of 1 is worth a price of 1
    torch.testing.assert_close(found[0, 0], expected)
    assert count == [2, 2 * x.shape[-1]]
    torch.testing.assert_close(head(x)[0, 0], x[0, 0] @ head.weight.T)  # nothing is dropped afterwards


@pytest.fixture
def command(
    script: ModuleType, priced_calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs the script for a model, with further options."""
    text = tmp_path / "text.txt"
    text.write_text("The sea is calm to-night. The tide is full, the moon lies fair upon the straits. " * 12)

    def run(model: Path, *options: str) -> int:
        given = [str(model), "--calibration", str(priced_calibration), "--text", str(text), *options]
        monkeypatch.setattr("sys.argv", ["head_rows.py", *given])
        status: int = script.main()
        return status

    return run


def test_a_run(
    script: ModuleType,
    command: Callable[..., int],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "SMALLEST_PRICE", 1e-6)
    assert command(tiny_model, "--prompts", "2", "--prompt-tokens", "64", "--points", "3") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for kind in ("float", "int4"):
        of = [row for row in rows if row["weights"] == kind and "price" in row]
        assert len(of) == 6
        for whole, priced in zip(of[::2], of[1::2], strict=True):
            assert (whole["head"], whole["head_priced"], priced["head_priced"]) == (1.0, False, True)
            assert whole["price"] == priced["price"]
            assert 0 <= priced["head"] <= 1
            assert priced["both"] <= whole["both"]
    assert all(row["ratio"][0] > 0 and row["kl"] > 0 for row in rows if "ratio" in row)


def test_a_calibration_of_another_model(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(save_tiny_model("opt", tmp_path / "opt")) == 2
    assert "is of another model than" in capsys.readouterr().err
