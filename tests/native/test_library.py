"""Building, finding and refusing the native library, and running without it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from tda_export.errors import TdaError
from tda_export.native import build as build_module
from tda_export.native import library
from tda_export.native.build import LIBRARY, BuildError, build, find_compiler
from tda_export.runtime import load
from tda_export.runtime import session as session_module
from tests.conftest import run_ok
from tests.runtime.conftest import without_native_kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh_answers() -> Iterator[None]:
    """A process remembers facts about the library. Each test starts without them."""
    library.native_problem.cache_clear()
    library.warn_once.cache_clear()
    yield
    library.native_problem.cache_clear()
    library.warn_once.cache_clear()


def test_it_was_built_with_the_package() -> None:
    assert library.native_problem() is None
    library.register_native(ort.SessionOptions())


@pytest.mark.parametrize("content", [None, b"", b"not a library"], ids=["missing", "empty", "garbage"])
def test_library_that_cannot_be_loaded(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libtda_ort.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(library, "LIBRARY", path)
    expected = "was not built with the package" if content is None else "cannot be loaded"
    assert expected in str(library.native_problem())
    with pytest.raises(TdaError, match=f"The native kernels cannot be used: .*{expected}"):
        library.register_native(ort.SessionOptions())


def test_library_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "other.cc"
    source.write_text("int nothing() { return 0; }\n")
    path = tmp_path / "libtda_ort.so"
    subprocess.run([*find_compiler(), "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    monkeypatch.setattr(library, "LIBRARY", path)
    assert "cannot be loaded" in str(library.native_problem())


def test_it_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for problem in ("one reason", "one reason", "another"):
        library.warn_once(problem)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "tda-export runs without its native kernels, which is slower: one reason.",
        "tda-export runs without its native kernels, which is slower: another.",
    ]


def test_generation_without_it(tiny_artifact: Path) -> None:
    native = run_ok("generate", tiny_artifact, "Hello", "--max-new-tokens", 16)
    assert "native kernels" not in native.stderr
    with without_native_kernels():
        stock = run_ok("generate", tiny_artifact, "Hello", "--max-new-tokens", 16)
    assert "runs without its native kernels, which is slower: TDA_EXPORT_NATIVE=0 leaves them out" in stock.stderr
    assert stock.stdout == native.stdout


def test_kernels_that_cannot_be_made(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example without NVRTC: the session is refused with the kernel's message, and the body runs."""
    original = session_module.open_session

    def refuse_native(*arguments: Any, native: bool = False, **options: Any) -> ort.InferenceSession:
        if native:
            raise TdaError("decode.onnx: cannot load it (tda::IndexedFFN: NVRTC cannot be opened).")
        return original(*arguments, native=native, **options)

    monkeypatch.setattr(session_module, "open_session", refuse_native)
    model = load(tiny_artifact, provider="cpu")
    assert not model.sessions.native
    assert len(list(model.generate("Hello", max_new_tokens=4))) == 4
    assert capsys.readouterr().err.count("tda::IndexedFFN: NVRTC cannot be opened") == 1


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found \(looked for \$CXX, c\+\+, g\+\+, clang\+\+\)"):
        build(tmp_path / "libtda_ort.so")


def test_compiler_with_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "env 'A=b c' g++ -m64")
    command = find_compiler()
    assert Path(command[0]).name == "env"
    assert command[1:] == ["A=b c", "g++", "-m64"]


def test_compiler_that_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'of no end")
    with pytest.raises(BuildError, match=r"^\$CXX cannot be read: No closing quotation$"):
        find_compiler()


def test_compiler_that_fails_leaves_the_old_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho out of registers >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    output = tmp_path / "libtda_ort.so"
    output.write_bytes(b"old")
    with pytest.raises(BuildError, match=r"broken-c\+\+ failed:\nout of registers"):
        build(output)
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-c++", "libtda_ort.so"]


def test_compiler_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/no/such/interpreter\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"c\+\+: No such file or directory"):
        build(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == [compiler]


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"nowhere.*No such file or directory"):
        build(tmp_path / "nowhere" / "library.so")


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_it_stays_loaded() -> None:
    """By the flag NODELETE (8) in the dynamic section's entry FLAGS_1, kernels stay when sessions end."""
    content = LIBRARY.read_bytes()
    (headers,), (size, count) = struct.unpack_from("<Q", content, 32), struct.unpack_from("<HH", content, 54)
    segments = [struct.unpack_from("<II6Q", content, headers + i * size) for i in range(count)]
    ((_, _, start, _, _, length, *_),) = [segment for segment in segments if segment[0] == 2]  # PT_DYNAMIC
    entries = dict(struct.iter_unpack("<QQ", content[start : start + length]))
    assert entries[0x6FFFFFFB] & 8


def test_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BuildError, match="not built on Windows"):
        build(tmp_path / "libtda_ort.so")


def test_device_sources_hold_no_end_of_literal() -> None:
    for text in build_module.device_sources().values():
        assert ')TDA"' not in text


# Tests of the function bodies alone are left out. Without the conftest.py, most of Python's modules are not loaded.
SANITIZED = """
import sys
from pathlib import Path
import pytest
import tda_export.native.library as library
library.LIBRARY = Path(sys.argv[1])
names = ("indexed_ffn", "functions", "row_linear", "codes_cpu", "step_ops", "attention", "attention_stored",
         "attention_8", "attention_16")
sys.exit(pytest.main(["-q", "-s", "--noconftest", "-p", "no:cacheprovider", "-p", "tests.fewer_examples",
                      "--examples", "40", "-m", "not gpu", "-k", "not body or what_the_body",
                      *(f"tests/native/test_{name}.py" for name in names)]))
"""


def widest_target() -> tuple[str, ...]:
    """Return the flags for one target, the widest of this processor, since sanitizers cannot choose at load."""
    features = set(Path("/proc/cpuinfo").read_text().split())
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"} <= features:
        return "-DTDA_ONE_TARGET=16", "-march=x86-64-v4"
    return (
        ("-DTDA_ONE_TARGET=8", "-march=x86-64-v3") if {"avx2", "fma", "f16c"} <= features else ("-DTDA_ONE_TARGET=4",)
    )


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds the sanitizers' runtimes as GCC on Linux names them")
def test_cpu_kernels_under_sanitizers(tmp_path: Path) -> None:
    """Run the kernels' own tests with a library that checks addresses and undefined behaviour.

    All of them run, those of attention to float16 and int8 caches too, for the widest vectors of this processor. A
    property test draws 40 examples at most: more reach hardly any further branch of the kernels. The compiler optimises
    little, since sanitizers check what the source says, and with -O3 they take three times as long to compile.
    """
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1", *widest_target())
    checked = build(tmp_path / "libtda_ort.so", flags)
    runtimes = [
        subprocess.run(
            [*find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(map(str.strip, runtimes)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees some memory
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(checked)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
