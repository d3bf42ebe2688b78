"""Measure many settings of artifacts in several processes of few threads each, since one session scales badly.

A task is a part of the windows of a text, with all settings of one artifact. On a priced artifact, the prompts are read
and the continuations decoded densely once for all settings.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tda_export.evaluation.free import FreeText, measure_free
from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.text import TextSettings, WindowQuality, check_lengths, counted_quality, measure_window
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.session import THREADS

Window = Sequence[int]


@dataclass(frozen=True)
class Measured:
    """The measurements of one request: one for each window, and the price that was chosen (for priced artifacts)."""

    windows: list[Any]
    price: float | None


class Pool:
    """Runs tasks in processes."""

    def __init__(self, executor: ProcessPoolExecutor, jobs: int) -> None:
        self._executor, self._jobs = executor, jobs

    def measure(
        self,
        task: Callable[..., list[Measured]],
        windows: Sequence[Window],
        advance: Callable[[int], None] = lambda windows: None,
    ) -> list[Measured]:
        """Spread the windows over the processes, and return their results in order."""
        chunks = [windows[start :: self._jobs] for start in range(min(self._jobs, len(windows)))]
        running = {self._executor.submit(task, windows=chunk): index for index, chunk in enumerate(chunks)}
        found: dict[int, list[Measured]] = {}
        for done in as_completed(running):
            found[running[done]] = done.result()
            advance(len(chunks[running[done]]))
        first = found[0]
        joined = [
            [found[index % self._jobs][place].windows[index // self._jobs] for index in range(len(windows))]
            for place in range(len(first))
        ]
        return [Measured(of, one.price) for of, one in zip(joined, first, strict=True)]


@contextmanager
def open_pool(jobs: int, threads: int) -> Iterator[Pool]:
    """Start processes with this many threads each."""
    for name in (THREADS, "OMP_NUM_THREADS"):  # processes inherit these, and read them when they import
        os.environ[name] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as executor:
        try:
            yield Pool(executor, jobs)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def text_task(folder: Path, requests: Iterable[Request], settings: TextSettings) -> Callable[..., list[Measured]]:
    """Measure requests by the protocol of `evaluation/text.py`. The result of a window is a `WindowQuality`."""
    return partial(_measure_text, folder, list(requests), settings)


def free_task(folder: Path, requests: Iterable[Request], new_tokens: int) -> Callable[..., list[Measured]]:
    """Measure free generation after prompts. The result of a window is a `FreeText`."""
    return partial(_measure_free, folder, list(requests), new_tokens)


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> Model:
    return load(folder, provider="cpu")


def _measure_text(
    folder: Path, requests: list[Request], settings: TextSettings, *, windows: Sequence[Window]
) -> list[Measured]:
    model = _loaded(folder)
    artifact, length = model.artifact, settings.prompt_tokens
    check_lengths(artifact, settings)
    found = []
    shared = _shared(model, settings, windows) if artifact.layout == "priced" else []
    for request in requests:
        setting = open_setting(artifact, model.sessions, request)
        qualities: list[WindowQuality] = []
        if artifact.layout != "priced":
            qualities = [measure_window(artifact, setting, window, settings) for window in windows]
        for window, (cache, mask, dense) in zip(windows, shared, strict=False):
            cache.truncate(length)
            counted = setting.decode_counted(cache, window[length:-1], mask)
            qualities.append(counted_quality(artifact, dense, counted, window[length + 1 :]))
        found.append(Measured(qualities, getattr(setting.deployment, "price", None)))
    return found


def _shared(model: Model, settings: TextSettings, windows: Sequence[Window]) -> list[tuple[KvCache, Any, Any]]:
    """Return for each window the cache of its dense prompt, the output of prefill, and the dense logits."""
    setting = open_setting(model.artifact, model.sessions, Request("dense"))
    shared = []
    for window in windows:
        cache = KvCache(model.artifact.shape, "cpu", settings.window)
        _, mask = setting.read(window[: settings.prompt_tokens], cache)
        dense = decode(model.sessions, cache, window[settings.prompt_tokens : -1], None)
        shared.append((cache, mask, dense))
    return shared


def _measure_free(
    folder: Path, requests: list[Request], new_tokens: int, *, windows: Sequence[Window]
) -> list[Measured]:
    model = _loaded(folder)
    found = []
    for request in requests:
        setting = open_setting(model.artifact, model.sessions, request)
        texts: list[FreeText] = measure_free(model.artifact, setting, windows, new_tokens)
        found.append(Measured(texts, getattr(setting.deployment, "price", None)))
    return found
