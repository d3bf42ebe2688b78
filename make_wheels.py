"""Build the source distribution and the wheels for Linux into dist/, with no container: `make wheels`.

GCC, 12 or newer, compiles for x86-64: Clang leaves out the kernels for AVX2 and AVX-512 (tda_export/native/vectors.h).
Zig's Clang compiles for aarch64. Zig links both against glibc 2.28, whatever glibc this machine has; the C++ library is
linked in. auditwheel checks the result and gives it its tag. Wheels are built from the source distribution.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
GLIBC = "2.28"
PLATFORMS = ("x86_64", "aarch64")
PYTHON = (sys.executable, "-m")
EXPORTS = "{ global: RegisterCustomOps; TdaCompileCheck; local: *; };\n"
# Of what a newer glibc's libstdc++ needs, all that an older glibc lacks: 0 says that there may be several threads.
SUPPLEMENT = "char __libc_single_threaded;\n"
WIDEST_KERNELS = b"arch_x86_64_v4"  # in the names of the kernels for AVX-512


def run(*command: object, **environment: str) -> None:
    """Run a command, or end with its exit status."""
    done = subprocess.run([str(part) for part in command], env=os.environ | environment)
    if done.returncode:
        sys.exit(done.returncode)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a source distribution. Python before 3.11.4, such as Debian 12's, has no filters."""
    filters: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(archive) as opened:
        opened.extractall(folder, **filters)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def compile_library(machine: str, compiler: str, arguments: list[str]) -> None:
    """Do as a C++ compiler that gets the arguments of tda_export/native/build.py, for `machine` and glibc 2.28."""
    library = Path(arguments[arguments.index("-o") + 1])
    exports, supplement, objects = (library.with_name(name) for name in ("exports", "supplement.c", "objects.o"))
    exports.write_text(EXPORTS)
    target = ("-target", f"{machine}-linux-gnu.{GLIBC}", f"-Wl,--version-script,{exports}")
    if machine != "x86_64":
        run(*PYTHON, "ziglang", "c++", *target, "-s", *arguments)
        return
    supplement.write_text(SUPPLEMENT)
    linking = [flag for flag in arguments if flag.startswith(("-l", "-Wl,"))]
    compiling = [flag for flag in arguments if flag not in (*linking, "-shared", "-o", str(library))]
    run(compiler, *compiling, "-r", "-nostdlib", "-o", objects)
    static = [output_of(compiler, f"-print-file-name={name}") for name in ("libstdc++.a", "libgcc.a", "libgcc_s.so.1")]
    # What is not used of libstdc++ is left out. What is still undefined is an error here, and not when it is loaded.
    complete = ("-Wl,--gc-sections", "-Wl,-z,defs")
    run(*PYTHON, "ziglang", "cc", *target, "-shared", *complete, objects, supplement, *static, *linking, "-o", library)
    if WIDEST_KERNELS not in library.read_bytes():
        sys.exit(f"{compiler} left out the kernels for AVX-512: GCC 12 or newer is needed")


def make_wheels(output: Path) -> None:
    """Write the source distribution, and a wheel for each platform that is built from it, to `output`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(*PYTHON, "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT)
        (archive,) = folder.iterdir()
        unpack(archive, folder / "source")
        (source,) = (folder / "source").iterdir()
        for machine in PLATFORMS:
            compiler = shlex.join([sys.executable, __file__, machine, os.environ.get("CXX", "g++")])
            # The platform is what sysconfig says in a Python for that machine.
            environment = {"CXX": compiler, "_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
            run(*PYTHON, "build", "--no-isolation", "--wheel", "--outdir", folder / machine, source, **environment)
            (wheel,) = (folder / machine).iterdir()
            run(*PYTHON, "auditwheel", "repair", "--only-plat", "--wheel-dir", output, wheel)
        shutil.copy(archive, output)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        compile_library(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        make_wheels(ROOT / "dist")
