"""TEAL's greedy densities: the search against brute force, interpolation, and other files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tda_export.calibration.file import read_calibration
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.greedy_densities import (
    MOST_SPARSITY,
    STEP,
    Block,
    GreedyDensities,
    greedy_densities,
    read_densities,
    search_path,
    write_densities,
)
from tda_export.evaluation.methods import Request, check_request, open_setting
from tda_export.models.source import ModelSource
from tda_export.runtime import load

SIZES = {"small": 10, "large": 100}


def test_each_step_costs_least_error_for_its_bytes() -> None:
    """Against the same rule, written out with the sizes of steps."""
    weights = {"small": 1.0, "large": 5.0}

    def error(densities: dict[str, float]) -> float:
        return sum(weights[name] * (1 - density) ** 2 for name, density in densities.items())

    path = search_path(SIZES, error)
    assert path[0] == {"small": 1.0, "large": 1.0}
    for before, after in itertools.pairwise(path):
        [changed] = [name for name in SIZES if before[name] != after[name]]
        assert before[changed] - after[changed] == pytest.approx(STEP)
        costs = {}
        for name in SIZES:
            if before[name] > STEP + 1e-9:
                tried = before | {name: before[name] - STEP}
                costs[name] = (error(tried) - error(before)) / SIZES[name]
        assert costs[changed] == pytest.approx(min(costs.values()))
    read = sum(SIZES[name] * density for name, density in path[-1].items()) / sum(SIZES.values())
    assert 1 - read >= MOST_SPARSITY - 1e-9
    assert min(path[-1].values()) >= STEP - 1e-9


DENSITIES = GreedyDensities(
    "f",
    "separate",
    "ffn",
    [[0.0, 0.2, 0.6], [0.0, 0.5]],
    {"up": [[1.0, 0.8, 0.2], [1.0, 0.4]], "down": [[1.0] * 3, [1.0] * 2]},
)


def test_densities_between_steps() -> None:
    assert DENSITIES.at(0.0)["up"].tolist() == [1.0, 1.0]
    assert DENSITIES.at(0.4)["up"].tolist() == pytest.approx([0.5, 1 - 0.6 * 0.8])
    assert DENSITIES.at(0.5)["down"].tolist() == [1.0, 1.0]
    with pytest.raises(
        UsageError, match=r"^Greedy densities reach sparsity 0\.500, and 0\.51 is more\. Give a lower --sparsity\.$"
    ):
        DENSITIES.at(0.51)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    write_densities(DENSITIES, path)
    assert read_densities(path) == DENSITIES
    DENSITIES.require(path, "f", "separate", "ffn")
    with pytest.raises(UsageError, match=r"d\.json was made for another model\. Give densities of this artifact's\.$"):
        DENSITIES.require(path, "g", "separate", "ffn")
    for packing, parts in (("sites", "ffn"), ("separate", "all")):
        with pytest.raises(UsageError, match=r"is of --packing separate --parts ffn, and .*teal_densities\.py\.$"):
            DENSITIES.require(path, "f", packing, parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", ["separate", "sites"])
def test_densities_of_a_model(
    packing: Any,
    priced_folders: dict[str, Path],
    tables_calibration: Path,
    reference: Any,
    source: ModelSource,
    tmp_path: Path,
) -> None:
    """Every layer has its sparsity, densities differ, and an artifact reads as many rows as they say."""
    priced = read_calibration(tables_calibration).priced
    assert priced is not None
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    found = greedy_densities(
        reference, source.spec, priced, tokens, 12, packing, "ffn", source.fingerprint, done.append
    )
    assert done == [1, 1, 1]
    chosen = found.at(0.4)
    assert set(chosen) == ({"gate_up", "down"} if packing == "sites" else {"gate", "up", "down"})
    weights = {"gate_up": 2, "gate": 1, "up": 1, "down": 1}
    mean = sum(weights[name] * density for name, density in chosen.items()) / 3
    assert mean.tolist() == pytest.approx([0.6] * 3)
    path = tmp_path / "d.json"
    write_densities(found, path)
    model = load(priced_folders[packing], provider="cpu")
    request = Request("teal", sparsity=0.4, parts="ffn", densities=path)
    setting = open_setting(model.artifact, model.sessions, request)
    assert setting.budget == {"sparsity": 0.4, "parts": "ffn", "densities": "greedy"}
    with pytest.raises(UsageError, match="is of --packing"):
        check_request(model.artifact, dataclasses.replace(request, parts="all"))


def test_greedy_is_no_worse_than_uniform(reference: Any, source: ModelSource, tables_calibration: Path) -> None:
    """At a block's output, on the tokens of the search."""
    priced = read_calibration(tables_calibration).priced
    assert priced is not None
    tokens = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    found = greedy_densities(reference, source.spec, priced, tokens, 12, "separate", "all", "f")
    for layer in range(3):
        block = Block(reference, source.spec, priced, layer, tokens, 12, "separate")
        greedy = {name: float(density[layer]) for name, density in found.at(0.5).items()}
        assert block.error(dict.fromkeys(greedy, 1.0)) == pytest.approx(0.0, abs=1e-5)
        assert block.error(greedy) < block.error(dict.fromkeys(greedy, 0.5))
        assert math.isfinite(block.error(greedy))


def test_densities_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    write_densities(DENSITIES, path)
    content = json.loads(path.read_text())
    content["density"]["up"][0].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(TdaError, match=r"not a file of greedy densities \(paths of other lengths\)"):
        read_densities(path)
