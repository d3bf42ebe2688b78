"""float16 on the CPU: conversions of every number, by this machine's compiler and, where they are there, by a compiler
for aarch64 and its emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tda_export.native.build import FOLDER, find_compiler

PROGRAM = """
#include "vectors.h"
#include <cmath>
#include <cstdio>

int main() {
  int wrong = 0;
  for (int first = 0; first < 65536; first += 4) {
    uint16_t halves[4];
    for (int i = 0; i < 4; ++i) halves[i] = static_cast<uint16_t>(first + i);
    const auto loaded = tda::Lanes<4>::LoadHalves(halves);
    for (int i = 0; i < 4; ++i) {
      const float value = tda::HalfToFloat(halves[i]);
      if (std::isnan(value)) {
        wrong += !std::isnan(loaded[i]) || (tda::FloatToHalf(value) & 0x7fff) <= 0x7c00;
      } else {
        wrong += loaded[i] != value || tda::FloatToHalf(value) != halves[i];
      }
    }
  }
  std::printf("%d", wrong);
}
"""
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
WAYS: list[tuple[str | None, list[str], list[str]]] = [(None, [], [])]
if shutil.which(CROSS) and shutil.which(EMULATOR):
    WAYS.append((CROSS, ["-static"], [EMULATOR]))


@pytest.mark.parametrize(("compiler", "options", "runner"), WAYS)
def test_every_number(compiler: str | None, options: list[str], runner: list[str], tmp_path: Path) -> None:
    source = tmp_path / "halves.cc"
    source.write_text(PROGRAM)
    command = [compiler] if compiler else find_compiler()
    subprocess.run(
        [*command, "-O2", "-std=c++17", f"-I{FOLDER}", *options, str(source), "-o", str(tmp_path / "halves")],
        check=True,
    )
    done = subprocess.run([*runner, str(tmp_path / "halves")], capture_output=True, text=True, check=True)
    assert done.stdout == "0"
