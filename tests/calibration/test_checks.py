"""Impossible numbers in a calibration are refused, and the message names the tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
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
    KL,
    METADATA_KEY,
    PATH,
    SUMS,
    Calibration,
    is_calibration,
    read_calibration,
    write_calibration,
)
from tda_export.errors import TdaError
from tests.calibration.test_file import PROVENANCE, kl_table

Change = Callable[[torch.Tensor], torch.Tensor]
NAMES = ["grid", *(field.name for field in SUMS), *(KL + field.name for field in PATH)]
MAY_BE_NEGATIVE = ("activation",)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good calibration of the token estimator, with a KL path."""
    grid, generator = threshold_grid(50), torch.Generator().manual_seed(0)
    accumulator = CurveAccumulator(2, 7, grid, "token", prompt_tokens=4)
    for layer in range(2):
        accumulator.add(layer, torch.randn(9, 7, generator=generator), torch.randn(3, 7, generator=generator))
        accumulator.add_up(layer, torch.randn(9, 7, generator=generator))
    path = tmp_path_factory.mktemp("written") / "good.safetensors"
    write_calibration(Calibration(grid, accumulator.sums, PROVENANCE, kl_table()), path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.safetensors"


def rewrite(written: Path, path: Path, changes: dict[str, Change]) -> None:
    """Copy a file with other tensors, and without the hash, which would show the change."""
    with safe_open(written, framework="pt") as file:
        record = json.loads(file.metadata()[METADATA_KEY])
        del record[DIGEST_KEY]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, change in changes.items():
        tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(record)})


