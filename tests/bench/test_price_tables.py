"""benchmarks/price_tables.py: on the calibration's own prompts, prices give its own table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tda_export.calibration.file import read_calibration
from tests.bench.test_scripts import BENCHMARKS
from tests.conftest import PRICE_TINY, run_ok


def test_the_table_comes_out_again(tiny_model: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "c.safetensors"
    run_ok("calibrate", tiny_model, "-o", calibration, *PRICE_TINY)
    priced = read_calibration(calibration).priced
    assert priced is not None
    row = priced.table("separate").rows[4]
    command = [sys.executable, str(BENCHMARKS / "price_tables.py"), str(tiny_model), "--calibration", str(calibration)]
    own = [*command, "--sparsity", str(row.sparsity), "--prompt-tokens", "32", "8"]
    lines = subprocess.run(own, capture_output=True, text=True, check=True).stdout.splitlines()
    same, shorter = map(json.loads, lines)
    assert same["sequences"] == 2
    assert same["price"] == pytest.approx(row.price)
    assert same["share"] == pytest.approx(row.share, abs=1e-3)
    assert same["kl"] == pytest.approx(row.kl, rel=1e-2)
    assert same["predicted_kl"] == pytest.approx(row.kl, rel=1e-2)
    assert shorter["prompt_tokens"] == 8
    assert shorter["kl"] != same["kl"]
    longer = subprocess.run([*command, "--prompt-tokens", "64"], capture_output=True, text=True, check=False)
    assert longer.returncode == 2
    assert longer.stderr.startswith("Error: ")
    assert longer.stderr.count("\n") == 1
