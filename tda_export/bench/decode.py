"""Compare ways of generating from one artifact, in one run: plain dense, dense by the native kernel, TDA, Griffin.

The prompt mask is cut by rank at exactly the requested sparsity, so that all methods read equally many bytes. Before
anything is timed, logits are compared with those of slower ways to compute them. Methods take turns.
"""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

import tda_export
from tda_export.bench.bandwidth import copy_bandwidth
from tda_export.bench.probe import PROBED_TOKENS
from tda_export.bench.runners import (
    Runner,
)
from tda_export.bench.timing import Spread, speedup, take_turns
from tda_export.errors import TdaError, UsageError
from tda_export.graph.derive import artifact_method, artifact_spec
from tda_export.graph.sizes import artifact_sizes
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.cuda_stream import cuda_driver
from tda_export.runtime.providers import CUDA
from tda_export.runtime.session import Sessions

PRICED_METHODS = ("dense", "dense_native", "priced")
MASK_METHODS = ("dense", "dense_native", "tda", "two_levels", "griffin", "tt")
METHODS = (*MASK_METHODS, "priced")
DEFAULT_METHODS = ("dense", "dense_native", "tda", "two_levels", "griffin")
TOKENS_A_ROUND = 16
PREFILLS = 5
# The largest allowed difference of logits between two ways to compute them, relative to the largest logit. With token
# thresholds, rounding decides which neurons near a threshold are skipped.
TOLERANCES = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1, "float16 cache": 3e-3, "int8 cache": 3e-2}
SECOND_LEVEL_FACTOR = 4.0
GATE_SHARE = 1.4  # two levels keep 1.4 p of gate rows (the mask) and 0.8 p of up and down rows for p of the bytes


@dataclass(frozen=True)
class BenchSettings:
    """What to compare. Lengths in tokens, sparsity as the share of bytes that is not read: of the FFN or, with prices,
    of the layers' linears. `prices`, by name, replace the price that a priced artifact's table gives for the
    sparsity."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    sparsity: float = 0.5
    prompt_tokens: int = 1024
    new_tokens: int = 256
    prices: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise UsageError(f"Unknown method {unknown[0]!r}. Use {', '.join(METHODS)}.")
        if len(set(self.methods)) < len(self.methods):
            raise UsageError("A method is named twice. Name each one once.")
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"Sparsity {self.sparsity} is outside [0, 1).")
        if self.prompt_tokens < 2 or self.new_tokens < TOKENS_A_ROUND:
            raise UsageError(f"Give a prompt of 2 tokens or more, and {TOKENS_A_ROUND} new ones or more.")
        if "two_levels" in self.methods and self.new_tokens < 2 * PROBED_TOKENS:
            raise UsageError(f"two_levels needs {2 * PROBED_TOKENS} new tokens or more, to choose its thresholds on.")


def run_bench(
    artifact: Artifact,
    provider: str,
    settings: BenchSettings,
    prompt: Sequence[int],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, and return plain data: each method by name with `ms_per_token` and more, and `speedup`.

    Args:
        artifact: The artifact on disk.
        provider: `cpu` or `cuda`.
        settings: What to compare.
        prompt: `settings.prompt_tokens` token ids.
        say: Called with a description of each step.

    Raises:
        TdaError: The lengths do not fit the model, or a method's logits are wrong.
    """
    capacity = settings.prompt_tokens + settings.new_tokens
    if capacity > artifact.shape.max_positions:
        raise TdaError(
            f"{settings.prompt_tokens} and {settings.new_tokens} tokens are more than the model's "
            f"{artifact.shape.max_positions} positions. Shorten one of them."
        )
    check_methods(artifact, settings.methods)
    say("Loading")
    sessions = Sessions(artifact, provider)
    from tda_export.bench.masks import MaskBench
    from tda_export.bench.priced import PricedBench

    kind: type[Bench] = PricedBench if artifact.layout == "priced" else MaskBench
    bench = kind(artifact, sessions, settings, list(prompt), capacity)
    say("Checking logits")
    bench.check()
    say("Measuring")
    return bench.measure()


def check_methods(artifact: Artifact, methods: Sequence[str]) -> None:
    """Refuse methods that an artifact does not run.

    Raises:
        UsageError: There is such a method.
    """
    layout = artifact.layout
    if not artifact.one_dtype and "dense" in methods:
        raise UsageError(
            "dense is a graph in the model's dtype, and this artifact has others. Take --method dense_native."
        )
    possible, build = (PRICED_METHODS, "tda") if layout == "priced" else (MASK_METHODS, "priced")
    if foreign := [name for name in methods if name not in possible]:
        raise UsageError(
            f"{foreign[0]} does not run on an artifact of the layout {layout}, which runs {', '.join(possible)}. Build "
            f"one with 'tda-export build MODEL --method {build}'."
        )


