"""benchmarks/priced_table.py: the comparisons, one small run, and resuming from its rows."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tda_export.runtime.session import THREADS
from tests.bench.test_scripts import BENCHMARKS, load
from tests.conftest import TINY_LENGTHS, run_ok

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        return load("priced_table", patch)


def row(name: str, parts: str, ffn: float, linears: float, kl: float, head: float = 1.0) -> dict[str, Any]:
    method = name.partition("-")[0]
    shares = {"ffn_share": ffn, "linear_share": linears, "attention_share": 0.5, "all_share": (linears + head) / 2}
    return {"name": name, "method": method, "parts": parts, "kl": kl, **shares} | {
        "text": "t",
        "prompt_tokens": 8,
        "new_tokens": None,
    }


def test_methods_are_compared_at_the_same_bytes(script: ModuleType) -> None:
    """Methods of the FFN alone are compared with those of all linears at the same bytes of all linears, and those that
    read the head whole with the one that does not at the same bytes of linears and head."""
    rows = [
        row("priced", "layers", 0.5, 0.45, 0.4),
        row("priced", "layers", 0.5, 0.55, 0.1),
        row("priced", "all", 0.5, 0.7, 0.2, head=0.8),
        row("priced", "ffn", 0.5, 0.6, 0.05),
        row("teal-uniform", "layers", 0.5, 0.5, 0.5),
        row("teal-greedy", "layers", 0.5, 0.5, 0.4),
        row("griffin", "ffn", 0.4, 0.5, 0.9),
        row("griffin", "ffn", 0.6, 0.6, 0.6),
    ]
    found = {one["bytes_of"]: one for one in script.comparisons(rows, [0.5])}
    assert found["the layers' linears"]["kl"] == {
        "priced": pytest.approx(0.2),
        "teal-uniform": 0.5,
        "teal-greedy": 0.4,
        "griffin": 0.9,
    }
    assert found["the layers' linears"]["priced_to_teal"] == pytest.approx(0.5)
    [whole] = [one for one in script.comparisons(rows, [0.75]) if one["bytes_of"] == "the linears and the head"]
    assert whole["kl"] == {"priced": 0.2, "teal-uniform": 0.5, "teal-greedy": 0.4, "griffin": 0.9}
    assert found["ffn"]["kl"] == {"priced": 0.05, "griffin": pytest.approx((0.9 * 0.6) ** 0.5)}
    assert found["ffn"]["priced_to_teal"] is None
    assert found["attention"]["kl"] == {}
    assert "KL –" not in script.comparison_line(found["attention"])


def test_small_run_in_two_processes(
    script: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What measures nothing, since its rows are there, runs in this process."""

    def resumed(arguments: list[str]) -> list[str]:
        monkeypatch.setattr("sys.argv", arguments)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert script.main() == 0
        return printed.getvalue().splitlines()

    for name in (THREADS, "OMP_NUM_THREADS"):  # the script sets them for its processes
        monkeypatch.setenv(name, "1")
    text = tmp_path / "harbour.txt"
    text.write_text(" ".join(f"Boat {i} comes home at {i % 12}." for i in range(100)), encoding="utf-8")
    calibration = tmp_path / "c.safetensors"
    run_ok("calibrate", tiny_model, "-o", calibration, "--sparsity", "0.4", *TINY_LENGTHS)
    command = [sys.executable, str(BENCHMARKS / "priced_table.py"), str(tiny_model), str(tmp_path / "work")]
    command += ["--text", str(text), "--calibration", str(calibration), "--sparsity", "0.3", "--prompts", "3"]
    command += ["--prompt-tokens", "12", "--continuation-tokens", "6", "--jobs", "2", "--json", str(tmp_path / "o")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in (tmp_path / "o").read_text().splitlines()]
    settings = [one for one in rows if "asked" not in one and "kl_stderr" in one]
    assert {one["name"] for one in settings} == {"priced", "teal-uniform", "teal-greedy", "wina", "griffin"}
    assert all(one["prompts"] == 3 for one in settings)
    for one in settings:
        read = {"ffn": "ffn_share", "attention": "attention_share"}.get(one["parts"], "linear_share")
        assert one[read] == pytest.approx(1 - one["sparsity"], abs=0.12)
        assert ("predicted_kl" in one) == (one["method"] == "priced" and one["parts"] == "all")
    assert "priced / better TEAL" in first.stdout
    assert resumed(command[1:]) == first.stdout.splitlines()
    some = [*command[1:], "--parts", "ffn", "--methods", "priced", "wina"]
    settings_of_some = [line for line in resumed(some) if ": asked " in line]
    assert settings_of_some == [
        line for line in first.stdout.splitlines() if " priced ffn: asked" in line or " wina ffn: asked" in line
    ]
    other = [sys.executable, *some, "--around", "0", "--shares", "0.71"]
    exact = subprocess.run(other, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition(", read")[0] for line in exact if ": asked " in line] == [
        "harbour 12 priced ffn: asked 0.700",
        "harbour 12 wina ffn: asked 0.700",
    ]
    assert any("0.71 of the bytes of ffn: KL " in line for line in exact)


def test_bad_input_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "priced_table.py"), str(tiny_model), str(tmp_path / "work")]
    command += ["--text", "t", "--calibration", str(BENCHMARKS / "rows.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
