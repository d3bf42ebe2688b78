"""Random matrices of integers, and artifacts of them, which are like any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tda_export.bench.artifact import WORTH, build_random_priced
from tda_export.bench.random_codes import RandomStorage, code_deviation, draw_packed, random_storage
from tda_export.bench.shapes import POOL_NUMBERS, RandomWeights, random_source
from tda_export.graph.contract import in_a_layer, row_price
from tda_export.graph.storage import read_plan
from tda_export.graph.stored_integers import stored_codes
from tda_export.models.source import ModelSource
from tda_export.runtime.session import map_weight
from tda_export.weights.formats import IntegerFormat, integer_format
from tda_export.weights.integers import Codes, pack_bits
from tda_export.weights.matrix import Major, Matrix
from tests.bench.test_bench import SMALL
from tests.conftest import run_ok

FORMATS = [integer_format(4), integer_format(4, 128), integer_format(8, 64)]


def matrix(format: IntegerFormat, rows: int = 512, columns: int = 384, major: Major = "input") -> Matrix:
    return Matrix("layers.0.ffn.up", rows, columns, format, major)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("major", ["input", "output"])
def test_elements_keep_activations_their_size(format: IntegerFormat, major: Major) -> None:
    drawn = matrix(format, major=major)
    codes = Codes.unpack(format, drawn.columns, *draw_packed(drawn))
    elements = codes.decode().astype(np.float64)
    expected = drawn.inputs**-0.5
    assert elements.std() == pytest.approx(expected, rel=0.01)
    assert abs(elements.mean()) < 4 * expected / elements.size**0.5
    assert len(np.unique(codes.codes)) == format.levels
    assert set(np.unique(codes.zero_points)) == {format.levels // 2 - 1, format.levels // 2}
    scales = codes.scales.astype(np.float64)
    assert scales.std() / scales.mean() == pytest.approx(0.25 / 3**0.5, rel=0.05)
    x = np.random.default_rng(0).standard_normal(drawn.inputs)
    outputs = x @ elements if major == "input" else elements @ x
    assert outputs.std() == pytest.approx(1.0, abs=0.15)


def test_deviation_of_codes_is_that_of_all_pairs() -> None:
    for format in FORMATS:
        middle = format.levels // 2
        all_pairs = [code - zero for code in range(format.levels) for zero in (middle - 1, middle)]
        assert code_deviation(format) == pytest.approx(np.std(all_pairs))
        assert np.mean(all_pairs) == 0


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_tensors_are_those_of_the_format(format: IntegerFormat) -> None:
    for stored, array in zip(matrix(format, 5, 83).tensors, draw_packed(matrix(format, 5, 83)), strict=True):
        assert (array.shape, array.dtype.name) == (stored.shape, stored.dtype)


def test_a_seed_and_a_name_give_the_same_numbers_in_any_order() -> None:
    one, other = matrix(FORMATS[0]), Matrix("layers.1.ffn.up", 512, 384, FORMATS[0], "input")
    first = draw_packed(one)
    different = draw_packed(other)
    for same, array in zip(draw_packed(one), first, strict=True):
        np.testing.assert_array_equal(same, array)
    assert (different[0] != first[0]).mean() > 0.9
    assert (draw_packed(one, seed=1)[0] != first[0]).mean() > 0.9
    # Pinned, since artifacts of all machines must be the same.
    np.testing.assert_array_equal(first[0][0, :4], PINNED)


PINNED = [254, 208, 230, 204]


def test_floats_stay_what_they_were() -> None:
    """The slow way: roll the pool to the start of a tensor, and repeat it."""
    weights = RandomWeights({str(i): (5, 7) for i in range(40)} | {"long": (POOL_NUMBERS // 8 + 3, 9), "norm": (64,)})
    for name, shape in weights._shapes.items():
        size = int(torch.Size(shape).numel())
        numbers = weights._pool.roll(-weights._starts[name]).repeat(2)[:size].view(shape)
        expected = 1 + 0.1 * numbers if name == "norm" else numbers * shape[1] ** -0.5
        assert torch.equal(weights.load(name), expected)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SMALL))
    return random_source(str(path))


def storage_of_small(source: ModelSource, *rules: str) -> RandomStorage:
    plan = read_plan(source, "int4", None, rules)
    storage = random_storage("float32", plan)
    assert isinstance(storage, RandomStorage)
    return storage


def test_an_artifact_of_codes(source: ModelSource, tmp_path: Path) -> None:
    storage = storage_of_small(source)
    artifact, _ = build_random_priced(source, tmp_path / "artifact", storage, (0.3, 0.5), quiet=True)
    again, _ = build_random_priced(source, tmp_path / "again", storage, (0.3, 0.5), quiet=True)
    assert artifact.weights_file.read_bytes() == again.weights_file.read_bytes()
    assert {name: found.format.name for name, found in artifact.matrices.items() if "." not in name} == {
        "embedding": "int8_g32",
        "head": "int8_g32",
    }
    for name, found in artifact.matrices.items():
        np.testing.assert_array_equal(
            pack_bits(stored_codes(artifact, name).codes, found.format.bits), draw_packed(found)[0]
        )
    shown = json.loads(run_ok("inspect", artifact.folder, "--json").stdout)
    assert shown["quantization"]["quantizer"] == {"name": "random", "symmetric": False}
    assert "quantised by random: " in run_ok("inspect", artifact.folder).stdout


@pytest.mark.parametrize("rules", [(), ("*.down=float", "layers.0.*=int8")])
def test_a_price_reads_its_share_of_the_bytes(rules: tuple[str, ...], source: ModelSource, tmp_path: Path) -> None:
    """With any formats: bytes count, not elements."""
    storage = storage_of_small(source, *rules)
    artifact, _ = build_random_priced(source, tmp_path / "artifact", storage, (0.3, 0.5), quiet=True)
    unread, rows = [0, 0], []
    for name, matrix in artifact.matrices.items():
        if in_a_layer(name):
            worth = map_weight(artifact, row_price(name))
            for index, level in enumerate(WORTH[::-1]):
                unread[index] += int((worth <= level).sum()) * matrix.row_bytes
            rows.append(matrix.row_bytes)
    shares = [share / artifact.linear_bytes for share in unread]
    assert shares == pytest.approx([0.3, 0.5], abs=sum(rows) / artifact.linear_bytes)


def test_floats_need_no_codes() -> None:
    assert not random_storage("float16", None).has_integers
