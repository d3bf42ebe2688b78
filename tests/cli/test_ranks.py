"""Commands as several ranks under torchrun give the result of one process, also after an interruption."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from tda_export.models.source import resolve_model
from tests.conftest import TINY_LENGTHS, run_ok
from tests.torchrun import COMMAND, errors, rank_of, start, succeed

if sys.platform == "win32":
    pytest.skip("torchrun of POSIX", allow_module_level=True)

pytestmark = pytest.mark.long

LENGTHS = ("--prompt-tokens", "32", "--continuation-tokens", "16")
MANY = ("--sequences", "40", "--packing", "sites", "--refine", "1", *LENGTHS)


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the ranks, so that sums are rounded alike
    yield
    torch.set_num_threads(threads)


def test_calibration(tiny_model: Path, tmp_path: Path) -> None:
    """Prices, their factors and tables, curves and the KL path are equal to the bit. Three ranks share 7 sequences."""
    options = ("--method", "all", "--sequences", "7", "--refine", "2", *LENGTHS)
    found = {}
    for ranks in (1, 3):
        stdout = succeed(ranks, *COMMAND, "calibrate", tiny_model, "-o", tmp_path / str(ranks), *options, "--json")
        found[ranks] = json.loads(stdout) | {"output": None}
    assert found[3] == found[1]
    assert (tmp_path / "3").read_bytes() == (tmp_path / "1").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_more_ranks_than_sequences(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--sequences", "2", *LENGTHS)
    run_ok("calibrate", tiny_model, "-o", tmp_path / "1", *options)
    stdout = succeed(3, *COMMAND, "calibrate", tiny_model, "-o", tmp_path / "3", *options)
    assert stdout.count("Prices with one threshold a matrix") == 1
    assert stdout.endswith(f"Calibrated on 2 sequences; wrote {tmp_path / '3'}\n")
    assert (tmp_path / "3").read_bytes() == (tmp_path / "1").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("many") / "c"
    succeed(1, *COMMAND, "calibrate", tiny_model, "-o", output, *MANY)
    return output.read_bytes()


def measured(partial: Path) -> int:
    """Return how many sequences a running calibration has measured."""
    try:
        with safe_open(partial, framework="numpy") as file:
            return len(file.get_tensor("priced.measured.sites.kl"))
    except (OSError, SafetensorError):
        return 0


def end_while_measuring(model: Path, output: Path, number: signal.Signals, *, rank: int | None) -> list[str]:
    """Start two ranks. Send one of them, or torchrun, a signal once a sequence is measured. Return their errors."""
    process = start(2, *COMMAND, "calibrate", model, "-o", output, *MANY)
    partial = output.with_name(output.name + ".partial")
    while not measured(partial):
        assert process.poll() is None
        time.sleep(0.01)
    (rank_of(process, rank) if rank is not None else process).send_signal(number)
    lines = errors(process)
    assert 0 < measured(partial) < 20
    assert not output.exists()
    return lines


def test_a_rank_is_killed_and_one_process_goes_on(
    tiny_model: Path, tmp_path: Path, uninterrupted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = end_while_measuring(tiny_model, tmp_path / "c", signal.SIGKILL, rank=1)
    assert line.startswith("Error: ")
    assert line.endswith(". Start it again, with any number of ranks, to resume.")
    monkeypatch.setattr("tda_export.calibration.price_run.price_continuation", None)  # not needed again
    run_ok("calibrate", tiny_model, "-o", tmp_path / "c", *MANY)
    assert (tmp_path / "c").read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_torchrun_is_interrupted_and_three_ranks_go_on(tiny_model: Path, tmp_path: Path, uninterrupted: bytes) -> None:
    (line,) = end_while_measuring(tiny_model, tmp_path / "c", signal.SIGINT, rank=None)
    assert line.startswith(("Interrupted.", "Error: Another rank"))
    succeed(3, *COMMAND, "calibrate", tiny_model, "-o", tmp_path / "c", *MANY)
    assert (tmp_path / "c").read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_output_that_exists_is_one_error(tiny_model: Path, tmp_path: Path) -> None:
    """Only the first rank looks; the others wait for it."""
    (tmp_path / "c").write_text("mine")
    lines = errors(start(2, *COMMAND, "calibrate", tiny_model, "-o", tmp_path / "c", *TINY_LENGTHS))
    assert lines == [f"Error: {tmp_path / 'c'} exists. Choose another output."]


def test_quantising(tiny_model: Path, tmp_path: Path) -> None:
    """Hessians are sums over ranks, so they are rounded differently, and a few codes may differ. The choice of int8
    linears is that of one process."""
    lengths = ("--prompt-tokens", "24", "--continuation-tokens", "8")
    options = ("--sequences", "5", "--kl-sequences", "3", "--bits-per-weight", "6", *lengths)
    losses = []
    for ranks in (1, 2):
        stdout = succeed(ranks, *COMMAND, "quantize", tiny_model, "-o", tmp_path / str(ranks), *options, "--json")
        losses.append(json.loads(stdout)["loss"])
    assert losses[1]["tokens"] == losses[0]["tokens"] == 3 * 8
    assert losses[1]["kl"] == pytest.approx(losses[0]["kl"], rel=0.05)
    one, two = (resolve_model(str(tmp_path / name)).codes for name in ("1", "2"))
    assert list(one) == list(two)
    assert [codes.format for codes in one.values()] == [codes.format for codes in two.values()]
    assert len({codes.format for name, codes in one.items() if name.startswith("layers.")}) == 2
    other = sum(int((codes.codes != two[name].codes).sum()) for name, codes in one.items())
    assert other <= 0.01 * sum(codes.codes.size for codes in one.values())
    assert np.array_equal(one["embedding"].decode(), two["embedding"].decode())  # which is rounded to nearest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


WITHOUT_TRITON = """
import os
from tda_export.cli.main import cli
from tda_export.quantization import run

run.why_slow = lambda device, formats, symmetric: "rank " + os.environ["RANK"]
cli(%r)
"""


def test_the_first_rank_alone_says_that_triton_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--sequences", "2", "--kl-sequences", "0", *LENGTHS)
    program = tmp_path / "program.py"
    program.write_text(WITHOUT_TRITON % ["quantize", str(tiny_model), "-o", str(tmp_path / "out"), *options])
    process = start(2, program)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    notices = [line for line in stderr.splitlines() if "Triton" in line]
    assert notices == [
        "Triton's kernel cannot run (rank 0), so rounding takes several times as long. Triton needs a C compiler and "
        "Python's header files."
    ]


@pytest.fixture(scope="module")
def priced_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("priced")
    run_ok("calibrate", tiny_model, "-o", folder / "c", *TINY_LENGTHS)
    run_ok("build", tiny_model, "--calibration", folder / "c", "-o", folder / "a", "--no-verify")
    return folder / "a"


@pytest.mark.parametrize("options", [("--continuation-tokens", "8"), ("--free", "12")], ids=["given", "free"])
def test_evaluation(priced_artifact: Path, options: tuple[str, ...], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse was built of grey stone, and nobody lived there. " * 20)
    arguments = ("eval", priced_artifact, "--text", text, "--prompts", "5", "--prompt-tokens", "24", *options)
    one, two = (json.loads(succeed(ranks, *COMMAND, *arguments, "--json")) for ranks in (1, 2))
    assert two == one


def test_tasks_run_in_one_process(priced_artifact: Path) -> None:
    lines = errors(start(2, *COMMAND, "eval", priced_artifact, "--tasks", "all"))
    assert lines == ["Error: --tasks runs in one process. Start it without torchrun."]
