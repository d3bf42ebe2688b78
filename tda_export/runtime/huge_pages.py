"""Memory of huge pages (2 MiB instead of 4 KiB) for what every step of decode reads on the CPU: weights, keys, values.

A processor looks up the place of each page that it reads. It keeps few of these places, so with small pages it looks
them up while weights arrive, and reads them more slowly. Only anonymous memory can have huge pages on most systems, a
file mapped into memory cannot. So weights that are on huge pages are a copy, which belongs to one process.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from tda_export.switches import switched_on

HUGE_PAGE = 2 << 20  # bytes; also right where huge pages are larger: only fewer bytes are on them
ALIGNMENT = 64  # bytes: a line of the cache, and the widest vector
SWITCH = "TDA_EXPORT_HUGE_PAGES"  # environment variable: 0 maps weights.bin, and has small pages for the rest
MOST_OF_FREE = 0.5  # of the available memory; more weights than this stay in the mapped file
MEMORY_INFO = Path("/proc/meminfo")
# Of a container: its limit, what it uses, and what of that are files that it has not read lately (in memory.stat).
GROUP_LIMIT, GROUP_USE = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
GROUP_STATISTICS, OLD_FILES = Path("/sys/fs/cgroup/memory.stat"), "inactive_file"


def anonymous(size: int) -> np.ndarray:
    """Return zeros, uint8 [size], at the start of a huge page where the system has such pages.

    Raises:
        OSError, ValueError, OverflowError: There is no such memory.
    """
    if not _wanted():
        return np.zeros(size, np.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    every = np.frombuffer(memory, np.uint8)  # keeps the memory as long as an array of it lives
    start = -every.ctypes.data % HUGE_PAGE
    return every[start : start + size]


def zeros(arrays: Sequence[tuple[Sequence[int], str]]) -> list[ort.OrtValue]:
    """Return tensors of zeros on the CPU, one after another in such memory, for (shape, dtype) each.

    Raises:
        OSError, ValueError, OverflowError: There is no such memory.
    """
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    memory = anonymous(starts.pop())
    return [
        in_place(memory[start : start + size].view(dtype).reshape(shape))
        for (shape, dtype), start, size in zip(arrays, starts, sizes, strict=True)
    ]


def in_place(array: np.ndarray) -> ort.OrtValue:
    """Return a tensor on the CPU that shares an array's memory and keeps it."""
    return ort.OrtValue.from_dlpack(array)


def read_file(path: Path, size: int) -> np.ndarray | None:
    """Return a file's first `size` bytes, uint8 [size], on huge pages.

    Returns:
        None where a mapped file is as good or better: the system has no huge pages, `SWITCH` is 0, the bytes are more
        than `MOST_OF_FREE` of the available memory, or the file cannot be read whole.
    """
    if not _wanted() or size > MOST_OF_FREE * available_memory():
        return None
    try:
        memory, done = anonymous(size), 0
        with path.open("rb", buffering=0) as file:
            while done < size and (count := file.readinto(memory.data[done:])):
                done += count
    except OSError:
        return None
    return memory if done == size else None


def available_memory() -> int:
    """Return how many bytes can be taken without swapping, by Linux and by the limit of its container; 0 if unknown."""
    try:
        lines = dict(line.split(":", 1) for line in MEMORY_INFO.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) << 10
        if GROUP_LIMIT.exists() and (limit := GROUP_LIMIT.read_text().strip()) != "max":
            statistics = dict(line.split() for line in GROUP_STATISTICS.read_text().splitlines())
            available = min(available, int(limit) - int(GROUP_USE.read_text()) + int(statistics[OLD_FILES]))
    except (OSError, ValueError, KeyError):
        return 0
    return max(available, 0)


def _wanted() -> bool:
    return switched_on(SWITCH) and hasattr(mmap, "MADV_HUGEPAGE")
