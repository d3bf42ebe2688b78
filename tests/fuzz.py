"""Mutations of files by seed, and worker processes that run them, so that a crash does not end pytest."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORKERS = 2
NUMBERS = (0, -1, 1, 2**31, 1e39, -1e39, float("nan"), float("inf"), 10**400, 0.5)
TEXTS = ("", "text", "\x1b[2J\n", "\ud800", "../../x", "x" * 5000)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"a": 1}, *TEXTS)


def places(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Return the places of all values in JSON, objects and arrays included."""
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield (*place, key)
            yield from places(value, (*place, key))


def mutate_json(text: str, random: random.Random) -> str:
    """Change one value: replace it, delete, rename or double its key, swap it with another, or nest it deeply."""
    content = json.loads(text)
    # The depth is drawn first, so that long arrays do not get all mutations.
    every = list(places(content))
    depth = random.choice(sorted({len(place) for place in every}))
    place = random.choice([place for place in every if len(place) == depth])
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    key, kind = place[-1], random.choice(["number", "number", "other", "delete", "rename", "swap", "nest", "near"])
    if kind == "number":
        holder[key] = random.choice(NUMBERS)
    elif kind == "other":
        holder[key] = random.choice(OTHERS)
    elif kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice(["\x1b]0;x\x07", "a\nb", "x" * 5000, "../x", "", key + "s"])] = holder.pop(key)
    elif kind == "swap":
        other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "nest":
        marker = "here it is nested"
        holder[key] = marker
        return json.dumps(content).replace(json.dumps(marker), "[" * 100_000 + "]" * random.choice([0, 100_000]), 1)
    elif isinstance(holder[key], bool | None | str | list | dict):
        holder[key] = [holder[key]]
    else:
        holder[key] = holder[key] * random.choice([0.5, 1.001, 2]) + random.choice([0, 1])
    return json.dumps(content)


def mutate_bytes(data: bytes, random: random.Random) -> bytes:
    """Flip a bit, some bits or a byte, cut bytes off, insert bytes, swap blocks, or fill a block."""
    kind = random.choice(["bit", "bit", "bits", "byte", "cut", "insert", "swap", "fill", "nothing"])
    changed = bytearray(data)
    at = random.randrange(len(changed))
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else 20):
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    elif kind == "byte":
        changed[at] = random.randrange(256)
    elif kind == "cut":
        del changed[random.choice([0, 1, 7, at, len(changed) - 1]) :]
    elif kind == "insert":
        changed[at:at] = random.randbytes(random.choice([1, 8, 1000]))
    elif kind == "swap":
        size, other = min(16, len(changed) // 2), random.randrange(len(changed))
        changed[at : at + size], changed[other : other + size] = changed[other : other + size], changed[at : at + size]
    elif kind == "fill":
        changed[at : at + 64] = bytes([random.choice([0, 255])]) * len(changed[at : at + 64])
    else:
        changed.clear()
    return bytes(changed)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command: exit code, output, and the traceback of an exception that it did not handle."""

    exit_code: int
    stdout: str
    stderr: str
    traceback: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with the outcome; empty after a success or a proper failure."""
        if self.traceback:
            return self.traceback
        if self.exit_code not in (0, 1, 2):
            return f"exit code {self.exit_code}: {self.stderr}"
        lines = self.stderr.split("\n")
        errors = [line for line in lines if line.startswith("Error: ")]
        if self.exit_code and (len(errors) != 1 or lines[-2:] != [*errors, ""]):
            return f"not one line: {self.stderr[:1000]!r}"
        if self.exit_code and (not errors[0].isprintable() or len(errors[0]) > 2100):
            return f"not escaped or not cut: {errors[0][:1000]!r}"
        return ""


@dataclass(frozen=True)
class Case:
    """A mutation by its seed. `check` gets a folder of its own, a generator, and `where` the good files are."""

    check: Callable[[Path, random.Random, Path], str]
    seed: int
    where: Path

    def __str__(self) -> str:
        return f"{self.check.__name__} of {self.where.name} with seed {self.seed}"

    def run(self) -> str:
        """Return the problem; empty if there is none."""
        folder = Path(tempfile.mkdtemp(dir=self.where.parent))
        try:
            return self.check(folder, random.Random(self.seed), self.where)
        except Exception:
            return traceback.format_exc()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _serve(pipe: Connection) -> None:
    """Run the cases that come through a pipe, up to None, and send back the problem of each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before the first case is received, which imports heavy packages
    pipe.send(None)
    while case := pipe.recv():
        pipe.send(None)
        pipe.send(case.run())


class Worker:
    """A process that runs one case after another. It is replaced if a case ends it or takes too long."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()  # so that the pipe ends with the process
        self._pipe.recv()

    def run(self, case: Case) -> str:
        self._pipe.send(case)
        try:
            self._pipe.recv()  # the time of imports does not count, since it is long on a busy machine
            if self._pipe.poll(self._timeout):
                return str(self._pipe.recv())
            problem = f"not done after {self._timeout} s"
        except (EOFError, OSError):
            self._process.join()
            problem = f"ended its process with {self._process.exitcode}"
        self._end()
        self._begin()
        return problem

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(self._timeout)
        self._end()


def run_all(cases: Sequence[Case], timeout: float) -> dict[str, str]:
    """Run cases in worker processes, and return the problems by case.

    Args:
        cases: The cases.
        timeout: The seconds that a case may take after the imports of its check's module.
    """
    waiting, wrong = iter(cases), dict[str, str]()
    lock = threading.Lock()

    def work() -> None:
        worker = Worker(timeout)
        while True:
            with lock:
                case = next(waiting, None)
            if case is None:
                break
            if problem := worker.run(case):
                wrong[str(case)] = problem
        worker.close()

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong
