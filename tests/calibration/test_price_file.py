"""Prices in a calibration file: written, read back, and refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tda_export.calibration.cett import threshold_grid
from tda_export.calibration.curves import CurveAccumulator
from tda_export.calibration.file import (
    DIGEST_KEY,
    FORMAT_VERSION,
    METADATA_KEY,
    PRICED,
    Calibration,
    is_calibration,
    read_calibration,
    write_calibration,
)
from tda_export.calibration.magnitudes import BINS, Magnitudes
from tda_export.calibration.price_file import Priced, priced_tensors
from tda_export.calibration.price_table import Measured
from tda_export.calibration.prices import PriceSums
from tda_export.calibration.refine import Refinement
from tda_export.errors import TdaError
from tda_export.packing import RowBytes

LAYERS, PRICES, SEQUENCES = 2, 3, 4
PROVENANCE: dict[str, Any] = {
    "model": {"name": "tiny", "architecture": "LlamaForCausalLM", "fingerprint": "f" * 64, "ffn_matrices": 3},
    "budget": {"max_kl": 0.05},
}
GATED = {"q": (4, 6), "k": (4, 2), "v": (4, 2), "o": (6, 4), "gate": (4, 5), "up": (4, 5), "down": (5, 4)}
PLAIN = {part: shape for part, shape in GATED.items() if part != "gate"}


HEADED = GATED | {"head": (64, 259)}


def make_priced(linears: dict[str, tuple[int, int]], *, refined: bool = True) -> Priced:
    generator = torch.Generator().manual_seed(0)
    sites = {"qkv": "q", "o": "o", "down": "down"} | ({"gate_up": "up"} if "gate" in linears else {"up": "up"})
    inside = [part for part in linears if part != "head"]
    matrices = {name: linears[part][0] for name, part in (sites | {part: part for part in inside}).items()}

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    square = {name: random(LAYERS, inputs) for name, inputs in matrices.items()}
    square |= {"head": random(1, linears["head"][0])} if "head" in linears else {}
    inputs = {name: (100 * random(LAYERS, BINS)).long() for name in sites}
    weighted = {name: (100 * random(LAYERS, BINS)).long() for name in matrices}
    norms = {name: random(LAYERS, size).float() for name, size in matrices.items()}
    measured = Measured(
        torch.tensor([0.0, 1e-9, 2e-9], dtype=torch.float64),
        random(SEQUENCES, PRICES).sort(dim=1).values - 1e-9,  # rounding may make a KL negative
        random(SEQUENCES, PRICES),
        {part: random(PRICES, 1 if part == "head" else LAYERS) for part in linears},
        tokens=7,
        short_kl=random(SEQUENCES - 1, PRICES),
    )
    moments = [{name: random(LAYERS, matrices[name]) for name in sites} for _ in range(3)]
    under_way = Refinement(*moments, levels=random(4, 3), step=5)
    count = torch.ones(1, dtype=torch.float64)
    return Priced(
        linears,
        PriceSums(square, 8 * count, count),
        Magnitudes(inputs, weighted),
        norms,
        RowBytes(4),
        128,
        {"sites": measured},
        (32, 256),
        {"sites": under_way} if refined else {},
    )


def write(path: Path, priced: Priced | None = None) -> None:
    write_calibration(Calibration(threshold_grid(), None, PROVENANCE, None, priced or make_priced(HEADED)), path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.safetensors"


@pytest.mark.parametrize("refined", [False, True], ids=["estimated", "refined"])
@pytest.mark.parametrize("linears", [GATED, PLAIN, HEADED], ids=["gated", "ungated", "with a head"])
def test_round_trip(path: Path, linears: dict[str, tuple[int, int]], refined: bool) -> None:
    priced = make_priced(linears, refined=refined)
    write(path, priced)
    assert is_calibration(path)
    read = read_calibration(path)
    assert read.provenance == PROVENANCE
    assert (read.curves, read.kl) == (None, None)
    assert read.priced is not None
    assert read.priced.linears == linears
    ours, theirs = priced_tensors(read.priced), priced_tensors(priced)
    assert ours.keys() == theirs.keys()
    assert {"prices.q", "prices.qkv", "measured.sites.read.up", "measured.sites.kl"} <= ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert read.priced.tables() == priced.tables()
    assert set(read.priced.refined) == ({"sites"} if refined else set())
    assert read.priced.measured["sites"].tokens == 7


def test_files_of_version_3_are_read(path: Path) -> None:
    """They have masks alone."""
    grid = threshold_grid(50)
    accumulator = CurveAccumulator(2, 7, grid, "prompt", prompt_tokens=4)
    for layer in range(2):
        accumulator.add(layer, torch.rand(9, 7), torch.rand(3, 7))
    write_calibration(Calibration(grid, accumulator.sums, PROVENANCE), path)
    rewrite(path, lambda metadata, tensors: metadata.update(format_version=3))
    read = read_calibration(path)
    assert read.priced is None
    assert torch.equal(read.sums.ratio, accumulator.sums.ratio)
    assert FORMAT_VERSION == 5


def rewrite(path: Path, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata.pop(DIGEST_KEY)
    change(metadata, tensors)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(metadata)})


EVERY_TENSOR = sorted(priced_tensors(make_priced(HEADED)))


@pytest.mark.parametrize("name", EVERY_TENSOR)
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "negative", "not finite"])
def test_damaged_tensors(path: Path, name: str, damage: str) -> None:
    def change(metadata: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[name]
        if damage == "missing":
            del tensors[name]
        elif damage == "shape":
            tensors[name] = torch.cat([tensor, tensor])
        elif damage == "dtype":
            tensors[name] = tensor.to(torch.float16)
        elif damage == "negative":
            tensor.view(-1)[-1] = -1
        else:
            tensor.view(-1)[-1] = torch.nan

    if damage == "not finite" and not make_tensor(name).is_floating_point():
        return
    if damage == "negative" and (name.endswith("kl") or (name.startswith("refined.") and signed(name))):
        return  # KL may be negative by rounding
    write(path)
    rewrite(path, change)
    with pytest.raises(TdaError, match=r"tiny\.safetensors: not a readable calibration \(.*\)\. Run 'tda-export cal"):
        read_calibration(path)


def signed(name: str) -> bool:
    return "second" not in name and "step" not in name


def make_tensor(name: str) -> torch.Tensor:
    return priced_tensors(make_priced(HEADED))[name]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda content: content.pop("linears"), "linears"),
        (lambda content: content["linears"].pop("v"), "no linear v"),
        (lambda content: content["linears"].update(q=[5, 6]), "expected float64"),
        (lambda content: content["linears"].update(q=["a", 6]), "invalid literal"),
        (lambda content: content.pop("element_bytes"), "element_bytes"),
        (lambda content: content.update(element_bytes=0), "sizes are not positive"),
        (lambda content: content.update(continuation_tokens=0), "sizes are not positive"),
    ],
)
def test_damaged_metadata(path: Path, change: Any, text: str) -> None:
    write(path)
    rewrite(path, lambda metadata, tensors: change(metadata[PRICED]))
    with pytest.raises(TdaError, match=rf"not a readable calibration \(.*{text}"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("measured.sites.prices", [0.0, 2e-9, 1e-9], "prices do not rise"),
        ("measured.sites.prices", [1e-10, 1e-9, 2e-9], "the first row is not dense"),
        ("measured.sites.tokens", [0], "finite"),
    ],
)
def test_a_table_that_cannot_be(path: Path, name: str, value: list[float], text: str) -> None:
    write(path)
    rewrite(path, lambda metadata, tensors: tensors.update({name: torch.tensor(value, dtype=tensors[name].dtype)}))
    with pytest.raises(TdaError, match=rf"not a readable calibration \(.*{text}"):
        read_calibration(path)


def test_no_sequence_was_priced(path: Path) -> None:
    write(path)
    rewrite(path, lambda metadata, tensors: tensors["prices.tokens"].zero_())
    with pytest.raises(TdaError, match=r"not a readable calibration \(prices of no token"):
        read_calibration(path)


def test_short_prompts_were_not_measured(path: Path) -> None:
    write(path)
    rewrite(path, lambda metadata, tensors: tensors.pop("measured.sites.short_kl"))
    with pytest.raises(TdaError, match=r"not a readable calibration \(no KL after short prompts"):
        read_calibration(path)


def test_a_file_without_short_prompts_has_one_kl(path: Path) -> None:
    """Files of earlier versions have none."""

    def change(metadata: Any, tensors: dict[str, torch.Tensor]) -> None:
        del tensors["measured.sites.short_kl"], metadata["priced"]["prompts"]

    write(path)
    whole = read_calibration(path).priced
    rewrite(path, change)
    older = read_calibration(path).priced
    assert whole is not None
    assert older is not None
    assert whole.table("sites").short is not None
    assert older.table("sites") == dataclasses.replace(whole.table("sites"), short=None)
