"""The kernels of RowLinear, RowLinear4 and RowLinear8 alone, at several shares of rows read.

    python -m tda_export.bench.row_kernel [--provider cuda|cpu] [--shape 4096x22016 ..] [--density 1 0.5 ..]
        [--weights float|int8|int4] [--group 32] [--json]

Beside them stand the stock product, of floats, and the device's copy bandwidth. One graph holds a node for each of
several matrices, more than a cache holds; all multiply the same x. On CUDA it is captured and replayed. Each result is
compared with PyTorch in float32 before anything is timed. The fixed cost is the time less that of the bytes read at the
copy's bandwidth.
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
from tda_export.graph.integer_linear import integer_functions, integer_row_linear
from tda_export.graph.operators import RowLinearInput
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tda_export.graph.row_linear import row_linear, row_linear_functions
from tda_export.native.library import register_native
from tda_export.runtime.providers import CPU, CUDA, choose_provider, cuda_problem, provider_arguments
from tda_export.weights.formats import DEFAULT_GROUP, FORMATS, GROUPS, IntegerFormat, WeightFormat, integer_format
from tda_export.weights.matrix import Matrix

SHAPES = {
    CUDA: ("4096x22016", "4096x12288", "4096x4096", "11008x4096"),
    CPU: ("576x1536", "576x3072", "1536x576", "896x9728", "4864x896"),
}
DENSITIES = (1.0, 0.7, 0.5, 0.3)
TOTAL_BYTES = {CUDA: 3 << 30, CPU: 600 << 20}  # of all matrices together, so that the start of a graph is negligible
MOST_LAYERS = 200
ALL_TOLERANCES = TOLERANCES | {"float32": 2e-5}
ALL_TORCH_DTYPES = TORCH_DTYPES | {"float32": torch.float32}
STORED_DTYPES = ALL_TORCH_DTYPES | {"uint8": torch.uint8}
BITS = {"int8": 8, "int4": 4}


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
    """Enough matrices [in, out] that no cache holds them, one x [1, 1, in], and row prices [in].

    `format`: the format of the matrices; by default their elements have `dtype`, as x has.
    """

    def __init__(
        self, inputs: int, outputs: int, dtype: str, provider: str, format: WeightFormat | None = None
    ) -> None:
        self.inputs, self.outputs, self.dtype, self.provider = inputs, outputs, dtype, provider
        self.format = format or FORMATS[dtype]
        generator = torch.Generator(provider).manual_seed(0)
        self.row_bytes = self.format.row_bytes(outputs)
        self.layers = min(MOST_LAYERS, max(4, TOTAL_BYTES[provider] // (inputs * self.row_bytes)))
        self.matrices = [Matrix(f"w.{i}", inputs, outputs, self.format, "input") for i in range(self.layers)]

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=provider)

        def draw_stored(name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            if dtype == "uint8":
                return torch.randint(256, shape, generator=generator, device=provider, dtype=torch.uint8)
            # Elements are of the order of inputs ** -0.5, as floats and as a difference of codes times a scale.
            scale = inputs**-0.5 / (1 if self.format.is_float else 1 << self.format.bits - 1)
            return (draw(*shape) * scale).to(STORED_DTYPES[dtype])

        self.x = draw(1, 1, inputs).to(ALL_TORCH_DTYPES[dtype])
        self.stored = {
            tensor.name: draw_stored(tensor.name, tensor.shape, tensor.dtype)
            for matrix in self.matrices
            for tensor in matrix.tensors
        }
        self.row_price = draw(inputs).exp()
        self.worth = self.x[0, 0].float() ** 2 * self.row_price

    def price(self, density: float) -> torch.Tensor:
        """Return the price at which this share of rows is read, float32 [1]; 0 reads all."""
        if density >= 1:
            return torch.zeros(1, device=self.provider)
        return self.worth.sort().values[round((1 - density) * self.inputs)].reshape(1)

    def reference(self, layer: int, price: torch.Tensor) -> torch.Tensor:
        kept = torch.where(self.worth < price, 0, self.x[0, 0].float())
        return kept @ self.elements(layer)

    def elements(self, layer: int) -> torch.Tensor:
        """Return a matrix in float32, [in, out]."""
        stored = [self.stored[tensor.name] for tensor in self.matrices[layer].tensors]
        if not isinstance(self.format, IntegerFormat):
            return stored[0].float()
        codes, scales, zero_points = stored
        groups = torch.arange(self.outputs, device=self.provider) // self.format.group
        differences = (
            unpacked(codes, self.format.bits)[:, : self.outputs] - unpacked(zero_points, self.format.bits)[:, groups]
        )
        return differences * scales.float()[:, groups]


def unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers in each row of bytes, float32, those of padding included."""
    if bits == 8:
        return packed.float()
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).float()


