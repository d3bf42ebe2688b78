"""How fast this device copies memory: the ceiling for every measurement."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort

from tda_export.runtime.providers import CUDA, provider_arguments
from tda_export.runtime.session import Call, empty_tensor

CUDA_BYTES, CPU_BYTES = 2 << 30, 256 << 20
REPETITIONS = 10
OPSET, IR_VERSION = 21, 10


def copy_bandwidth(provider: str) -> float:
    """Measure a copy within the provider's memory, in GB/s; bytes read and bytes written both count."""
    return _cuda() if provider == CUDA else _cpu()


def _cuda() -> float:
    """Time one Identity node between two bound buffers, which is a device-to-device copy."""
    import onnx_ir as ir

    floats = CUDA_BYTES // 4
    x = ir.Value(name="x", shape=ir.Shape([floats]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [x])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([floats])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": OPSET}, name="copy")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = ort.InferenceSession(model, providers=provider_arguments(CUDA))
    call = Call(session)
    call.feed("x", empty_tensor((floats,), "float32", CUDA))
    call.write_to("y", empty_tensor((floats,), "float32", CUDA))
    return _best(call.run_only, 2 * CUDA_BYTES)


def _cpu() -> float:
    """Time as many threads as there are cores, each copying its own share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = np.ones(CPU_BYTES // 4, np.float32)
    target = np.zeros_like(source)
    shares = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    with ThreadPoolExecutor(cores) as threads:
        return _best(lambda: list(threads.map(lambda pair: np.copyto(*pair), shares)), 2 * CPU_BYTES)


def _best(copy: object, size: int) -> float:
    assert callable(copy)
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        copy()
        times.append(time.perf_counter() - started)
    return size / min(times) / 1e9
