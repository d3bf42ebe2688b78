"""The chat with a slider, as users run it: lines in, bars and answers out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tda_export.runtime import load
from tests.examples.applications import EXAMPLES, run

SCRIPT = EXAMPLES / "python_chat.py"
BAR = re.compile(r"\[(#*)\.*\] reads (\d+)%, predicted KL (\d+\.\d{4})")


def shown(artifact: Path, *lines: str) -> str:
    return run(sys.executable, SCRIPT, artifact, "--max-new-tokens", 8, text="".join(f"{line}\n" for line in lines))


def test_slider_moves_within_what_was_measured(priced_artifact: Path) -> None:
    printed = shown(priced_artifact, "+++", "--", "0", "-", "0.3", ".99", "-")
    bars = [(len(bar), int(share), float(kl)) for bar, share, kl in BAR.findall(printed)]
    table = load(priced_artifact, provider="cpu").artifact.price_table
    assert table is not None
    least = round(100 * (1 - table.most_sparsity))
    assert [share for _, share, _ in bars] == pytest.approx([50, 65, 55, 100, 95, 70, least, least], abs=1)
    assert all(length == pytest.approx(share / 5, abs=1) for length, share, _ in bars)
    assert bars[3][2] == 0 < bars[1][2] < bars[0][2]  # dense loses nothing, and more bytes mean less loss


def test_answers_are_those_of_the_price(priced_artifact: Path) -> None:
    model = load(priced_artifact, provider="cpu")
    printed = shown(priced_artifact, "Hello", "0", "Nothing")
    messages: list[dict[str, str]] = []
    for text, how in (("Hello", model.artifact.deployment), ("Nothing", model.at(price=0))):
        messages.append({"role": "user", "content": text})
        generation = model.generate(model.tokenize_chat(messages), max_new_tokens=8, deployment=how)
        assert list(generation)
        assert f"> {generation.text}\n" in printed
        read, dense = (value / 1e6 for value in (generation.metrics.bytes_per_token, model.artifact.sparse_bytes))
        assert re.search(rf"\d+\.\d tokens/s, {re.escape(f'{read:.3g} of {dense:.3g}')} MB a token", printed)
        messages.append({"role": "assistant", "content": generation.text})


def test_message_that_does_not_fit_is_refused_and_forgotten(priced_artifact: Path) -> None:
    printed = shown(priced_artifact, "sea " * 600, "Hello")
    assert "The prompt has" in printed
    assert "tokens/s" in printed


def test_artifact_without_prices_is_refused(tiny_artifact: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, tiny_artifact], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"Error: {tiny_artifact} has no table of prices. Build one with 'tda-export build MODEL'.\n"


def test_example_is_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 60
