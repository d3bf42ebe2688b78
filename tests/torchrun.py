"""Run commands as several ranks under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

SINGLE_THREAD = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}  # sums are rounded alike
COMMAND = ("-m", "tda_export")


def start(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """Start Python with these arguments as ranks; 1 is one process without torchrun. Its output is piped."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    # A test run in the background of a shell ignores SIGINT, and so would its children.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} if os.name == "posix" else {}
    command = [sys.executable, *torchrun, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=SINGLE_THREAD, stdout=pipe, stderr=pipe, text=True, **heed)  # type: ignore[call-overload, no-any-return]


def succeed(ranks: int, *arguments: object) -> str:
    """Run ranks, require success, and return the standard output."""
    process = start(ranks, *arguments)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout


def errors(process: subprocess.Popen[str]) -> list[str]:
    """Wait for a failure, and return the lines that begin like our errors. torchrun prints many others."""
    _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    return [line for line in stderr.splitlines() if line.startswith(("Error", "Interrupted"))]


def rank_of(process: subprocess.Popen[str], number: int) -> psutil.Process:
    """Return the process of a rank."""
    return next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == str(number))


def script(folder: Path, text: str) -> Path:
    """Write a program for ranks, in which `ranks` have joined."""
    path = folder / "program.py"
    begin = "from tda_export import ranks as group\nfrom tda_export.errors import TdaError, UsageError\n"
    path.write_text(begin + "ranks = group.join('cpu')\n" + text + "\ngroup.leave()\n")
    return path
