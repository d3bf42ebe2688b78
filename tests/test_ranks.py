"""One rank alone, and ranks under torchrun: what they exchange, and how they end."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export import ranks
from tda_export.errors import TdaError, UsageError
from tda_export.ranks import ALONE, ENDED, LOST, Ranks
from tests.torchrun import COMMAND, errors, rank_of, script, start, succeed

if sys.platform == "win32":
    pytest.skip("torchrun of POSIX", allow_module_level=True)

pytestmark = pytest.mark.long

SHARING = """
import dataclasses, json, torch
from tda_export.packing import RowBytes

def found(item, together):
    tensor = torch.full((item, 2), float(item), dtype=torch.float64)
    return {"item": item, "by": ranks.number, "together": together, "sum": tensor.sum(), "ints": RowBytes(item)}

result = {}
for count in (0, 1, 2, 3, 7):
    made = list(ranks.in_order(range(count), found))
    assert [each["ints"] for each in made] == [RowBytes(item) for item in range(count)]
    result[count] = [[each["item"], each["by"], each["together"], float(each["sum"])] for each in made]
result["first"] = ranks.from_first(lambda: f"of {ranks.number}")
result["here"] = ranks.first_here(lambda: f"by {ranks.number}")
total = torch.full((3,), 1.0 + ranks.number)
ranks.add_up(total)
result["total"] = total.tolist()
for dtype in (torch.uint8, torch.float16, torch.float32):
    own = torch.full((2, ranks.number, 3), 5.0 * ranks.number, dtype=dtype)  # ranks have 0, 1 and 2 columns
    result[f"columns {dtype}"] = ranks.side_by_side(own, [0, 1, 2]).tolist()
all_of_them = list(ranks.in_order(range(ranks.count), lambda item, together: result))
print(json.dumps(all_of_them))
"""


def test_what_ranks_share(tmp_path: Path) -> None:
    """Every rank gets all results, in the order of the items. The first rank alone prints."""
    first, *others = json.loads(succeed(3, script(tmp_path, SHARING)))
    for count in (0, 1, 2, 3, 7):
        expected = [[item, item % 3, min(3, count - item // 3 * 3), 2.0 * item * item] for item in range(count)]
        assert first[str(count)] == expected
    assert first["first"] == "of 0"
    assert first["total"] == [6.0, 6.0, 6.0]
    for dtype in ("uint8", "float16", "float32"):
        assert first[f"columns torch.{dtype}"] == [[[5.0] * 3, [10.0] * 3, [10.0] * 3]] * 2
    assert [other.pop("here") for other in (first, *others)] == ["by 0", "by 1", "by 2"]
    assert others == [first, first]


@given(st.lists(st.integers()))
def test_alone_it_is_a_loop(items: list[int]) -> None:
    assert list(ALONE.in_order(items, lambda item, together: (item, together))) == [(item, 1) for item in items]
    assert ALONE.from_first(lambda: items) is items
    assert ALONE.first_here(lambda: items) is items
    total = torch.tensor([2.0])
    ALONE.add_up(total)
    assert total.tolist() == [2.0]


@given(
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_tensors_are_packed_exactly(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = (torch.randn(shape) * 100).abs().to(dtype)
    value = {"a": [tensor, tensor.T.clone() if len(shape) == 2 else tensor.clone()], "b": "text"}
    found = ranks._unpacked(ranks._packed(value))
    assert found["b"] == "text"
    for one, other in zip(found["a"], value["a"], strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)  # type: ignore[union-attr]
        assert torch.equal(one, other)
        one += True if dtype == torch.bool else 1  # it is writable


def test_without_torchrun_it_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    assert ranks.join("cuda:7") is ALONE
    ranks.leave()
    assert ranks.speaks()
    assert (ALONE.first, ALONE.own_device("cuda"), ALONE.own_device("cpu")) == (True, "cuda", "cpu")


def test_own_devices() -> None:
    third = Ranks(5, 8, 1, 4)
    assert not third.first
    assert [third.own_device(device) for device in ("cpu", "cuda", "auto")] == ["cpu", "cuda:1", "auto"]


def test_a_variable_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    message = r"^WORLD_SIZE=two is not a number\. Start several processes with torchrun alone\.$"
    with pytest.raises(TdaError, match=message):
        ranks.join("cpu")


def test_ranks_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    message = r"^Rank 0 cannot reach the others \(.*expected, but not set\)\. Start all with torchrun\.$"
    with pytest.raises(TdaError, match=message):
        ranks.join("cpu")


def test_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Ranks(1, 2, 1, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = (
        r"^--provider auto: 2 ranks on this machine, and PyTorch finds 1 CUDA GPU here\. Start torchrun with "
        r"--nproc-per-node 1\.$"
    )
    with pytest.raises(UsageError, match=message):
        second.take_own_gpu("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for seen, own in ((None, "1"), ("5,3", "3"), ("GPU-a,GPU-b", "GPU-b")):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if seen:
                patch.setenv("CUDA_VISIBLE_DEVICES", seen)
            second.take_own_gpu("cuda")
            assert ranks.os.environ["CUDA_VISIBLE_DEVICES"] == own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    second.take_own_gpu("cpu")
    ALONE.take_own_gpu("cuda")
    assert ranks.os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:1", 2, "Error: --device cuda:1: each of 2 ranks needs its own GPU. Give --device cuda."),
        (
            "auto",
            1,
            "Error: --device auto: 2 ranks on this machine, and PyTorch finds 1 CUDA GPU here. Start torchrun with "
            "--nproc-per-node 1.",
        ),
        ("cuda", 0, "Error: --device cuda: PyTorch finds no CUDA GPU here. Use --device cpu."),
    ],
)
def test_devices_that_ranks_cannot_have(tmp_path: Path, device: str, gpus: int, message: str) -> None:
    program = tmp_path / "program.py"
    arguments = ["calibrate", "none", "-o", str(tmp_path / "c"), "--device", device]
    program.write_text(
        f"import torch\ntorch.cuda.device_count = lambda: {gpus}\n"
        f"from tda_export.cli.main import cli\ncli({arguments})\n"
    )
    assert errors(start(2, program)) == [message]


FAILING = """
import time
from tda_export.cli.main import ErrorMappingGroup
from tda_export.signals import end_on_signals
import click

