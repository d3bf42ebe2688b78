"""Sessions of the small models that tests make."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from tda_export.native.library import register_native

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SILENT = 4  # ONNX Runtime logs fatal errors only


def small_session(
    model: bytes, provider: str, *, native: bool = True, threads: int | None = None, **options: Any
) -> ort.InferenceSession:
    """Open a session.

    Args:
        model: The model.
        provider: ONNX Runtime's name of the execution provider.
        native: Register the native kernels.
        threads: Threads, 0 for as many as cores. None is that on the CPU, and one, the caller's, on a GPU, whose tests
            keep hundreds of sessions.
        options: The provider's options.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = SILENT
    settings.enable_cpu_mem_arena = False  # so that a sanitizer sees the end of each tensor
    settings.intra_op_num_threads = int(provider == CUDA) if threads is None else threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")  # several processes share the cores
    if native:
        register_native(settings)
    return ort.InferenceSession(model, settings, providers=[(provider, options)])
