"""Measure the peak memory of this process in a block of code."""

from __future__ import annotations

import threading
from pathlib import Path


class PeakMemory:
    """Samples this process's anonymous memory (pages that no file backs) while the block runs; `peak` is in bytes."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._done = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0
