"""Nodes that become one: what is fused, and the same numbers with and without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tda_export.graph import contract, operators, priced
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.fused import fuse
from tda_export.graph.linear import linear_functions
from tda_export.graph.ops import IR_VERSION, OPSET, Ops
from tda_export.graph.priced import PricedDesign
from tda_export.graph.row_linear import row_linear, row_linear_functions
from tda_export.graph.storage import Storage, read_plan
from tda_export.models.source import ModelSource
from tda_export.packing import Packing
from tda_export.runtime import load
from tda_export.runtime.scoring import continuation_logits
from tests.graph.test_priced import random_prices, source_of  # noqa: F401
from tests.tiny import FAMILIES

PROMPT = list(range(3, 23))


def build(
    source: ModelSource, output: Path, packing: Packing, weights: str, price: float = 0.0, *, head: bool = True
) -> Path:
    storage = Storage("float16", read_plan(source, weights, None, ()))
    design = PricedDesign(packing, random_prices(source, packing, head=head), price)
    export_artifact(
        BuildRequest(source, storage, design, {"price": price}), output, quiet=True, check=lambda folder: None
    )
    return output


def nodes(artifact: Path) -> Counter[str]:
    model = ir.load(artifact / contract.DECODE_FILE)
    return Counter(node.op_type for node in model.graph if node.domain == operators.FUNCTION_DOMAIN)


@pytest.mark.parametrize("weights", ["float", "int4", "int8"])
def test_a_layer_is_five_nodes(
    weights: str,
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
) -> None:
    """With packed sites: the norm goes into what reads it, and so does the gate; the residual into what makes it. The
    first norm adds nothing; the last one goes into the head, which has eight bits beside linears of four."""
    source = source_of("llama")
    layers, form = source.spec.num_layers, {"float": "", "int4": "4", "int8": "8"}[weights]
    found = nodes(build(source, tmp_path / "artifact", "sites", weights))
    of_head = {"float": "", "int4": "8", "int8": "8"}[weights]
    expected = Counter({f"RmsRowLinear{form}": 2 * layers - 1}) + Counter({f"RmsRowLinear{of_head}": 1})
    expected |= {f"RowLinearAdd{form}": layers, f"GatedRowLinearAdd{form}": layers, "Attention": layers}
    expected |= {f"RowLinear{form}": 1}  # the first one, of a norm that adds nothing
    assert found - Counter(CallStart=1, GreedyToken=1) == expected


def test_a_head_that_is_read_whole_is_apart(
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = source_of("llama")
    found = nodes(build(source, tmp_path / "artifact", "sites", "int4", head=False))
    assert found["AddNorm"] == 1  # the last one, which the head reads
    assert found["GatedRowLinear4"] == 1  # what is added to the residual before it
    assert found["Linear8"] == 1


def test_a_norm_that_several_products_read_stays(
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
) -> None:
    source = source_of("llama")
    found = nodes(build(source, tmp_path / "artifact", "separate", "int4"))
    assert found["NormRowLinear4"] == 0
    assert found["AddNorm"] == 2 * source.spec.num_layers - 1  # all but the head's
    assert found["RmsRowLinear8"] == 1
    assert found["GatedRowLinear4"] == source.spec.num_layers - 1  # of two inputs
    assert found["GatedRowLinearAdd4"] == 1


@pytest.mark.parametrize(("weights", "packing"), [("float", "separate"), ("int4", "sites")])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(
    family: str,
    weights: str,
    packing: Packing,
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the functions' bodies, in a stock ONNX Runtime."""
    source = source_of(family)
    monkeypatch.setattr(priced, "add_residuals", lambda model: None)
    fused = build(source, tmp_path / "fused", packing, weights, 0.3)
    with monkeypatch.context() as patched:
        patched.setattr(priced, "fuse", lambda model: None)
        apart = build(source, tmp_path / "apart", packing, weights, 0.3)
    found = [continuation_logits(load(folder, provider="cpu"), PROMPT[:-4], PROMPT[-4:]) for folder in (fused, apart)]
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)


def test_the_graph_is_valid(source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:  # noqa: F811
    """Every function that a node or a body calls is defined once, and ONNX Runtime alone takes the model."""
    artifact = build(source_of("llama"), tmp_path / "artifact", "sites", "int4")
    model = ir.load(artifact / contract.DECODE_FILE)
    called = {node.op_identifier() for node in model.graph if node.domain == operators.FUNCTION_DOMAIN}
    called |= {
        node.op_identifier()
        for function in model.functions.values()
        for node in function
        if node.domain == operators.FUNCTION_DOMAIN
    }
    assert called <= set(model.functions)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    ort.InferenceSession(artifact / contract.DECODE_FILE, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("case", ["fused", "late", "between", "output"])
def test_pairs_that_stay(case: str) -> None:
    """A norm whose weight may be written late, whose sum is read before the product, or that is an output itself."""
    ops = Ops()
    half = ir.TensorType(ir.DataType.FLOAT16)
    names = ("x", "residual", "norm", "w", "row_price", "price")
    values = [ir.Value(name=name, type=half) for name in names]
    x, residual, norm, w, row_price, price = values
    normed, total = ops.multi(
        operators.ADD_NORM,
        *(x, residual, norm),
        outputs=(True, True),
        domain=operators.FUNCTION_DOMAIN,
        epsilon=1e-6,
        early=int(case != "late"),
    )
    between = [ops.op("Neg", total)] if case == "between" else []
    y = row_linear(ops, normed, w, row_price, price)
    outputs = [y, total, *between, *([normed] if case == "output" else [])]
    for number, value in enumerate(outputs):
        value.name = f"output_{number}"
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(values, outputs, nodes=ops.tape.nodes, opset_imports=imports, name="pair")
    model = ir.Model(graph, ir_version=IR_VERSION, functions=[*linear_functions(), *row_linear_functions()])
    fuse(model)
    found = [node.op_type for node in model.graph]
    assert (found == [operators.NORM_ROW_LINEAR]) == (case == "fused")
    assert (operators.ADD_NORM in found) == (case != "fused")
