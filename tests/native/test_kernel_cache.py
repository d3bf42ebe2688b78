"""Compiled device code on disk is private and whole, and refused if damaged. Each check has a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
SCRIPT = """
import numpy as np
from tda_export.graph.ffn import FfnForm
from tests.ffn_model import ffn_session, random_feeds, run
feeds = random_feeds(np.random.default_rng(0), tokens=1, hidden=64, neurons=32, indices=np.arange(32), dtype="float16",
                     threshold=0.0)
print("result", float(run(ffn_session(FfnForm("silu"), dtype="float16"), feeds).astype(np.float32).sum()))
"""


def compute(cache: Path) -> str:
    """Run the kernel with this cache folder, and return its result."""
    environment = os.environ | {"TDA_EXPORT_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return next(line for line in done.stdout.splitlines() if line.startswith("result"))


def stored(cache: Path) -> list[Path]:
    return sorted((cache / "kernels").iterdir()) if (cache / "kernels").is_dir() else []


def test_code_is_kept_private_and_used_again(tmp_path: Path) -> None:
    first = compute(tmp_path / "cache")
    (file,) = stored(tmp_path / "cache")
    assert file.name.startswith("indexed_ffn-sm_")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    written = file.stat().st_mtime_ns
    assert compute(tmp_path / "cache") == first
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", [b"", b"garbage" * 100, None], ids=["empty", "garbage", "cut"])
def test_damaged_code_is_compiled_again(tmp_path: Path, damage: bytes | None) -> None:
    first = compute(tmp_path / "cache")
    (file,) = stored(tmp_path / "cache")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert compute(tmp_path / "cache") == first
    assert file.read_bytes() == whole


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    compute(tmp_path / "cache")
    assert stored(tmp_path / "cache") == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    first = compute(tmp_path / "cache")
    (file,) = stored(tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"nothing of ours")
    file.unlink()
    file.symlink_to(elsewhere)
    assert compute(tmp_path / "cache") == first
    assert elsewhere.read_bytes() == b"nothing of ours"


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    compute(tmp_path / "file")
