"""Choose where to run: on the CPU, or on CUDA where it works."""

from __future__ import annotations

import contextlib
import ctypes
import io

import onnxruntime as ort

from tda_export.errors import TdaError, UsageError
from tda_export.runtime.cuda_stream import cuda_driver, step_stream

CPU, CUDA = "cpu", "cuda"
EXECUTION_PROVIDERS = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
HALF = ("float16", "bfloat16")
# Bits of ONNX Runtime's option `sdpa_kernel`: FlashAttention, memory-efficient attention, and plain products. cuDNN's
# kernels (8) are left out: they compile a plan for every new number of tokens, for which a new prompt would wait, and
# ONNX Runtime keeps all these plans.
ATTENTION_KERNELS = 1 | 2 | 16


def choose_provider(requested: str, dtype: str) -> str:
    """Resolve `auto`, `cpu` or `cuda` for an artifact of `dtype`.

    `auto` takes CUDA where there is a GPU and the artifact is float16 or bfloat16.

    Raises:
        UsageError: The name is unknown, or the provider cannot run this dtype.
        TdaError: CUDA was requested, but there is no GPU or no CUDA build of ONNX Runtime.
    """
    if requested == "auto":
        requested = CUDA if dtype in HALF and cuda_problem() is None else CPU
    if requested == CUDA:
        if dtype not in HALF:
            raise UsageError(
                "CUDA runs float16 and bfloat16 artifacts; this one is float32. Build it with --dtype fp16, or use "
                "--provider cpu."
            )
        if problem := cuda_problem():
            raise TdaError(f"CUDA cannot be used: {problem}. Use --provider cpu.")
        return CUDA
    if requested == CPU:
        if dtype == "bfloat16":
            raise UsageError("The CPU does not run bfloat16 artifacts. Build one with --dtype fp32.")
        return CPU
    raise UsageError(f"Unknown provider {requested!r}. Use auto, cpu or cuda.")


def cuda_problem() -> str | None:
    """Return why CUDA cannot be used here, or None where it can."""
    if EXECUTION_PROVIDERS[CUDA] not in ort.get_available_providers():
        return "this ONNX Runtime was built without it (install onnxruntime-gpu)"
    try:
        driver = cuda_driver()
    except OSError:
        return "no NVIDIA driver is installed here"
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no GPU here"
    return None


def provider_arguments(provider: str, *, capture: bool = False) -> list[tuple[str, dict[str, str]]]:
    """Return the `providers` argument of an InferenceSession; `capture` turns CUDA graphs on (see `step_stream`)."""
    if provider == CPU:
        return [(EXECUTION_PROVIDERS[CPU], {})]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints advice about libraries that the system may well have
        ort.preload_dlls()
    options = {
        "use_tf32": "0",  # scores are compared with thresholds: keep their full float32 precision
        "enable_skip_layer_norm_strict_mode": "1",  # accumulate norms in float32, as PyTorch does
        "arena_extend_strategy": "kSameAsRequested",
        "sdpa_kernel": str(ATTENTION_KERNELS),
        "enable_cuda_graph": "1" if capture else "0",
    }
    if capture:
        options["user_compute_stream"] = str(step_stream().handle.value)
    return [(EXECUTION_PROVIDERS[CUDA], options), (EXECUTION_PROVIDERS[CPU], {})]