end_on_signals()  # as the command itself does

@click.group(cls=ErrorMappingGroup)
def cli(): pass

@cli.command()
def fail():
    print("working", flush=True)
    for _ in ranks.in_order(range(1000), work):
        pass

def work(item, together):
    if item == 11:
        %s
    time.sleep(0.01)

cli(["fail"])
"""


def failing(folder: Path, how: str) -> Path:
    return script(folder, FAILING % how)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("raise TdaError('It broke.')", "Error: It broke."),
        ("raise UsageError('It is wrong.')", "Error: It is wrong."),
        ("raise OSError(28, 'No space', 'file')", "Error: file: No space."),
        ("raise MemoryError", "Error: Out of memory. Use"),
    ],
)
def test_an_error_of_any_rank_is_one_line(tmp_path: Path, how: str, line: str) -> None:
    """The second rank works on item 11."""
    (found,) = errors(start(2, failing(tmp_path, how)))
    assert found.startswith(line)


def test_an_error_of_all_ranks_is_one_line(tmp_path: Path) -> None:
    (found,) = errors(start(3, *COMMAND, "calibrate", tmp_path / "no-model", "-o", tmp_path / "c"))
    assert found.startswith(f"Error: {tmp_path / 'no-model'}: no such folder.")
    (found,) = errors(start(2, *COMMAND, "calibrate", tmp_path / "x", "-o", tmp_path / "c", "--labels", "none"))
    assert found.startswith("Error: Invalid value for '--labels'")


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_is_killed_ends_all(tmp_path: Path, number: int) -> None:
    process = start(2, failing(tmp_path, "time.sleep(600)"))
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    rank_of(process, number).send_signal(signal.SIGKILL)
    started = time.monotonic()
    (line,) = errors(process)
    assert line in (f"Error: {LOST}", f"Error: {ENDED}")
    assert time.monotonic() - started < 60


def test_torchrun_that_is_interrupted(tmp_path: Path) -> None:
    process = start(2, failing(tmp_path, "time.sleep(600)"))
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    (line,) = errors(process)
    assert line in ("Interrupted.", f"Error: {LOST}")


def test_nothing_is_said_of_ranks_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not joined reports an error only if it is the first rank."""
    said: dict[str, Any] = {}
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        said[rank] = ranks.speaks()
    assert said == {"0": True, "3": False}