def last(value: float) -> Change:
    """Replace a tensor's last value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


EVERYWHERE: dict[str, Change] = {
    "nan": last(math.nan),
    "inf": last(math.inf),
    "-inf": last(-math.inf),
    "huge": last(3e38),
    "other dtype": lambda tensor: tensor.half(),
    "whole numbers": lambda tensor: tensor.long(),
    "flat": lambda tensor: tensor.reshape(-1)[:, None, None],
    "a number": lambda tensor: tensor.reshape(-1)[0],
    "empty": lambda tensor: tensor[:0],
    "twice": lambda tensor: torch.cat([tensor, tensor]),
    "wider": lambda tensor: torch.cat([tensor, tensor], dim=-1),
}


def test_the_good_file_is_read(written: Path, path: Path) -> None:
    assert read_calibration(written).kl is not None
    rewrite(written, path, {})
    assert read_calibration(path).provenance == PROVENANCE  # a file of an earlier version has no hash


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize("name", NAMES)
def test_what_no_tensor_may_be(written: Path, path: Path, name: str, kind: str) -> None:
    rewrite(written, path, {name: EVERYWHERE[kind]})
    with pytest.raises(TdaError, match=r"tiny\.safetensors: not a readable calibration \(.+\)\. Run 'tda-export cal"):
        read_calibration(path)


@pytest.mark.parametrize("kind", ["nan", "inf", "other dtype", "a number"])
@pytest.mark.parametrize("name", NAMES)
def test_the_tensor_is_named(written: Path, path: Path, name: str, kind: str) -> None:
    """Even a tensor that gives others their size."""
    rewrite(written, path, {name: EVERYWHERE[kind]})
    with pytest.raises(
        TdaError, match=rf"\({name} (has values that are not finite|should be \w+ \[.*\], and is \w+ \[.*\])"
    ):
        read_calibration(path)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MAY_BE_NEGATIVE])
def test_what_cannot_be_negative(written: Path, path: Path, name: str) -> None:
    rewrite(written, path, {name: last(-1.0)})
    with pytest.raises(TdaError, match=rf"\({name} (is -\d\S*, and at least|does not)"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("grid", lambda grid: grid.flip(0), "does not rise from 0"),
        ("grid", lambda grid: grid + 0.1, "does not rise from 0"),
        ("grid", lambda grid: grid * 0, "does not rise from 0"),
        ("density", lambda density: density.flip(1), "rises with the threshold"),
        ("token_density", lambda density: density.flip(1), "rises with the threshold"),
        ("density", lambda density: density * 2, "is 2, and at most 1.001 is possible"),
        ("score_square", lambda square: square * 1.1, "is 1.1, and at most 1.001 is possible"),
        ("tokens", lambda tokens: tokens * 0, "is 0, and at least 1 is possible"),
        ("sequences", lambda sequences: sequences * 0, "is 0, and at least 1 is possible"),
        (f"{KL}share", lambda share: share.flip(0), "does not fall"),
        (f"{KL}share", lambda share: share * 0 + 0.5, "does not fall"),
        (f"{KL}share", lambda share: share * 0, "does not fall"),
        (f"{KL}mask_density", last(1.5), "is 1.5, and at most"),
        (f"{KL}token_density", lambda density: density * 0 + 0.95, "is more than mask_density"),
    ],
)
def test_what_is_out_of_order_or_too_much(written: Path, path: Path, name: str, change: Change, problem: str) -> None:
    rewrite(written, path, {name: change})
    with pytest.raises(TdaError, match=rf"\({name} {problem}"):
        read_calibration(path)


def test_sizes_that_fit_each_other_and_nothing_else(written: Path, path: Path) -> None:
    """The number of layers of the path differs from that of the curves."""
    columns = ("thresholds", "token_thresholds", "mask_density", "token_density", "cett", "sensitivity")
    rewrite(written, path, {KL + name: lambda tensor: torch.cat([tensor, tensor], dim=1) for name in columns})
    with pytest.raises(TdaError, match=rf"\({KL}thresholds should be float32 \[2, 2\], and is float32 \[2, 4\]\)"):
        read_calibration(path)


def test_a_flipped_bit_is_found_wherever_it_is(written: Path, path: Path) -> None:
    """Even if the changed number would be possible."""
    whole = written.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    with safe_open(written, framework="pt") as file:
        names = list(file.keys())
    for place in range(start, len(whole), (len(whole) - start) // (4 * len(names))):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(TdaError, match="not a readable calibration"):
            read_calibration(path)


@pytest.mark.parametrize("change", [{DIGEST_KEY: "0" * 64}, {DIGEST_KEY: 5}, {"versions": {}}], ids=repr)
def test_altered_record_is_found(written: Path, path: Path, change: dict[str, Any]) -> None:
    with safe_open(written, framework="pt") as file:
        record = json.loads(file.metadata()[METADATA_KEY]) | change
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(record)})
    with pytest.raises(TdaError, match=r"\(its content is not what was written\)"):
        read_calibration(path)


@pytest.mark.parametrize(
    "provenance",
    [
        "[" * 100_000,
        '{"format": ' + "[" * 100_000,
        '{"format": "tda-export calibration", "format_version": ' + "9" * 5000 + "}",
        *(
            json.dumps({"format": "tda-export calibration", "format_version": 3} | PROVENANCE | change)
            for change in (
                {"budget": []},
                {"budget": {"cett": True}},
                {"budget": {"cett": 10**400}},
                {"budget": {"cett": math.nan}},
                {"budget": {"max_kl": 10**400}},
                {"budget": {"\x1b[2J": 1}},
                {"budget": {"sparsity": 0.5, "allocation": []}},
                {"model": PROVENANCE["model"] | {"name": 5}},
                {"model": PROVENANCE["model"] | {"fingerprint": None}},
                *({"model": PROVENANCE["model"] | {"ffn_matrices": value}} for value in (0, 1, 4, 3.0, "3", None)),
            )
        ),
    ],
    ids=lambda text: text[-60:],
)
def test_damaged_provenance_is_one_short_line(written: Path, path: Path, provenance: str) -> None:
    with safe_open(written, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={METADATA_KEY: provenance})
    with pytest.raises(TdaError, match="not a readable calibration") as raised:
        read_calibration(path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600
    is_calibration(path)  # it may return either, but must not raise


def test_a_header_nested_too_deeply(path: Path) -> None:
    header = b"[" * 100_000
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(TdaError, match="not a readable calibration"):
        read_calibration(path)
    assert not is_calibration(path)


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_what_could_not_be_read_is_not_written(written: Path, path: Path, value: float) -> None:
    read = read_calibration(written)
    read.sums.up_square[0, 0] = value
    with pytest.raises(TdaError, match=r"not written, because the calibration failed \(up_square .*--dtype fp32"):
        write_calibration(read, path)
    assert not path.exists()
