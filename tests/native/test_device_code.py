"""Device code compiles for every kind of GPU on a machine without one."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import platform
import sys
from pathlib import Path

import pytest

from tda_export.native.build import LIBRARY, device_sources

ACTIVATIONS = range(4)
BITS = (0, 4, 8)
DEFINES = {
    "indexed_ffn": [
        f"TDA_BF16={bf16} TDA_ACTIVATION={activation} TDA_GATED={1 - bf16}"
        for bf16, activation in itertools.product((0, 1), ACTIVATIONS)
    ],
    "statistics": ["TDA_BF16=0", "TDA_BF16=1"],
    "linear": [f"TDA_BF16={bf16} TDA_BITS={bits}" for bf16 in (0, 1) for bits in BITS],
    "row_linear": [
        f"TDA_BF16={bf16} TDA_BITS={bits} TDA_CLUSTERS=1 {inputs}"
        for bf16, bits in itertools.product((0, 1), BITS)
        for inputs in ("TDA_INPUTS=0", "TDA_INPUTS=1", f"TDA_INPUTS=2 TDA_ACTIVATION={(bf16 + bits // 4 * 2) % 4}")
    ],
    "expand": [f"TDA_BF16={bf16} TDA_BITS={bits}" for bf16 in (0, 1) for bits in BITS],
    "greedy": ["TDA_BF16=0"],
    "attention": [
        f"TDA_BF16={bf16} TDA_KV_CODES={codes} TDA_CLUSTERS=1 TDA_HEADS={heads}"
        for (bf16, heads), codes in itertools.product(((0, 4), (0, 1), (1, 2)), (1, 0))
    ],
    "gated_activation": [f"TDA_BF16={activation % 2} TDA_ACTIVATION={activation}" for activation in ACTIVATIONS],
    "call_start": ["TDA_BF16=0"],
}
CASES = [(name, defines, 90) for name, all_defines in DEFINES.items() for defines in all_defines]
FOR_ALL_GPUS = {
    "linear": None,
    "row_linear": None,
    "expand": None,
    "attention": 2,
}  # so many of the forms; otherwise one
CASES += [
    (name, defines.replace("TDA_CLUSTERS=1", f"TDA_CLUSTERS={int(capability >= 90)}"), capability)
    for name, all_defines in DEFINES.items()
    for defines in all_defines[: FOR_ALL_GPUS.get(name, 1)]
    for capability in (75, 80, 89, 120)
    if capability >= 80 or "TDA_BF16=1" not in defines
    # 89 compiles the code of 80, and 120 that of 90: only RowLinear itself is compiled for them, not its other forms.
    if capability in (75, 80) or "TDA_INPUTS" not in defines or "TDA_INPUTS=0" in defines
]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="NVRTC is on x86-64 Linux"
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    files = importlib.metadata.files("nvidia-cuda-nvrtc") or []
    (nvrtc,) = [file for file in files if Path(file).name.startswith("libnvrtc.so")]
    ctypes.CDLL(str(nvrtc.locate()))  # from now on it is found by its name
    opened = ctypes.CDLL(str(LIBRARY))
    opened.TdaCompileCheck.restype = ctypes.c_char_p
    return opened


def compile_check(library: ctypes.CDLL, name: str, defines: str, capability: int) -> str:
    return library.TdaCompileCheck(name.encode(), defines.encode(), capability).decode()


def test_every_source_is_covered() -> None:
    assert set(device_sources()) == set(DEFINES)


@pytest.mark.parametrize(("name", "defines", "capability"), CASES)
def test_it_compiles(library: ctypes.CDLL, name: str, defines: str, capability: int) -> None:
    assert compile_check(library, name, defines, capability) == ""


def test_a_gpu_newer_than_the_compiler_gets_ptx(library: ctypes.CDLL) -> None:
    assert compile_check(library, "greedy", "TDA_BF16=0", 999) == ""


@pytest.mark.parametrize(
    ("name", "defines", "capability", "message"),
    [
        ("nothing", "", 90, "there is no device source nothing"),
        ("greedy", "TDA_BF16=0", 30, "this NVRTC compiles for no GPU as old as compute capability 3"),
        ("indexed_ffn", "TDA_BF16=0", 90, "NVRTC could not compile the kernels (NVRTC_ERROR_COMPILATION): "),
    ],
)
def test_what_cannot_be_compiled(library: ctypes.CDLL, name: str, defines: str, capability: int, message: str) -> None:
    assert compile_check(library, name, defines, capability).startswith(message)
