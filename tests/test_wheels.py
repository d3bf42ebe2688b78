"""The source distribution, the wheels that are built from it, and the compiler of make_wheels.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import make_wheels
from tda_export import __version__
from tda_export.native.build import FOLDER, LIBRARY, find_compiler

ROOT = Path(__file__).parents[1]
RECORDING_COMPILER = """#!{python}
import sys
from pathlib import Path
Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"compiled " + " ".join(sys.argv[1:]).encode())
"""


def executable(path: Path, text: str) -> str:
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def hatchling(folder: Path, target: str, output: Path, **environment: str) -> tuple[Path, str]:
    """Build a target of the project in a folder. Return the file and the output."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (built,) = output.iterdir()
    return built, done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    archive, _ = hatchling(ROOT, "sdist", folder / "dist")
    make_wheels.unpack(archive, folder)
    return folder / f"tda_export-{__version__}"


@pytest.mark.parametrize("machine", make_wheels.PLATFORMS)
def test_wheel_with_the_library(source: Path, machine: str, tmp_path: Path) -> None:
    """The wheel is for any Python 3 on the platform of sysconfig. It has all code that runs, and no tests."""
    compiler = executable(tmp_path / "c++", RECORDING_COMPILER)
    wheel, _ = hatchling(source, "wheel", tmp_path / "dist", CXX=compiler, _PYTHON_HOST_PLATFORM=f"linux-{machine}")
    assert wheel.name == f"tda_export-{__version__}-py3-none-linux_{machine}.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        about = opened.read(f"tda_export-{__version__}.dist-info/WHEEL").decode()
        assert opened.read(f"tda_export/native/{LIBRARY.name}").startswith(b"compiled ")
    assert f"Tag: py3-none-linux_{machine}\n" in about
    assert "Root-Is-Purelib: false\n" in about
    assert {"tda_export/native/attention.cc", "tda_export/native/device/format.cuh"} <= names
    assert {f"tda_export/calibration_data/{path.name}" for path in (ROOT / "calibration_data").iterdir()} <= names
    assert {name.partition("/")[0] for name in names} == {"tda_export", f"tda_export-{__version__}.dist-info"}


def test_wheel_without_a_compiler(source: Path, tmp_path: Path) -> None:
    (source / "tda_export" / "native" / LIBRARY.name).unlink(missing_ok=True)
    (tmp_path / "nothing").mkdir()
    wheel, said = hatchling(source, "wheel", tmp_path / "dist", CXX="", PATH=str(tmp_path / "nothing"))
    assert wheel.name == f"tda_export-{__version__}-py3-none-any.whl"
    assert "The native kernels are not built: no C++ compiler found" in said
    assert f"tda_export/native/{LIBRARY.name}" not in zipfile.ZipFile(wheel).namelist()


def compile_with(arguments: str, machine: str, compiler: str, zig: str, library: Path) -> str:
    """Run make_wheels as a compiler, with another program for Zig. Return its file, or its output."""
    code = (
        "import sys, make_wheels\n"
        f"make_wheels.PYTHON = ({zig!r},)\n"
        f"make_wheels.compile_library({machine!r}, {compiler!r}, {[*arguments.split(), '-o', str(library)]!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else library.read_text()


def test_other_machines_get_zig_alone(tmp_path: Path) -> None:
    zig, library = executable(tmp_path / "zig", RECORDING_COMPILER), tmp_path / "library.so"
    written = compile_with("-O3 -shared one.cc -Wl,-z,nodelete", "aarch64", "no-such-compiler", zig, library)
    assert written.startswith("compiled ziglang c++ -target aarch64-linux-gnu.2.28 ")
    assert written.endswith(f"-s -O3 -shared one.cc -Wl,-z,nodelete -o {library}")


@pytest.mark.skipif(sys.platform != "linux", reason="wheels are for Linux")
def test_x86_gets_objects_of_the_compiler(tmp_path: Path) -> None:
    """The compiler gets compilations, and Zig gets links. Objects are really made, of two sources."""
    zig, library = executable(tmp_path / "zig", RECORDING_COMPILER), tmp_path / "arch_x86_64_v4.so"
    compiler = find_compiler()[0]
    for name in ("one", "two"):
        (tmp_path / f"{name}.cc").write_text(f"int {name}() {{ return 1; }}\n")
    arguments = f"-O1 -fPIC -shared {tmp_path}/one.cc {tmp_path}/two.cc -ldl -Wl,-z,nodelete"
    written = compile_with(arguments, "x86_64", compiler, zig, library).split()
    assert written[:4] == ["compiled", "ziglang", "cc", "-target"]
    assert written[-4:] == ["-ldl", "-Wl,-z,nodelete", "-o", str(library)]
    assert "-O1" not in written
    objects = (tmp_path / "objects.o").read_bytes()
    assert objects[:4] == b"\x7fELF"
    assert b"_Z3onev" in objects
    assert b"_Z3twov" in objects


@pytest.mark.skipif(sys.platform != "linux", reason="wheels are for Linux")
def test_a_compiler_that_leaves_kernels_out(tmp_path: Path) -> None:
    zig, compiler = executable(tmp_path / "zig", RECORDING_COMPILER), find_compiler()[0]
    (tmp_path / "one.cc").write_text("int one() { return 1; }\n")
    said = compile_with(f"-shared {tmp_path}/one.cc", "x86_64", compiler, zig, tmp_path / "library.so")
    assert said == f"{compiler} left out the kernels for AVX-512: GCC 12 or newer is needed"


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    failing = executable(tmp_path / "failing", "#!/bin/sh\necho out of registers >&2\nexit 3\n")
    assert compile_with("one.cc", "x86_64", failing, failing, tmp_path / "library.so") == "out of registers"


def test_exports() -> None:
    """The visible symbols are the functions that the sources export."""
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.cc")))
    declared = re.findall(r'^extern "C" .*?(\w+)\(', re.sub(r"__attribute__\(\(.*?\)\)\)", "", sources), re.MULTILINE)
    assert {f"{name};" for name in declared} == set(make_wheels.EXPORTS.split()) - {
        "{",
        "global:",
        "local:",
        "*;",
        "};",
    }


def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wheel is built from the unpacked source distribution with its platform's compiler, and then repaired."""
    seen: list[tuple[str, str, str]] = []

    def fake_run(*command: object, **environment: str) -> None:
        words = [str(word) for word in command]
        folder = Path(words[-2])
        if "--sdist" in words:
            (tmp_path / "tree" / "tda_export-1").mkdir(parents=True)
            shutil.make_archive(str(folder / "tda_export-1"), "gztar", tmp_path / "tree")
        elif "--wheel" in words:
            folder.mkdir()
            (folder / "tda_export-1.whl").touch()
            compiler = environment["CXX"].removeprefix(f"{sys.executable} {make_wheels.__file__} ")
            seen.append((Path(words[-1]).name, compiler, environment["_PYTHON_HOST_PLATFORM"]))
        else:
            assert words[len(make_wheels.PYTHON) :][:2] == ["auditwheel", "repair"]
            assert folder == tmp_path

    monkeypatch.setattr(make_wheels, "run", fake_run)
    monkeypatch.setenv("CXX", "g++-14")
    make_wheels.make_wheels(tmp_path)
    assert seen == [
        ("tda_export-1", "x86_64 g++-14", "linux-x86_64"),
        ("tda_export-1", "aarch64 g++-14", "linux-aarch64"),
    ]
    assert (tmp_path / "tda_export-1.tar.gz").is_file()