def rows_session(matrices: Matrices, *, stock: bool, early: bool) -> ort.InferenceSession:
    """Open a graph of one node per matrix, all tensors inputs; `stock` uses plain products instead."""
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
    stored = [
        [ir.Value(name=tensor.name, type=ir.TensorType(DTYPES[tensor.dtype])) for tensor in matrix.tensors]
        for matrix in matrices.matrices
    ]

    def product(matrix: Matrix, weights: list[ir.Value]) -> ir.Value:
        if stock:
            return ops.matmul(x, *weights)
        if matrix.format.is_float:
            (weight,) = weights
            return row_linear(ops, x, weight, row_price, price, early=early)
        return integer_row_linear(ops, matrix, x, weights, row_price, price, early=early)

    outputs = [product(matrix, weights) for matrix, weights in zip(matrices.matrices, stored, strict=True)]
    for layer, y in enumerate(outputs):
        y.name, y.type = f"y.{layer}", ir.TensorType(DTYPES[dtype])
    weights = [value for values in stored for value in values]
    inputs = [x, *weights] if stock else [*shared.values(), *weights]
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1, MICROSOFT: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name="rows")
    functions = [] if stock else [*row_linear_functions(), *integer_functions(matrices.matrices)]
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=functions))
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
    """Bind every tensor in place. Returns the binding and the outputs, [layers, 1, 1, out]."""
    tensors = {
        RowLinearInput.X: matrices.x,
        RowLinearInput.ROW_PRICE: matrices.row_price,
        RowLinearInput.PRICE: price,
        **matrices.stored,
    }
    half = np.float16 if matrices.dtype == "float16" else 16
    kinds = {torch.float32: np.float32, torch.uint8: np.uint8, torch.float16: np.float16}
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
        TdaError: A result differs from PyTorch's.
    """
    stock = kernel == "MatMul"
    name = kernel if matrices.format.is_float else operators.row_linear_of(matrices.format.bits)
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
                raise TdaError(f"{kernel}: matrix {layer} is {error:.1e} from PyTorch's result, so nothing was timed.")
    times = median_ms(lambda: session.run_with_iobinding(binding))
    read = int((~(matrices.worth < price) & (matrices.x[0, 0] != 0)).sum()) * matrices.row_bytes
    us = {name: 1e3 * value / matrices.layers for name, value in times.items()}
    rate = read / us["median"] / 1e3
    return Row(
        inputs=matrices.inputs,
        outputs=matrices.outputs,
        density=density,
        kernel=name if early else f"{name}, price late",
        us=us["median"],
        us_min=us["min"],
        us_max=us["max"],
        gb_per_second=rate,
        share=rate / bandwidth,
        fixed_us=us["median"] - read / bandwidth / 1e3,
    )


def measure(
    shapes: list[tuple[int, int]],
    densities: list[float],
    dtype: str,
    provider: str,
    format: WeightFormat | None = None,
) -> dict[str, Any]:
    """Measure every shape (in, out) at every density; reading all rows is also measured with a late price.

    For floats, the stock product is measured too.
    """
    bandwidth = copy_bandwidth(provider)
    rows = []
    for inputs, outputs in shapes:
        matrices = Matrices(inputs, outputs, dtype, provider, format)
        if matrices.format.is_float:
            rows.append(measure_rows(matrices, 1.0, bandwidth, kernel="MatMul"))
        for density in densities:
            rows.append(measure_rows(matrices, density, bandwidth, kernel="RowLinear"))
            rows.append(measure_rows(matrices, density, bandwidth, kernel="RowLinear", early=False))
    return {
        "device": torch.cuda.get_device_name() if provider == CUDA else "CPU",
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "dtype": dtype,
        "weights": (format or FORMATS[dtype]).name,
        "copy_gb_per_second": bandwidth,
        "rows": [asdict(row) for row in rows],
    }


def shape(text: str) -> tuple[int, int]:
    """Read `4096x22016`."""
    first, _, second = text.partition("x")
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write INPUTSxOUTPUTS, such as 4096x22016")
    return int(first), int(second)


def share(text: str) -> float:
    """Read a share above 0, up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction of rows; give a number above 0, up to 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["auto", CPU, CUDA], default="auto")
    parser.add_argument("--dtype", choices=[*contract.DTYPES], help="by default fp16 on CUDA and fp32 on the CPU")
    parser.add_argument("--shape", nargs="+", type=shape, help="INPUTSxOUTPUTS, such as 4096x22016")
    parser.add_argument("--density", nargs="+", type=share, default=DENSITIES, help="shares of rows read")
    parser.add_argument("--weights", choices=["float", *BITS], default="float", help="how weights are stored")
    parser.add_argument("--group", type=int, choices=GROUPS, default=DEFAULT_GROUP, help="integers that share a scale")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    try:
        dtype = contract.DTYPES[options.dtype or ("fp32" if options.provider == CPU or cuda_problem() else "fp16")]
        provider = choose_provider(options.provider, dtype)
        if provider == CPU and dtype != "float32":
            raise UsageError("The kernel on the CPU is float32. Use --dtype fp32.")
        shapes = options.shape or list(map(shape, SHAPES[provider]))
        format = None if options.weights == "float" else integer_format(BITS[options.weights], options.group)
        result = measure(shapes, options.density, dtype, provider, format)
    except TdaError as error:
        parser.exit(2 if isinstance(error, UsageError) else 1, f"{error}\n")
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['device']}, {dtype}, weights {result['weights']}, copy {result['copy_gb_per_second']:.0f} GB/s")
    for row in result["rows"]:
        print(
            f"{row['inputs']:6} -> {row['outputs']:6} density {row['density']:4.2f} {row['kernel']:22} "
            f"{row['us']:8.2f} us ({row['us_min']:.2f} to {row['us_max']:.2f}), {row['gb_per_second']:6.0f} GB/s, "
            f"{row['share']:.2f} of copy, fixed {row['fixed_us']:6.2f} us"
        )


if __name__ == "__main__":
    main()
