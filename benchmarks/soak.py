"""Run many requests for a given time and watch the process that answers them for growth.

There are two targets, one after the other, each in a process of its own: `generate` (the Python interface: plain
generations, and a conversation) and `serve` (the server, with three clients over HTTP). Requests have random lengths,
budgets, sampling and ends: some are read to the end, some closed, dropped or cancelled, some are invalid and refused.
The first half of the time is warm-up (--warm-up) and does not count, since memory rises to its maximum ever more
slowly. The rest is cut into ten equal blocks.

Memory grows if the slope of a straight line through the blocks' medians is above three of its standard errors and above
--tolerance. File descriptors and threads grow if the minimum of the last block is above the maximum of the first. The
exit status is 1 if something grows, or if a request gets a wrong answer.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from rows import Row, print_rows
from soak_requests import TARGETS, Target

from tda_export.errors import UsageError
from tda_export.runtime import open_artifact
from tda_export.versions import installed_versions

BLOCKS = 10
SURE = 3.0  # standard errors of a slope that counts as growth
MB = 1e6


@dataclass(frozen=True)
class Sample:
    """A sample of a process and its children: seconds since the start, bytes, numbers.

    `resident` is all memory held, `anonymous` the part that no file backs (where the system reports it; else the same).
    """

    seconds: float
    resident: int
    anonymous: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Line:
    """A least-squares line: its slope and the slope's standard error, in units of y for one of x."""

    slope: float
    stderr: float


def look(process: psutil.Process, started: float) -> Sample | None:
    """Sample a process with its children; return None if one of them has just ended."""
    resident = anonymous = descriptors = threads = 0
    try:
        for one in (process, *process.children(recursive=True)):
            memory = one.memory_info()
            resident += memory.rss
            anonymous += memory.rss - getattr(memory, "shared", 0)
            descriptors += one.num_fds() if psutil.POSIX else one.num_handles()
            threads += one.num_threads()
    except psutil.NoSuchProcess:
        return None
    return Sample(time.monotonic() - started, resident, anonymous, descriptors, threads)


def fit(x: list[float], y: list[float]) -> Line:
    """Fit a line to at least three points by least squares."""
    middle, mean = statistics.fmean(x), statistics.fmean(y)
    spread = sum((value - middle) ** 2 for value in x)
    slope = sum((a - middle) * (b - mean) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean - slope * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
    return Line(slope, (left / (len(x) - 2) / spread) ** 0.5)


def blocks(samples: list[Sample], seconds: float, warm_up: float) -> list[list[Sample]]:
    """Cut the samples after the warm-up into blocks of equal time.

    Raises:
        UsageError: A block would be empty.
    """
    begin, length = warm_up * seconds, (1 - warm_up) * seconds / BLOCKS
    cut: list[list[Sample]] = [[] for _ in range(BLOCKS)]
    for sample in samples:
        if sample.seconds >= begin:
            cut[min(int((sample.seconds - begin) / length), BLOCKS - 1)].append(sample)
    if not all(cut):
        raise UsageError("The time is too short for ten blocks of samples. Give more --minutes, or a shorter --every.")
    return cut


def growth(samples: list[Sample], seconds: float, *, warm_up: float, tolerance: float) -> Row:
    """Return the growth, by the rule above.

    Args:
        samples: The samples in order of time.
        seconds: The time of the whole run.
        warm_up: The fraction of the time that does not count.
        tolerance: The growth of memory that is allowed, MB a minute.
    """
    cut, found, grows = blocks(samples, seconds, warm_up), Row(), []
    minutes = [statistics.fmean(sample.seconds for sample in block) / 60 for block in cut]
    for name in ("resident", "anonymous"):
        medians = [statistics.median(getattr(sample, name) for sample in block) / MB for block in cut]
        line = fit(minutes, medians)
        found[f"{name}_mb"] = [round(value, 3) for value in medians]
        found[f"{name}_mb_per_minute"], found[f"{name}_stderr"] = line.slope, line.stderr
        if line.slope > max(SURE * line.stderr, tolerance):
            grows.append(name)
    for name in ("descriptors", "threads"):
        first, last = ([getattr(sample, name) for sample in block] for block in (cut[0], cut[-1]))
        found[name] = {"first": [min(first), max(first)], "last": [min(last), max(last)]}
        if min(last) > max(first):
            grows.append(name)
    return found | {"grows": grows}


def soak(target: Target, options: argparse.Namespace) -> Row:
    """Run a target for the given time, and return the growth.

    Raises:
        TdaError: The target ended, or gave a wrong answer to a request.
    """
    seconds, samples = 60 * options.minutes, list[Sample]()
    with target(options.artifact, options.provider, options.seed) as running:
        process, started = psutil.Process(running.pid), time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            if (sample := look(process, started)) is not None:
                samples.append(sample)
            running.check()
            time.sleep(min(options.every, seconds - elapsed))
        counted = running.counts()
    found = growth(samples, seconds, warm_up=options.warm_up, tolerance=options.tolerance)
    return found | {"requests": counted}


def run(options: argparse.Namespace) -> Iterator[Row]:
    if not (options.minutes > 0 and options.every > 0 and 0 <= options.warm_up < 1):
        raise UsageError("Give --minutes and --every above 0, and a --warm-up in [0, 1).")
    open_artifact(options.artifact)  # a wrong artifact is refused before any process is started
    for name in options.target or TARGETS:
        row: Row = {"target": name, "artifact": options.artifact.resolve().name, "minutes": options.minutes}
        yield row | soak(TARGETS[name], options) | versions()


def versions() -> Row:
    """Return the versions and the device of the measurement."""
    return {
        "threads_of_products": os.environ.get("TDA_EXPORT_THREADS", ""),
        "python": platform.python_version(),
        "packages": installed_versions(["tda-export", "onnxruntime", "onnxruntime-gpu", "numpy"]),
        "system": platform.platform(),
    }


def line(row: Row) -> str:
    """Return a row as a line of text."""
    requests = ", ".join(f"{count} {name}" for name, count in sorted(row["requests"].items()))
    text = f"{row['target']}, {row['minutes']:g} minutes: {sum(row['requests'].values())} requests ({requests})\n"
    for name in ("resident", "anonymous"):
        medians, slope, stderr = row[f"{name}_mb"], row[f"{name}_mb_per_minute"], row[f"{name}_stderr"]
        text += f"  {name} memory {medians[0]:.1f} MB, at the end {medians[-1]:.1f} MB: "
        text += f"{slope:+.4f} ± {stderr:.4f} MB a minute\n"
    for name in ("descriptors", "threads"):
        (least, most), (last_least, last_most) = row[name]["first"], row[name]["last"]
        text += f"  {name} {least} to {most}, at the end {last_least} to {last_most}\n"
    return text + f"  {'grows: ' + ', '.join(row['grows']) if row['grows'] else 'no growth'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="repeatable (both)")
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes for each target (30)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two samples (1)")
    parser.add_argument("--warm-up", type=float, default=0.5, help="fraction of the time that does not count (0.5)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="allowed growth of memory, MB a minute (0.05)")
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths, budgets and ends (0)")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print a row of JSON for each target")
    options = parser.parse_args()
    grown: list[str] = []

    def rows() -> Iterator[Row]:
        for row in run(options):
            grown.extend(row["grows"])
            yield row

    return (print_rows(rows()) if options.json else print_rows(rows(), line)) or int(bool(grown))


if __name__ == "__main__":
    raise SystemExit(main())
