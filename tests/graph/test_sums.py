"""Products that add the residual: what becomes of a graph, and the same numbers with and without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tda_export.graph import operators, priced
from tda_export.graph.derive import listed_rows
from tda_export.graph.fused import fuse
from tda_export.graph.linear import linear_functions
from tda_export.graph.ops import IR_VERSION, OPSET, Ops
from tda_export.graph.row_linear import row_linear, row_linear_functions
from tda_export.graph.sums import add_residuals
from tda_export.graph.verify import verify_artifact
from tda_export.models.source import ModelSource
from tda_export.runtime import load
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.scoring import continuation_logits
from tests.graph.test_fused import PROMPT, build, nodes
from tests.graph.test_priced import build_priced, source_of  # noqa: F401
from tests.tiny import FAMILIES

# Families without an RMS norm of a product and a residual: a product is normed or scaled, or has a bias, first.
OTHERS = {"gemma2", "gemma3", "olmo2", "granite", "llama-biases", "opt", "opt-post-norm", "gpt2"}
OTHERS |= {"gpt-neox", "gpt-neox-sequential"}


@pytest.mark.parametrize(("family", "weights"), [*((family, "int4") for family in FAMILIES), ("llama", "float")])
def test_the_same_numbers(
    family: str,
    weights: str,
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the functions' bodies, in a stock ONNX Runtime. At a price, rounding would drop other rows."""
    source = source_of(family)
    sums = build(source, tmp_path / "sums", "sites", weights)
    monkeypatch.setattr(priced, "add_residuals", lambda model: None)
    apart = build(source, tmp_path / "apart", "sites", weights)
    found, expected = (
        continuation_logits(load(folder, provider="cpu"), PROMPT[:-4], PROMPT[-4:]) for folder in (sums, apart)
    )
    np.testing.assert_allclose(found, expected, atol=0.02)
    added = {operators.ROW_LINEAR_ADD, operators.GATED_ROW_LINEAR_ADD, operators.RMS_ROW_LINEAR}
    changed = {name.rstrip("4") for name in nodes(sums)} & added
    assert bool(changed) == (family not in OTHERS)


def pair(case: str, *, columns: int = 64) -> tuple[ir.Model, Callable[[], list[str]]]:
    """A product, and a norm of it and a residual that another product reads; see `test_pairs_that_stay`."""
    ops = Ops()
    half, single = (ir.TensorType(kind) for kind in (ir.DataType.FLOAT16, ir.DataType.FLOAT))
    shapes = {
        "x": [1, 1, 32],
        "residual": [1, 1, columns],
        "norm": [columns],
        "w": [32, columns],
        "row_price": [32],
        "price": [1],
        "next_w": [columns, 32],
        "next_row_price": [columns],
    }
    values = {
        name: ir.Value(name=name, type=single if "price" in name else half, shape=ir.Shape(shape))
        for name, shape in shapes.items()
    }
    x, residual, norm, w, row_price, price, next_w, next_row_price = values.values()
    product = row_linear(ops, x, w, row_price, price)
    if case == "residual":
        residual = ops.op("Neg", residual)
    normed, total = ops.multi(
        operators.ADD_NORM,
        *(product, residual, norm),
        outputs=(True, True),
        domain=operators.FUNCTION_DOMAIN,
        epsilon=1e-6,
        early=int(case != "late"),
    )
    y = row_linear(ops, normed, next_w, next_row_price, price)
    outputs = [y, total]
    if case in ("norm read", "late"):
        outputs.append(ops.op("Neg", normed))
    if case == "two products":
        outputs.append(row_linear(ops, normed, next_w, next_row_price, price))
    if case == "read":
        outputs.append(ops.op("Neg", product))
    if case == "output":
        outputs.append(product)
    for number, value in enumerate(outputs):
        value.name = f"output_{number}"
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(list(values.values()), outputs, nodes=ops.tape.nodes, opset_imports=imports, name="pair")
    model = ir.Model(graph, ir_version=IR_VERSION, functions=[*linear_functions(), *row_linear_functions()])
    fuse(model)
    return model, lambda: [node.op_type for node in model.graph]


@pytest.mark.parametrize("case", ["columns", "residual", "read", "output", "late", "two products"])
def test_pairs_that_stay(case: str) -> None:
    """No whole number of square parts, a residual that is made later, a product that something else reads, a norm whose
    weight may be written late, or one that two products read."""
    model, names = pair(case, columns=72 if case == "columns" else 64)
    before = names()
    assert (operators.NORM_ROW_LINEAR in before) == (case not in ("late", "two products"))
    add_residuals(model)
    assert names() == before


def test_a_pair() -> None:
    model, names = pair("plain")
    add_residuals(model)
    assert names() == [operators.ROW_LINEAR_ADD, operators.RMS_ROW_LINEAR]
    assert [value.name for value in model.graph.outputs] == ["output_0", "output_1"]


def test_a_norm_that_is_read_elsewhere_too() -> None:
    """As in a graph that lists rows: the product adds all the same, and the norm is a node."""
    model, names = pair("norm read")
    add_residuals(model)
    assert sorted(names()) == sorted([operators.ROW_LINEAR_ADD, operators.RMS_NORM, operators.ROW_LINEAR, "Neg"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_artifacts_of_earlier_versions(
    dtype: str,
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Graphs that are derived from them compute norms as they do, so `verify` finds the same rows."""
    source = source_of("llama")
    with monkeypatch.context() as earlier:
        earlier.setattr(priced, "add_residuals", lambda model: None)
        if dtype == "float32":
            earlier.setattr(priced, "NormRowGraphBuilder", priced.RowGraphBuilder)
            earlier.setattr(priced, "fuse", lambda model: None)
        folder = build_priced(source, tmp_path / "artifact", "sites", dtype=dtype)
    found = ir.from_proto(onnx.load_from_string(listed_rows(open_artifact(folder))))
    names = {node.op_type for node in found.graph}
    assert not names & {operators.RMS_NORM, operators.ROW_LINEAR_ADD}
    assert (operators.ADD_NORM in names) == (dtype == "float16")
    checks = verify_artifact(folder, lambda name: source, provider="cpu", quiet=True)
    assert [check for check in checks if not check.passed] == []
