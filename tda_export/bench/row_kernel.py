"""The RowLinear kernel alone, at several shares of rows read, beside the stock product and the device's copy bandwidth.

    python -m tda_export.bench.row_kernel [--provider cuda|cpu] [--shape 4096x22016 ..] [--density 1 0.5 ..] [--json]

One graph holds a node for each of several matrices, more than a cache holds; all multiply the same x. On CUDA it is
captured and replayed. Each result is compared with PyTorch in float32 before anything is timed. The fixed cost is the
time less that of the bytes read at the copy's bandwidth.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from tda_export.bench.bandwidth import copy_bandwidth
from tda_export.bench.kernel import TOLERANCES, TORCH_DTYPES, median_ms
from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract, operators
from tda_export.graph.operators import RowLinearInput
from tda_export.graph.ops import DTYPES, IR_VERSION, OPSET, Ops
from tda_export.graph.row_linear import row_linear, row_linear_functions
from tda_export.native.library import register_native
from tda_export.runtime.providers import CPU, CUDA, choose_provider, cuda_problem, provider_arguments

SHAPES = {
    CUDA: ("4096x22016", "4096x12288", "4096x4096", "11008x4096"),
    CPU: ("576x1536", "576x3072", "1536x576", "896x9728", "4864x896"),
}
DENSITIES = (1.0, 0.7, 0.5, 0.3)
TOTAL_BYTES = {CUDA: 3 << 30, CPU: 600 << 20}  # of all matrices: the start of a graph should not count
MOST_LAYERS = 200
ALL_TOLERANCES = TOLERANCES | {"float32": 2e-5}
ALL_TORCH_DTYPES = TORCH_DTYPES | {"float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One measurement. Times are microseconds for one matrix; the share is of a copy's bandwidth."""

    inputs: int
    outputs: int
    density: float
    kernel: str
    us: float
    us_min: float
    us_max: float
    gb_per_second: float
    share: float
    fixed_us: float


