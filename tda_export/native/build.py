"""Compile the native library with the system's C++ compiler; device sources are embedded as text.

    python -m tda_export.native.build

The package's build runs this (hatch_build.py). It needs no CUDA and no header of ONNX Runtime. This module imports only
the standard library, since it runs before the package's dependencies are installed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "libtda_ort.so"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Wno-psabi")
# On Linux the library stays loaded: its kernels and CUDA modules are kept for the whole process.
LINUX_FLAGS = ("-ldl", "-Wl,-z,nodelete")
COMPILERS = ("c++", "g++", "clang++")
LITERAL_LIMIT = 8000  # characters of one string literal; compilers need not accept longer ones


class BuildError(Exception):
    """The library could not be compiled; the text says why."""


def find_compiler() -> list[str]:
    """Return the C++ compiler's command: `$CXX`, which may have arguments, or the first of the usual names.

    Raises:
        BuildError: There is no compiler, or `$CXX` is not a command.
    """
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"$CXX cannot be read: {error}") from None
    for words in (chosen, *([name] for name in COMPILERS)):
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++)")


def device_sources() -> dict[str, str]:
    """Return the text of each device/*.cu, preceded by the shared *.cuh files, by name."""
    common = "".join(path.read_text(encoding="utf-8") for path in sorted((FOLDER / "device").glob("*.cuh")))
    return {path.stem: common + path.read_text(encoding="utf-8") for path in sorted((FOLDER / "device").glob("*.cu"))}


def embed_sources(folder: Path) -> None:
    """Write `device_sources.h`, which holds the device sources as string literals."""
    entries = []
    for name, text in device_sources().items():
        pieces = [text[at : at + LITERAL_LIMIT] for at in range(0, len(text), LITERAL_LIMIT)]
        entries.append(f'{{"{name}", ' + "\n".join(f'R"TDA({piece})TDA"' for piece in pieces) + "},\n")
    (folder / "device_sources.h").write_text(
        "struct EmbeddedSource {\n  const char* name;\n  const char* text;\n};\n"
        f"static const EmbeddedSource kDeviceSources[] = {{\n{''.join(entries)}}};\n",
        encoding="utf-8",
    )


def build(output: Path = LIBRARY, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the library to `output` atomically.

    Raises:
        BuildError: There is no compiler, it failed, or the folder cannot be written to.
    """
    if sys.platform == "win32":
        raise BuildError("the native library is not built on Windows")
    compiler = find_compiler()
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as name:
            part = _compile(compiler, Path(name), extra_flags)
            part.replace(output)
    except OSError as error:  # a read-only folder, or a compiler that does not start
        raise BuildError(f"{error.filename or output}: {error.strerror or error}") from error
    return output


def _compile(compiler: list[str], folder: Path, extra_flags: tuple[str, ...]) -> Path:
    embed_sources(folder)
    part = folder / LIBRARY.name
    sources = [str(path) for path in sorted(FOLDER.glob("*.cc"))]
    command = [*compiler, *FLAGS, *WARNINGS, *extra_flags, f"-I{FOLDER}", f"-I{folder}", *sources, "-o", str(part)]
    command += LINUX_FLAGS if sys.platform == "linux" else ()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(compiler)} failed:\n{done.stderr.strip()}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    return part


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(str(error))
