"""Time products of a prompt's tokens with integers on CUDA, beside the same products with float16 matrices.

    python benchmarks/prompt_products.py [--shape 4096x4096 ..] [--tokens 1024 2048] [--bits 4]

Microseconds a product, median of five rounds (range). Ours runs through RowLinear4 or RowLinear8 in ONNX Runtime, with
a price of 0 that is a constant, as in prefill.onnx, and with one that is an input. Each result is compared with
PyTorch's before it is timed. A round goes over several matrices, of more bytes than the second-level cache holds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from tda_export.native.library import register_native
from tda_export.runtime.providers import CUDA, provider_arguments

SHAPES = ["4096x6144", "4096x4096", "4096x28672", "14336x4096", "4096x12288", "4096x22016", "11008x4096"]
GROUP, ROUNDS = 32, 5
CACHE_BYTES = 200e6  # of all matrices together
LARGEST_ERROR = 4e-3  # relative to the largest result
KINDS = {torch.float16: np.float16, torch.float32: np.float32, torch.uint8: np.uint8}


def session_of(matrices: int, inputs: int, outputs: int, bits: int, *, constant: bool) -> ort.InferenceSession:
    """Open a graph of one product for each matrix; of 0 bits they are ONNX Runtime's, with float16 matrices."""
    half, byte, single = TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.FLOAT
    values = [helper.make_tensor_value_info("x", half, None)]
    constants, nodes = [], []
    if bits:
        values.append(helper.make_tensor_value_info("row_price", single, [inputs]))
        if constant:
            constants.append(helper.make_tensor("price", single, [1], [0.0]))
        else:
            values.append(helper.make_tensor_value_info("price", single, [1]))
    attributes = {"domain": "tda", "columns": outputs, "group": GROUP, "early": 1}
    for i in range(matrices):
        parts = [(f"w{i}", byte), (f"s{i}", half), (f"z{i}", byte)] if bits else [(f"w{i}", half)]
        values += [helper.make_tensor_value_info(name, kind, None) for name, kind in parts]
        names = ["x", *(name for name, _ in parts)]
        if bits:
            nodes.append(helper.make_node(f"RowLinear{bits}", [*names, "row_price", "price"], [f"y{i}"], **attributes))
        else:
            nodes.append(helper.make_node("MatMul", names, [f"y{i}"]))
    results = [helper.make_tensor_value_info(f"y{i}", half, None) for i in range(matrices)]
    graph = helper.make_graph(nodes, "products", values, results, initializer=constants)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("tda", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    register_native(options)
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    return ort.InferenceSession(proto, options, providers=provider_arguments(CUDA))


def runner(
    session: ort.InferenceSession, tensors: dict[str, torch.Tensor], results: list[torch.Tensor]
) -> Callable[[], None]:
    """Return what runs a session on these tensors. Results are written in place."""
    binding = session.io_binding()
    for item in session.get_inputs():
        tensor = tensors[item.name]
        binding.bind_input(item.name, "cuda", 0, KINDS[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    for i, result in enumerate(results):
        binding.bind_output(f"y{i}", "cuda", 0, np.float16, tuple(result.shape), result.data_ptr())
    return lambda: session.run_with_iobinding(binding)


def timed(work: Callable[[], None], matrices: int) -> str:
    work()
    torch.cuda.synchronize()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start) / matrices)
    return f"{statistics.median(times):8.1f} ({min(times):.1f} to {max(times):.1f})"


def elements_of(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, outputs: int
) -> torch.Tensor:
    """Return a matrix in float16, [inputs, outputs]."""

    def numbers(packed: torch.Tensor) -> torch.Tensor:
        return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(1)

    groups = torch.arange(outputs, device="cuda") // GROUP
    difference = numbers(codes)[:, :outputs].float() - numbers(zeros)[:, groups].float()
    return (difference * scales.float()[:, groups]).half()


def measure(inputs: int, outputs: int, tokens: int, bits: int) -> None:
    matrices = max(2, min(8, int(CACHE_BYTES // (inputs * outputs * bits / 8))))
    generator = torch.Generator("cuda").manual_seed(0)
    groups = outputs // GROUP

    def draw_bytes(*shape: int) -> torch.Tensor:
        return torch.randint(256, shape, generator=generator, device="cuda", dtype=torch.uint8)

    x = torch.randn(1, tokens, inputs, generator=generator, device="cuda").half()
    scale = inputs**-0.5 / (1 << bits - 1)
    tensors = {"x": x, "row_price": torch.ones(inputs, device="cuda"), "price": torch.zeros(1, device="cuda")}
    for i in range(matrices):
        tensors[f"w{i}"] = draw_bytes(inputs, outputs * bits // 8)
        tensors[f"s{i}"] = (torch.rand(inputs, groups, generator=generator, device="cuda") + 0.5).mul(scale).half()
        tensors[f"z{i}"] = draw_bytes(inputs, (groups * bits + 7) // 8)
    result = torch.empty(1, tokens, outputs, device="cuda", dtype=torch.float16)
    results = [*([torch.empty_like(result)] * (matrices - 1)), result]
    dense = elements_of(*(tensors[f"{part}{matrices - 1}"] for part in "wsz"), bits, outputs)
    expected = (x[0] @ dense).float()
    print(f"{tokens} tokens, {inputs} -> {outputs}, {matrices} matrices", flush=True)
    floats = [dense, dense.clone()]

    def plain() -> None:
        for i in range(matrices):
            torch.mm(x[0], floats[i % 2], out=result[0])

    print(f"   float16, PyTorch                  {timed(plain, matrices)}")
    stock = session_of(matrices, inputs, outputs, 0, constant=True)
    work = runner(stock, {"x": x} | {f"w{i}": floats[i % 2] for i in range(matrices)}, results)
    print(f"   float16, ONNX Runtime             {timed(work, matrices)}", flush=True)
    for constant in (True, False):
        work = runner(session_of(matrices, inputs, outputs, bits, constant=constant), tensors, results)
        result.fill_(torch.nan)
        torch.cuda.synchronize()
        work()
        torch.cuda.synchronize()
        error = float((result[0].float() - expected).abs().max() / expected.abs().max())
        if not error < LARGEST_ERROR:
            raise SystemExit(f"{error:.1e} from PyTorch's result, so nothing is timed")
        print(
            f"   int{bits}, price {'constant' if constant else 'an input'}              {timed(work, matrices)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="INPUTSxOUTPUTS, outputs a multiple of 64")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "onnxruntime", ort.__version__, "torch", torch.__version__)
    for tokens in options.tokens:
        for shape in options.shape:
            inputs, outputs = map(int, shape.split("x"))
            measure(inputs, outputs, tokens, options.bits)


if __name__ == "__main__":
    main()
