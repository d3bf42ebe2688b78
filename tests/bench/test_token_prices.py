"""benchmarks/token_prices.py: its samples, its fit, prices by token, and a small run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tda_export.calibration.prices import price_continuation, read_prompt, sampled_labels
from tda_export.errors import TdaError
from tda_export.models.source import resolve_model
from tests.bench.test_scripts import BENCHMARKS, load

PARTS = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load("token_prices", patch)


def test_samples_are_the_gradients_of_prices(script: ModuleType, tiny_model: Path) -> None:
    """Summed over tokens they are the squares that prices are made of: the last token, left out, has no gradient."""
    source = resolve_model(str(tiny_model))
    model, spec = source.reference().requires_grad_(False), source.spec
    sequence, choose = torch.arange(5, 45), sampled_labels(2, 0, 4)
    found = script.sample(model, spec, sequence, 16, [0], choose)
    sums = price_continuation(model, spec, read_prompt(model, sequence[:16]), sequence[16:], choose)
    assert found.square.keys() == {(layer, part) for layer in range(spec.num_layers) for part in PARTS}
    for (layer, part), square in found.square.items():
        assert square.shape == (23,)
        assert float(square.sum()) == pytest.approx(float(sums.square[part][layer].sum()), rel=1e-4)
    assert found.inputs[0].shape == (23, spec.hidden_size)


def test_the_fit_finds_linear_functions(script: ModuleType, tiny_model: Path) -> None:
    """One for each probe and group: every matrix belongs to the last probe before it."""
    spec = resolve_model(str(tiny_model)).spec
    generator = torch.Generator().manual_seed(0)
    x = {layer: torch.randn(4000, spec.hidden_size, generator=generator) + 3 for layer in (0, 1)}
    wanted = {layer: 0.1 * torch.randn(spec.hidden_size, 2, generator=generator) for layer in (0, 1)}

    def probe_of(layer: int, part: str) -> int:
        return layer if part in ("gate", "up", "down") else layer - 1

    square = {}
    for layer in range(spec.num_layers):
        for part in PARTS:
            probe = min(max(probe_of(layer, part), 0), 1)
            square[layer, part] = (x[probe] @ wanted[probe][:, int(part in "kv")]).exp()
    square |= {(0, part): torch.rand(4000, generator=generator) for part in ("q", "k", "v", "o")}  # before any probe
    halves = [
        script.Sample({layer: of[half] for layer, of in x.items()}, {key: value[half] for key, value in square.items()})
        for half in (slice(0, 1500), slice(1500, 4000))
    ]
    probes = script.fit(halves, spec, [0, 1], 1e-6)
    for layer in (0, 1):
        torch.testing.assert_close(probes.weight[layer], wanted[layer], rtol=0, atol=2e-3)
        assert probes.predict(layer, x[layer]).mean(dim=0).abs().max() < 1e-2  # centred


def test_prices_by_token(script: ModuleType) -> None:
    probes = script.Probes({3: torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, {3: torch.tensor([0.0, 1.0])})
    of = script.TokenPrices(probes, 2.0, 0.5)
    assert of(0, "q") == 2.0  # before the first probe
    of.observe(3, torch.tensor([[1.0, 1.0], [-9.0, 0.0]]))
    torch.testing.assert_close(of(3, "up")[:, 0], 2 * torch.tensor([-0.5, 2.0]).exp())  # cut to -4
    torch.testing.assert_close(of(4, "k")[:, 0], 2 * torch.tensor([-1.5, -0.5]).exp())


def test_a_run(
    script: ModuleType,
    tiny_model: Path,
    priced_calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Strength 0 and power 1 are the plain prices. TEAL is there where its densities are."""
    text, densities = tmp_path / "text.txt", tmp_path / "d.json"
    text.write_text("The sea is calm to-night. The tide is full, the moon lies fair upon the straits. " * 12)
    model = [str(tiny_model), "--calibration", str(priced_calibration)]
    monkeypatch.setattr("sys.argv", ["teal_densities.py", *model, "-o", str(densities), "--sequences", "1"])
    assert load("teal_densities", monkeypatch).main() == 0
    command = [sys.executable, str(BENCHMARKS / "token_prices.py"), *model, "--text", str(text), "--sparsity", "0.3"]
    command += ["--prompts", "2", "--prompt-tokens", "64"]
    chosen = ["--probes", "0", "--strength", "0", "0.5", "--power", "1", "0.5", "--densities", str(densities)]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, check=True)
    plain, teal, same, by_token, drawn, both = map(json.loads, done.stdout.splitlines())
    assert plain["kl"] == same["kl"] > 0
    assert plain["of_priced"] == same["of_priced"] == [1.0, 0.0]
    assert len({row["kl"] for row in (plain, teal, by_token, drawn, both)}) == 5
    assert teal["of_teal"] == [1.0, 0.0]
    assert plain["of_teal"][0] == pytest.approx(1 / teal["of_priced"][0])
    for row in (plain, teal, by_token, drawn, both):
        assert min(row["read"]) <= row["share"] <= max(row["read"])
    monkeypatch.setattr("sys.argv", [*command[1:], "--probes", "9"])
    capsys.readouterr()
    assert script.main() == 2
    assert capsys.readouterr().err.startswith("Error: --probes: give rising layers from 0 to ")


def test_bytes_that_no_setting_reaches(script: ModuleType) -> None:
    assert script.interpolated("a way", [(0.7, 0.1), (0.8, 0.05)], 0.3) == pytest.approx(0.1)
    with pytest.raises(TdaError, match=r"a way: no settings around 0\.5 of the bytes were found\. Give other --sp"):
        script.interpolated("a way", [(0.7, 0.1), (0.8, 0.05)], 0.5)


def test_prices_drawn_together(script: ModuleType) -> None:
    prices = {"q": torch.tensor([[1.0, 4.0, 0.0], [2.0, 2.0, 2.0]])}
    half, whole = (script.drawn_together(prices, power)["q"] for power in (0.5, 1.0))
    torch.testing.assert_close(whole, prices["q"])
    mean = 4.0 ** (4 / 5)  # (1 log 1 + 4 log 4) / 5
    torch.testing.assert_close(half, torch.tensor([[mean**0.5, 2 * mean**0.5, 0.0], [2.0, 2.0, 2.0]]))
