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
from tda_export.models.source import resolve_model
from tests.bench.test_scripts import BENCHMARKS, load
from tests.conftest import PRICE_TINY, run_ok


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load("token_prices", patch)


def test_samples_are_the_gradients_of_prices(script: ModuleType, tiny_model: Path) -> None:
    """Summed over tokens they are the squares that prices are made of, apart from the last token."""
    source = resolve_model(str(tiny_model))
    model, spec = source.reference().requires_grad_(False), source.spec
    sequence = torch.arange(5, 45)
    found = script.sample(model, spec, sequence, 16, [0], 2, 4)
    sums = price_continuation(model, spec, read_prompt(model, sequence[:16]), sequence[16:], sampled_labels(2, 0, 4))
    for (layer, part), square in found.square.items():
        assert square.shape == (23,)
        whole = float(sums.square[part][layer].sum())
        assert float(square.sum()) <= whole * (1 + 1e-4)
        if part == "down" and layer == spec.num_layers - 1:  # without attention after it, the last token has none
            assert float(square.sum()) == pytest.approx(whole, rel=1e-4)
    assert found.inputs[0].shape == (23, spec.hidden_size)


def test_the_fit_finds_a_linear_function(script: ModuleType, tiny_model: Path) -> None:
    spec = resolve_model(str(tiny_model)).spec
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, spec.hidden_size, generator=generator) + 3
    one, other = (0.1 * torch.randn(spec.hidden_size, generator=generator) for _ in range(2))
    square = {
        (layer, part): (x @ (other if part in "kv" else one)).exp()
        for layer in range(spec.num_layers)
        for part in ("q", "k", "v", "o", "gate", "up", "down")
    }
    halves = [
        script.Sample({0: x[half]}, {key: value[half] for key, value in square.items()})
        for half in (slice(0, 1500), slice(1500, 4000))
    ]
    probes = script.fit(halves, spec, [0], 1e-3)
    torch.testing.assert_close(probes.weight[0], torch.stack([one, other], dim=1), rtol=0, atol=2e-3)
    probes.observe(0, x)
    assert probes.found.mean(dim=0).abs().max() < 1e-2  # centred


def test_prices_by_token(script: ModuleType) -> None:
    probes = script.Probes({3: torch.tensor([[1.0, 0.0], [0.0, 2.0]])}, {3: torch.tensor([0.0, 1.0])})
    of = probes.price_of(2.0, 0.5)
    assert of(0, "q") == 2.0  # before the first probe
    probes.observe(3, torch.tensor([[1.0, 1.0], [-9.0, 0.0]]))
    torch.testing.assert_close(of(3, "up")[:, 0], 2 * torch.tensor([-0.5, 2.0]).exp())  # cut to -4
    torch.testing.assert_close(of(4, "k")[:, 0], 2 * torch.tensor([-1.5, -0.5]).exp())


def test_a_run(tiny_model: Path, tmp_path: Path) -> None:
    """Strength 0 is the plain prices."""
    calibration, text = tmp_path / "c.safetensors", tmp_path / "text.txt"
    run_ok("calibrate", tiny_model, "-o", calibration, *PRICE_TINY)
    text.write_text("The sea is calm to-night. The tide is full, the moon lies fair upon the straits. " * 12)
    command = [sys.executable, str(BENCHMARKS / "token_prices.py"), str(tiny_model), "--calibration", str(calibration)]
    command += ["--text", str(text), "--prompts", "2", "--prompt-tokens", "64", "--sparsity", "0.3", "--ridge", "10"]
    done = subprocess.run(
        [*command, "--probes", "0", "--strength", "0", "0.5"], capture_output=True, text=True, check=True
    )
    plain, same, other = map(json.loads, done.stdout.splitlines())
    assert plain["kl"] == same["kl"] > 0
    assert (plain["of_priced"], same["of_priced"]) == (1.0, 1.0)
    assert other["kl"] != plain["kl"]
    assert min(plain["read"]) <= plain["share"] <= max(plain["read"])
    wrong = subprocess.run([*command, "--probes", "9"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("Error: --probes: give rising layers from 0 to ")


def test_prices_drawn_together(script: ModuleType) -> None:
    prices = {"q": torch.tensor([[1.0, 4.0, 0.0], [2.0, 2.0, 2.0]])}
    half, whole = (script.drawn_together(prices, power)["q"] for power in (0.5, 1.0))
    torch.testing.assert_close(whole, prices["q"])
    mean = 4.0 ** (4 / 5)  # (1 log 1 + 4 log 4) / 5
    torch.testing.assert_close(half, torch.tensor([[mean**0.5, 2 * mean**0.5, 0.0], [2.0, 2.0, 2.0]]))