def default_methods(artifact: Artifact, new_tokens: int) -> tuple[str, ...]:
    """Return `DEFAULT_METHODS` without those that the artifact has no graph for, or that need more tokens to choose
    thresholds."""
    if artifact.layout == "priced":
        return PRICED_METHODS if artifact.one_dtype else PRICED_METHODS[1:]
    impossible = set() if artifact.one_dtype else {"dense"}
    if not artifact_method(artifact).two_levels or new_tokens < 2 * PROBED_TOKENS:
        impossible.add("two_levels")
    return tuple(name for name in DEFAULT_METHODS if name not in impossible)


class Bench(ABC):
    """Ways of generating from one artifact, by name: checked against slower ways, then timed in turns."""

    def __init__(
        self, artifact: Artifact, sessions: Sessions, settings: BenchSettings, prompt: list[int], capacity: int
    ) -> None:
        self.artifact, self.sessions, self.settings, self.prompt = artifact, sessions, settings, prompt
        self.capacity = capacity
        self.runners: dict[str, Runner] = {}

    @abstractmethod
    def check(self) -> None:
        """Compare each way's logits after the prompt and one token with another way to compute them."""

    @abstractmethod
    def bytes_read(self, name: str) -> tuple[int, int]:
        """Return the bytes that one token reads: of weights that may be skipped, and of all else, including the keys
        and values of a context of middle length."""

    def compare(self, name: str, logits: np.ndarray, expected: np.ndarray, factor: float = 1.0) -> None:
        """Refuse logits that are too far from the expected ones."""
        error = float(np.abs(logits - expected).max() / np.abs(expected).max())
        if not error <= factor * TOLERANCES[self.artifact.shape.precision]:
            raise TdaError(f"{name}: its logits are {error:.1e} from the reference, so nothing was timed.")

    @property
    def other_bytes(self) -> int:
        """The bytes that every token reads: other weights, and keys and values of a context of middle length."""
        artifact = self.artifact
        sizes = artifact_sizes(artifact_spec(artifact), artifact)
        context = self.settings.prompt_tokens + self.settings.new_tokens // 2
        return sizes.read - artifact.sparse_bytes + sizes.cache_read(context)

    def measure(self) -> dict[str, Any]:
        settings, runners = self.settings, self.runners
        rounds = settings.new_tokens // TOKENS_A_ROUND
        prefills = take_turns({name: partial(runners[name].prefill, self.prompt) for name in runners}, 1 + PREFILLS)
        decodes = take_turns({name: partial(_steps, runners[name]) for name in runners}, rounds)
        bandwidth = copy_bandwidth(self.sessions.provider)
        result: dict[str, Any] = {
            "device": device_name(self.sessions.provider),
            "provider": self.sessions.provider,
            "versions": {"tda-export": tda_export.__version__, "onnxruntime": ort.__version__},
            "model": self.artifact.name,
            "dtype": self.artifact.shape.dtype,
            "native": self.sessions.native,
            "prompt_tokens": settings.prompt_tokens,
            "new_tokens": rounds * TOKENS_A_ROUND,
            "copy_gb_per_second": bandwidth,
        }
        for name in runners:
            times = Spread.of([1e3 * seconds / TOKENS_A_ROUND for seconds in decodes[name]])
            firsts = Spread.of([1e3 * seconds for seconds in prefills[name][1:]])
            skippable, other = self.bytes_read(name)
            result[name] = {
                "ms_per_token": times.median,
                "ms_per_token_range": [times.smallest, times.largest],
                "prefill_ms": firsts.median,
                "prefill_ms_range": [firsts.smallest, firsts.largest],
                "sparsity": 1.0 - skippable / self.artifact.sparse_bytes,
                "skippable_bytes_per_token": skippable,
                "bytes_per_token": skippable + other,
                "gb_per_second": (skippable + other) / times.median / 1e6,
                "share_of_copy_bandwidth": (skippable + other) / times.median / 1e6 / bandwidth,
            }
        baseline = next((name for name in ("dense", "dense_native") if name in runners), None)
        for name in runners:
            if baseline and name != baseline:
                ratio = speedup(decodes[baseline], decodes[name])
                result[name]["speedup"] = ratio.median
                result[name]["speedup_range"] = [ratio.smallest, ratio.largest]
        if "speedup" in result.get("tda", {}):
            result["speedup"] = result["tda"]["speedup"]
        return result


def device_name(provider: str) -> str:
    """Name the processor or the GPU."""
    if provider == CUDA:
        import ctypes

        driver = cuda_driver()
        name = ctypes.create_string_buffer(100)
        device = ctypes.c_int()
        if not driver.cuInit(0) and not driver.cuDeviceGet(ctypes.byref(device), 0):
            driver.cuDeviceGetName(name, len(name), device)
        return name.value.decode() or "unknown GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.processor() or platform.machine()}, {cores} cores"


def _steps(runner: Runner) -> None:
    runner.steps(TOKENS_A_ROUND)
