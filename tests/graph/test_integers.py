"""Artifacts of integer weights, of every family, against transformers with the same integers de-quantised."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract, operators
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.integer_linear import (
    integer_functions,
    integer_linear,
    integer_row_linear,
    integer_rows,
)
from tda_export.graph.ops import IR_VERSION, MICROSOFT, OPSET, Ops
from tda_export.graph.priced import PricedDesign
from tda_export.graph.sizes import artifact_sizes
from tda_export.graph.storage import Storage, read_plan, storage_of
from tda_export.graph.stored_integers import stored_codes, with_stored_integers
from tda_export.graph.verify import verify_artifact
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import PACKINGS, Packing, linear_parts
from tda_export.quantization.folder import write_quantised
from tda_export.quantization.nearest import read_matrix, round_matrix
from tda_export.runtime.artifact import open_artifact
from tda_export.weights.formats import INTEGER_FORMATS, IntegerFormat, integer_format
from tda_export.weights.integers import Codes, round_to_nearest
from tda_export.weights.matrix import Matrix
from tda_export.weights.plan import plan_formats, read_rules
from tests.graph.test_priced import random_prices, source_of  # noqa: F401 - a fixture
from tests.tiny import FAMILIES


def rounded(source: ModelSource, *rules: str) -> Storage:
    """Round to four bits in the layers and eight outside, like --weights int4, with rules."""
    return storage_of(source, "float32", read_plan(source, "int4", 32, rules))


def build(source: ModelSource, storage: Storage, output: Path, packing: Packing = "separate") -> Path:
    design = PricedDesign(packing, random_prices(source, packing), 0.0)
    export_artifact(
        BuildRequest(source, storage, design, {"price": 0.0}), output, quiet=True, check=lambda folder: None
    )
    return output


# Whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers(
    family: str,
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = source_of(family)
    packing = PACKINGS[list(FAMILIES).index(family) % 2]
    artifact = build(source, rounded(source), tmp_path / "artifact", packing)
    checks = verify_artifact(artifact, lambda name: source, provider="cpu", quiet=True)
    assert len(checks) == 11
    assert [check for check in checks if not check.passed] == []


def test_bytes_of_integers(source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:  # noqa: F811
    source = source_of("llama")
    artifact = open_artifact(build(source, rounded(source), tmp_path / "artifact"))
    spec = source.spec
    # M = 64, F = 96, heads of 64 outputs, keys and values of 32: rows of 4-bit codes, scales and zero points.
    row = {32: 16 + 2 + 1, 64: 32 + 4 + 1, 96: 48 + 6 + 2}
    attention = 64 * (row[64] + 2 * row[32]) + 64 * row[64]
    ffn = 64 * 2 * row[96] + 96 * row[64]
    assert artifact.linear_bytes == spec.num_layers * (attention + ffn)
    assert artifact.dense_ffn_bytes == spec.num_layers * ffn
    sizes = artifact_sizes(spec, artifact)
    assert (sizes.linears, sizes.ffn) == (artifact.linear_bytes, artifact.dense_ffn_bytes)
    assert artifact.matrices["embedding"].bytes == spec.vocab_size * (64 + 4 + 2)


def test_one_format_of_what_lies_side_by_side(
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = source_of("llama")
    mixed = rounded(source, "*.v=int8")
    with pytest.raises(
        UsageError, match=r"layers\.0\.q, layers\.0\.k, layers\.0\.v have different formats.*separate\.$"
    ):
        build(source, mixed, tmp_path / "artifact", "sites")
    build(source, mixed, tmp_path / "artifact", "separate")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"^layers\.0\.q, layers\.0\.k, layers\.0\.v: the checkpoint has weights that are not finite"),
        (2e6, r"^layers\.0\.q, layers\.0\.k, layers\.0\.v: some weights are too large for scales of int4_g32, which "),
    ],
)
def test_weights_that_cannot_be_rounded(value: float, message: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = resolve_model(str(folder))
    with pytest.raises(TdaError, match=message):
        build(source, rounded(source), tmp_path / "artifact", "sites")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt-neox", "gpt2"])
def test_codes_of_a_quantised_model_are_stored_as_they_are(
    family: str,
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = source_of(family)
    spec = source.spec
    plan = plan_formats(
        spec.num_layers,
        linear_parts(spec),
        tied_head=spec.tied_head,
        weights="int4",
        rules=read_rules(["layers.1.down=int8_g64"]),
    )
    codes = {
        name: round_matrix(name, read_matrix(spec, source.weights(), name), format, symmetric=False)
        for name, format in plan.integers.items()
    }
    write_quantised(source, tmp_path / "model", codes, plan, {})
    quantised = resolve_model(str(tmp_path / "model"))
    folder = build(quantised, storage_of(quantised, "float32"), tmp_path / "artifact")
    artifact = open_artifact(folder)
    for name, expected in codes.items():
        target = name
        if name == "head":  # lies by input channel, so it is rounded again
            rows = torch.from_numpy(expected.decode()).T.contiguous()
            expected = round_matrix(name, rows, expected.format, symmetric=False)
        if name.startswith("layers."):
            _, layer, part = name.split(".")
            target = contract.linear_weight(int(layer), part)
        found = stored_codes(artifact, target)
        assert found.format == expected.format
        for field in ("codes", "scales", "zero_points"):
            assert np.array_equal(getattr(found, field), getattr(expected, field)), name
    checks = verify_artifact(folder, lambda name: quantised, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []
    model = quantised.reference()
    changed = dict(with_stored_integers(model, artifact, quantised).named_parameters())
    others = {name for name, parameter in model.named_parameters() if changed.get(name) is not parameter}
    assert others <= {f"{spec.names.head}.weight"}  # nothing else is in memory twice


# One product


def run_product(
    codes: Codes, x: np.ndarray, row_price: np.ndarray | None, price: float, bias: np.ndarray | None
) -> np.ndarray:
    """Run the function body of one product. Without row prices the matrix is output-major."""
    ops = Ops()
    rows, columns = codes.codes.shape
    matrix = Matrix("w", rows, columns, codes.format, "output" if row_price is None else "input")
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "S", x.shape[2]]))

    def weight(name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
        initializers.append(value)
        return value

    initializers: list[ir.Value] = []
    stored = [weight(tensor.name, array) for tensor, array in zip(matrix.tensors, codes.pack(), strict=True)]
    if row_price is None:
        y = integer_linear(ops, matrix, given, stored)
    else:
        prices = weight("row_price", row_price), weight("price", np.array([price], np.float32))
        y = integer_row_linear(ops, matrix, given, stored, *prices, None if bias is None else weight("bias", bias))
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph([given], [y], nodes=ops.tape.nodes, initializers=initializers, opset_imports=imports, name="g")
    model = ir.Model(graph, ir_version=IR_VERSION, functions=integer_functions([matrix]))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


@st.composite
def products(draw: st.DrawFn) -> tuple[Codes, np.ndarray, np.random.Generator]:
    format = draw(st.sampled_from(list(INTEGER_FORMATS.values())))
    size, seed = (draw(st.integers(1, 40)), draw(st.integers(1, 150))), draw(st.integers(0, 99))
    random = np.random.default_rng(seed)
    codes = round_to_nearest(random.standard_normal(size).astype(np.float32), format, search=False)
    return codes, random.standard_normal((1, draw(st.integers(1, 5)), size[0])).astype(np.float32), random


@settings(max_examples=40)
@given(products(), st.sampled_from([0.0, -1.0, 0.1, 0.5, 3.0, np.inf, np.nan]), st.booleans())
def test_rows_are_read_by_their_price(
    product: tuple[Codes, np.ndarray, np.random.Generator], price: float, biased: bool
) -> None:
    codes, x, random = product
    row_price = random.random(x.shape[2]).astype(np.float32)
    bias = random.standard_normal(codes.codes.shape[1]).astype(np.float32) if biased else None
    kept = np.where(x**2 * row_price < np.float32(price), 0, x)
    expected = kept @ codes.decode() + (0 if bias is None else bias)
    found = run_product(codes, x, row_price, price, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20)
@given(products())
def test_output_major(product: tuple[Codes, np.ndarray, np.random.Generator]) -> None:
    codes, _, random = product
    x = random.standard_normal((1, 2, codes.codes.shape[1])).astype(np.float32)
    np.testing.assert_allclose(run_product(codes, x, None, 0, None), x @ codes.decode().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [integer_format(4), integer_format(8, 64)], ids=lambda format: format.name)
@pytest.mark.parametrize("columns", [64, 33])
def test_rows_are_looked_up(format: IntegerFormat, columns: int) -> None:
    codes = round_to_nearest(np.random.default_rng(0).standard_normal((7, columns)).astype(np.float32), format)
    ops, matrix = Ops(), Matrix("w", 7, columns, format, "output")
    indices = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, "S"]))
    stored = []
    for tensor, array in zip(matrix.tensors, codes.pack(), strict=True):
        value = ir.Value(name=tensor.name, const_value=ir.tensor(array, name=tensor.name))
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
        stored.append(value)
    y = integer_rows(ops, matrix, indices, stored, "float32")
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [indices],
        [y],
        nodes=ops.tape.nodes,
        initializers=stored,
        opset_imports={"": OPSET, MICROSOFT: 1},
        name="g",
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"ids": np.array([[3, 0, 6]])})[0]
    assert np.array_equal(found[0], codes.decode()[[3, 0, 6]])