class Matrices:
    """Enough matrices [in, out] that no cache holds them, one x [1, 1, in], and row prices [in]."""

    def __init__(self, inputs: int, outputs: int, dtype: str, provider: str) -> None:
        self.inputs, self.outputs, self.dtype, self.provider = inputs, outputs, dtype, provider
        generator = torch.Generator(provider).manual_seed(0)
        self.row_bytes = outputs * contract.DTYPE_BYTES[dtype]
        self.layers = min(MOST_LAYERS, max(4, TOTAL_BYTES[provider] // (inputs * self.row_bytes)))

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=provider)

        torch_dtype = ALL_TORCH_DTYPES[dtype]
        self.x = draw(1, 1, inputs).to(torch_dtype)
        self.weights = [(draw(inputs, outputs) * inputs**-0.5).to(torch_dtype) for _ in range(self.layers)]
        self.row_price = draw(inputs).exp()
        self.worth = self.x[0, 0].float() ** 2 * self.row_price

    def price(self, density: float) -> torch.Tensor:
        """The price at which this share of rows is read, float32 [1]; 0 reads all."""
        if density >= 1:
            return torch.zeros(1, device=self.provider)
        return self.worth.sort().values[round((1 - density) * self.inputs)].reshape(1)

    def reference(self, layer: int, price: torch.Tensor) -> torch.Tensor:
        kept = torch.where(self.worth < price, 0, self.x[0, 0].float())
        return kept @ self.weights[layer].float()


def rows_session(matrices: Matrices, *, stock: bool, early: bool) -> ort.InferenceSession:
    """A graph of one node a matrix, everything an input; `stock` has plain products in their place."""
    ops, dtype = Ops(), matrices.dtype
    shared = {
        name: ir.Value(name=name, type=ir.TensorType(DTYPES[kind]))
        for name, kind in (
            (RowLinearInput.X, dtype),
            (RowLinearInput.ROW_PRICE, "float32"),
            (RowLinearInput.PRICE, "float32"),
        )
    }
    x, row_price, price = shared.values()
    weights = [ir.Value(name=f"w.{i}", type=ir.TensorType(DTYPES[dtype])) for i in range(matrices.layers)]
    outputs = [ops.matmul(x, w) if stock else row_linear(ops, x, w, row_price, price) for w in weights]
    for layer, y in enumerate(outputs):
        y.name, y.type = f"y.{layer}", ir.TensorType(DTYPES[dtype])
    if not stock:
        for node in ops.tape.nodes:
            node.attributes.add(ir.AttrInt64("early", int(early)))
    inputs = [x, *weights] if stock else [*shared.values(), *weights]
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name="rows")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[] if stock else row_linear_functions()))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not stock:
        register_native(options)
    providers = provider_arguments(matrices.provider)
    if matrices.provider == CUDA:
        (cuda, settings), *others = providers
        providers = [(cuda, settings | {"enable_cuda_graph": "1"}), *others]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def bound(session: ort.InferenceSession, matrices: Matrices, price: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Bind every tensor where it lies. Returns the binding and the outputs, [layers, 1, 1, out]."""
    tensors = {
        RowLinearInput.X: matrices.x,
        RowLinearInput.ROW_PRICE: matrices.row_price,
        RowLinearInput.PRICE: price,
    } | {f"w.{layer}": weight for layer, weight in enumerate(matrices.weights)}
    half = np.float16 if matrices.dtype == "float16" else 16
    kinds = {torch.float32: np.float32}
    binding = session.io_binding()
    for name in (node.name for node in session.get_inputs()):
        tensor = tensors[name]
        kind = kinds.get(tensor.dtype, half)
        binding.bind_input(name, matrices.provider, 0, kind, tuple(tensor.shape), tensor.data_ptr())
    shape = (1, 1, matrices.outputs)
    y = torch.full((matrices.layers, *shape), torch.nan, dtype=matrices.x.dtype, device=matrices.provider)
    for layer in range(matrices.layers):
        kind = kinds.get(y.dtype, half)
        binding.bind_output(f"y.{layer}", matrices.provider, 0, kind, shape, y[layer].data_ptr())
    return binding, y


def synchronize(provider: str) -> None:
    if provider == CUDA:
        torch.cuda.synchronize()


def measure_rows(matrices: Matrices, density: float, bandwidth: float, *, kernel: str, early: bool = True) -> Row:
    """Check one kernel at one density and time it. `kernel` is `RowLinear` or `MatMul`, the stock product.

    Raises:
        TdaError: A result is not PyTorch's.
    """
    stock = kernel == "MatMul"
    price = matrices.price(density)
    session = rows_session(matrices, stock=stock, early=early)
    binding, y = bound(session, matrices, price)
    for _ in range(3):  # on CUDA plain, captured, replayed
        y.fill_(torch.nan)
        synchronize(matrices.provider)
        session.run_with_iobinding(binding)
        for layer in range(matrices.layers):
            expected = matrices.reference(layer, price)
            error = float((y[layer, 0, 0].float() - expected).abs().max() / expected.abs().max())
            if not error <= ALL_TOLERANCES[matrices.dtype]:
                raise TdaError(f"{kernel}: matrix {layer} is {error:.1e} from PyTorch's result, so nothing is timed.")
    times = median_ms(lambda: session.run_with_iobinding(binding))
    read = int((~(matrices.worth < price) & (matrices.x[0, 0] != 0)).sum()) * matrices.row_bytes
    us = {name: 1e3 * value / matrices.layers for name, value in times.items()}
    rate = read / us["median"] / 1e3
    return Row(
        inputs=matrices.inputs,
        outputs=matrices.outputs,
        density=density,
        kernel=kernel if stock or early else f"{kernel}, price late",
        us=us["median"],
        us_min=us["min"],
        us_max=us["max"],
        gb_per_second=rate,
        share=rate / bandwidth,
        fixed_us=us["median"] - read / bandwidth / 1e3,
    )


def measure(shapes: list[tuple[int, int]], densities: list[float], dtype: str, provider: str) -> dict[str, Any]:
    """Measure every shape (in, out) at every density; all rows also with the price late, and by the stock product."""
    bandwidth = copy_bandwidth(provider)
    rows = []
    for inputs, outputs in shapes:
        matrices = Matrices(inputs, outputs, dtype, provider)
        rows.append(measure_rows(matrices, 1.0, bandwidth, kernel="MatMul"))
        for density in densities:
            rows.append(measure_rows(matrices, density, bandwidth, kernel="RowLinear"))
            rows.append(measure_rows(matrices, density, bandwidth, kernel="RowLinear", early=False))
    return {
        "device": torch.cuda.get_device_name() if provider == CUDA else "CPU",
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "dtype": dtype,
        "copy_gb_per_second": bandwidth,
        "rows": [asdict(row) for row in rows],
    }


def shape(text: str) -> tuple[int, int]:
    """Read `4096x22016`."""
    first, _, second = text.partition("x")
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write INPUTSxOUTPUTS, such as 4096x22016")
    return int(first), int(second)


def share(text: str) -> float:
    """Read a share above 0, up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of rows; give a number above 0, up to 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["auto", CPU, CUDA], default="auto")
    parser.add_argument("--dtype", choices=[*contract.DTYPES], help="by default fp16 on CUDA and fp32 on the CPU")
    parser.add_argument("--shape", nargs="+", type=shape, help="INPUTSxOUTPUTS, such as 4096x22016")
    parser.add_argument("--density", nargs="+", type=share, default=DENSITIES, help="shares of rows read")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    try:
        dtype = contract.DTYPES[options.dtype or ("fp32" if options.provider == CPU or cuda_problem() else "fp16")]
        provider = choose_provider(options.provider, dtype)
        if provider == CPU and dtype != "float32":
            raise UsageError("The kernel on the CPU is float32. Use --dtype fp32.")
        result = measure(options.shape or list(map(shape, SHAPES[provider])), options.density, dtype, provider)
    except TdaError as error:
        parser.exit(2 if isinstance(error, UsageError) else 1, f"{error}\n")
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['device']}, {dtype}, copy {result['copy_gb_per_second']:.0f} GB/s")
    for row in result["rows"]:
        print(
            f"{row['inputs']:6} -> {row['outputs']:6} density {row['density']:4.2f} {row['kernel']:22} "
            f"{row['us']:8.2f} us ({row['us_min']:.2f} to {row['us_max']:.2f}), {row['gb_per_second']:6.0f} GB/s, "
            f"{row['share']:.2f} of copy, fixed {row['fixed_us']:6.2f} us"
        )


if __name__ == "__main__":
    main()
