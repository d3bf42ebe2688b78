"""The IndexedFFN kernel alone on one GPU, beside cuBLAS's three products and the device's copy bandwidth.

    python -m tda_export.bench.kernel [--hidden 4096 --ffn 11008 --dtype fp16 --activation silu --ungated] [--json]

One graph holds a node for each of several layers with weights of their own, more than a second-level cache holds; it is
captured as a CUDA graph and replayed. Each result is compared with PyTorch in float32 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from tda_export.errors import TdaError
from tda_export.graph import contract, operators
from tda_export.graph.ffn import FfnForm, indexed_ffn, indexed_ffn_function
from tda_export.graph.operators import FfnInput
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tda_export.models.ffn_modules import ACTIVATIONS
from tda_export.native.library import register_native
from tda_export.runtime.providers import CUDA, provider_arguments

LAYERS = 12
WARM_UP, REPETITIONS = 5, 30
COPY_BYTES = 4 << 30
SHARED = (FfnInput.X, FfnInput.MASK_INDICES, FfnInput.TOKEN_THRESHOLDS)
GATED_SILU = FfnForm("silu", two_levels=True)
KINDS = {
    FfnInput.MASK_INDICES: "int32",
    FfnInput.NEURON_SCALE: "float32",
    FfnInput.TOKEN_THRESHOLDS: "float32",
}
TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2}
# Share of neurons in the prompt mask, and share of neurons whose up and down rows survive the token threshold.
SETTINGS = {
    "all neurons": (1.0, 1.0),
    "mask 70 %": (0.7, 1.0),
    "mask 50 %": (0.5, 1.0),
    "mask 25 %": (0.25, 1.0),
    "mask 70 %, 40 % of up and down": (0.7, 0.4 / 0.7),
    "mask 50 %, 16 % of up and down": (0.5, 0.16 / 0.5),
}


def median_ms(call: Callable[[], object]) -> dict[str, float]:
    """Time a call that returns when the device has finished, in milliseconds."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def copy_bandwidth() -> float:
    """Measure a device-to-device copy: GB/s, bytes read and bytes written both counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * COPY_BYTES / median_ms(copy)["median"] / 1e6


class Layers:
    """Weights of LAYERS FFNs, and one x that all of them read. `parts` holds weights by part, one tensor per layer."""

    def __init__(self, hidden: int, ffn: int, dtype: str, form: FfnForm) -> None:
        self.hidden, self.ffn, self.dtype, self.form = hidden, ffn, dtype, form
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int, scale: float) -> torch.Tensor:
            drawn = torch.randn(shape, generator=generator, device="cuda") * scale
            return drawn.to(TORCH_DTYPES[dtype])

        self.x = draw(1, 1, hidden, scale=1.0)
        names = contract.FFN_PARTS if form.gated else contract.FFN_PARTS[1:]
        self.parts = {
            part: [draw(ffn, hidden, scale=(ffn if part == "down" else hidden) ** -0.5) for _ in range(LAYERS)]
            for part in names
        }
        self.scales = [down.float().norm(dim=1) for down in self.parts["down"]]
        self.order = torch.randperm(ffn, generator=generator, device="cuda")

    def indices(self, density: float) -> torch.Tensor:
        return self.order[: round(density * self.ffn)].sort().values.int()

    def estimates(self, layer: int, indices: torch.Tensor) -> torch.Tensor:
        return self.activated(layer, indices).abs() * self.scales[layer][indices]

    def activated(self, layer: int, indices: torch.Tensor) -> torch.Tensor:
        first = self.parts[self.form.first_part][layer][indices].float() @ self.x[0, 0].float()
        return ACTIVATIONS[self.form.activation](first)

    def reference(self, layer: int, indices: torch.Tensor, threshold: float) -> torch.Tensor:
        h = self.activated(layer, indices)
        if self.form.gated:
            h = h * (self.parts["up"][layer][indices].float() @ self.x[0, 0].float())
        h = h * (self.estimates(layer, indices) >= threshold)
        return h @ self.parts["down"][layer][indices].float()


def own_inputs(form: FfnForm) -> tuple[str, ...]:
    """Name the inputs that are separate for every node."""
    return tuple(name for name in form.inputs if name not in SHARED)


def kernel_session(dtype: str, form: FfnForm) -> ort.InferenceSession:
    """Open a graph of LAYERS nodes, all tensors inputs, captured on its second run."""
    ops, inputs, outputs = Ops(), {}, []

    def value(name: str, kind: str) -> ir.Value:
        if name not in inputs:
            inputs[name] = ir.Value(name=name, type=ir.TensorType(DTYPES[kind]))
        return inputs[name]

    for layer in range(LAYERS):
        shared = {name: value(name, KINDS.get(name, dtype)) for name in SHARED}
        own = {name: value(f"{name}.{layer}", KINDS.get(name, dtype)) for name in own_inputs(form)}
        y = indexed_ffn(ops, form, layer, shared | own)
        y.name, y.type = f"y.{layer}", ir.TensorType(DTYPES[dtype])
        outputs.append(y)
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(list(inputs.values()), outputs, nodes=ops.tape.nodes, opset_imports=imports, name="kernel")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=(indexed_ffn_function(form),)))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    register_native(options)
    (cuda, settings), cpu = provider_arguments(CUDA)
    providers = [(cuda, settings | {"enable_cuda_graph": "1"}), cpu]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def bound(session: ort.InferenceSession, layers: Layers, indices: torch.Tensor, thresholds: torch.Tensor) -> Any:
    """Bind every tensor in place. Returns the binding and the outputs, float [LAYERS, M]."""
    binding = session.io_binding()
    keep = dict(zip(SHARED, (layers.x, indices, thresholds), strict=True))
    for layer in range(LAYERS):
        parts = (*(weights[layer] for weights in layers.parts.values()), layers.scales[layer])
        for name, tensor in zip(own_inputs(layers.form), parts, strict=True):
            keep[f"{name}.{layer}"] = tensor
    for name, tensor in keep.items():
        kind = {torch.int32: np.int32, torch.float32: np.float32, torch.float16: np.float16}.get(tensor.dtype, 16)
        binding.bind_input(name, "cuda", 0, kind, tuple(tensor.shape), tensor.data_ptr())
    y = torch.full((LAYERS, 1, 1, layers.hidden), torch.nan, dtype=layers.x.dtype, device="cuda")
    for layer in range(LAYERS):
        kind = np.float16 if y.dtype == torch.float16 else 16
        binding.bind_output(f"y.{layer}", "cuda", 0, kind, (1, 1, layers.hidden), y[layer].data_ptr())
    return binding, y, keep


def measure_kernel(layers: Layers, density: float, survivors: float) -> dict[str, Any]:
    """Check one setting and time it: microseconds per layer, FFN bytes and GB/s."""
    indices = layers.indices(density)
    thresholds = torch.zeros(LAYERS, device="cuda")
    read = 0
    for layer in range(LAYERS):
        estimates = layers.estimates(layer, indices)
        if survivors < 1:
            dropped = round((1 - survivors) * len(indices))
            thresholds[layer] = estimates.sort().values[dropped - 1 : dropped + 1].mean()  # between two estimates
        kept = int(((estimates >= thresholds[layer]) & (estimates > 0)).sum())
        read += (len(indices) + (len(layers.parts) - 1) * kept) * layers.hidden * layers.x.element_size()
    session = kernel_session(layers.dtype, layers.form)
    binding, y, keep = bound(session, layers, indices, thresholds)
    for _ in range(3):  # plain, captured, replayed
        y.fill_(torch.nan)
        torch.cuda.synchronize()
        session.run_with_iobinding(binding)
        for layer in range(LAYERS):
            expected = layers.reference(layer, indices, float(thresholds[layer]))
            error = float((y[layer, 0, 0].float() - expected).abs().max() / expected.abs().max())
            if not error <= TOLERANCES[layers.dtype]:
                raise TdaError(f"Layer {layer} is {error:.1e} from PyTorch's result, so nothing was timed.")
    times = median_ms(lambda: session.run_with_iobinding(binding))
    del keep
    return {
        "us_per_layer": {name: 1e3 * value / LAYERS for name, value in times.items()},
        "bytes_per_layer": read // LAYERS,
        "gb_per_second": read / times["median"] / 1e6,
    }


def measure_cublas(layers: Layers) -> dict[str, Any]:
    """Time the products of the dense FFN in cuBLAS, captured as a CUDA graph; no activation function."""
    x = layers.x[0]
    graph = torch.cuda.CUDAGraph()

    def products() -> None:
        for *firsts, down in zip(*layers.parts.values(), strict=True):
            for first in firsts:
                h = x @ first.T
            h @ down

    products()
    with torch.cuda.graph(graph):
        products()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    times = median_ms(replay)
    size = len(layers.parts) * layers.hidden * layers.ffn * layers.x.element_size()
    return {
        "us_per_layer": {name: 1e3 * value / LAYERS for name, value in times.items()},
        "bytes_per_layer": size,
        "gb_per_second": LAYERS * size / times["median"] / 1e6,
    }


def measure(hidden: int, ffn: int, dtype: str, form: FfnForm = GATED_SILU) -> dict[str, Any]:
    """Measure every setting of one shape and form (with two levels, without biases)."""
    bandwidth = copy_bandwidth()
    layers = Layers(hidden, ffn, dtype, form)
    rows = {name: measure_kernel(layers, *setting) for name, setting in SETTINGS.items()}
    rows["cuBLAS, the products alone"] = measure_cublas(layers)
    for row in rows.values():
        row["share_of_copy_bandwidth"] = row["gb_per_second"] / bandwidth
    return {
        "gpu": torch.cuda.get_device_name(),
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "hidden": hidden,
        "ffn": ffn,
        "dtype": dtype,
        "activation": form.activation,
        "gated": form.gated,
        "layers": LAYERS,
        "copy_gb_per_second": bandwidth,
        "settings": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096, help="M, elements")
    parser.add_argument("--ffn", type=int, default=11008, help="F, neurons")
    parser.add_argument("--dtype", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--activation", choices=[*ACTIVATIONS], default="silu")
    parser.add_argument("--ungated", action="store_true", help="up and down alone")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args()
    form = FfnForm(options.activation, gated=not options.ungated, two_levels=True)
    result = measure(options.hidden, options.ffn, contract.DTYPES[options.dtype], form)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['gpu']}, {options.dtype}, M {options.hidden}, F {options.ffn}, ", end="")
    print(f"copy {result['copy_gb_per_second']:.0f} GB/s")
    for name, row in result["settings"].items():
        times = row["us_per_layer"]
        print(
            f"{name:32} {times['median']:7.1f} us a layer ({times['min']:.1f} to {times['max']:.1f}), "
            f"{row['gb_per_second']:5.0f} GB/s, {row['share_of_copy_bandwidth']:.2f} of copy"
        )


if __name__ == "__main__":
    main()
