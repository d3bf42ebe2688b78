"""`tda::Subgraph`: which nodes it takes, and the same bits with and without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.graph import contract, kv_formats, operators, priced
from tda_export.graph.export import BuildRequest, export_artifact
from tda_export.graph.linear import linear_functions
from tda_export.graph.ops import IR_VERSION, OPSET, Ops
from tda_export.graph.priced import PricedDesign
from tda_export.graph.storage import Storage, read_plan
from tda_export.graph.subgraph import NODES, group, operators_of
from tda_export.models.source import ModelSource
from tda_export.packing import Packing
from tda_export.runtime import load
from tda_export.runtime.scoring import continuation_logits
from tests.graph.test_priced import build_priced, random_prices, source_of  # noqa: F401
from tests.sessions import CPU, SILENT, small_session
from tests.tiny import FAMILIES

PROMPT = list(range(3, 23))


def build(source: ModelSource, output: Path, packing: Packing, weights: str, kv: str = kv_formats.KV_FLOAT) -> Path:
    storage = Storage("float32", read_plan(source, weights, None, ()))
    design = PricedDesign(packing, random_prices(source, packing), 0.3)
    request = BuildRequest(source, storage, design, {"price": 0.3}, kv=kv)
    export_artifact(request, output, quiet=True, check=lambda folder: None)
    return output


def decode_of(artifact: Path) -> ir.Model:
    return ir.load(artifact / contract.DECODE_FILE)


def subgraphs(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == operators.SUBGRAPH]


@pytest.mark.parametrize(
    ("native", "weights", "packing", "kv"),
    [
        (True, "float", "separate", "float"),
        (True, "int4", "sites", "int8"),
        (False, "int8", "sites", "float16"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(
    family: str,
    native: bool,
    weights: str,
    packing: Packing,
    kv: str,
    source_of: Callable[[str], ModelSource],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the native library, and by the function's body."""
    if not native:
        monkeypatch.setattr("tda_export.runtime.session._native_problem", lambda *_: "switched off")
    source = source_of(family)
    together = build(source, tmp_path / "together", packing, weights, kv)
    with monkeypatch.context() as patched:
        patched.setattr(priced, "group", lambda model: model)
        apart = build(source, tmp_path / "apart", packing, weights, kv)
    assert subgraphs(decode_of(together))
    assert not subgraphs(decode_of(apart))
    assert operators_of(decode_of(together).graph) - {operators.SUBGRAPH} == operators_of(decode_of(apart).graph)
    models = [load(folder, provider="cpu") for folder in (together, apart)]
    assert {model.sessions.native for model in models} == {native}
    for split in (-4, -1):  # four tokens in one call, and one
        found = [continuation_logits(model, PROMPT[:split], PROMPT[split:]) for model in models]
        assert np.isfinite(found[0]).all()
        np.testing.assert_array_equal(*found)


def test_all_nodes_with_kernels_are_one(source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:  # noqa: F811
    """What is left are operators of ONNX Runtime's ahead of the layers."""
    model = decode_of(build(source_of("llama"), tmp_path / "artifact", "sites", "int4"))
    assert [node.op_type for node in model.graph if node.domain == operators.FUNCTION_DOMAIN] == ["Subgraph"]
    assert list(model.graph)[-1].op_type == operators.SUBGRAPH
    lines = subgraphs(model)[0].attributes[NODES].as_string().splitlines()
    assert lines[0].startswith("CallStart i0,i1,i2 v0,v1,v2")
    assert lines[-1].startswith("GreedyToken o")


def test_half_precision_has_none(source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:  # noqa: F811
    artifact = build_priced(source_of("llama"), tmp_path / "artifact", "sites", dtype="float16")
    assert not subgraphs(decode_of(artifact))


def test_the_graph_is_valid(source_of: Callable[[str], ModelSource], tmp_path: Path) -> None:  # noqa: F811
    """ONNX Runtime alone takes the model, and bodies call nothing of this project's."""
    artifact = build(source_of("gemma2"), tmp_path / "artifact", "sites", "int4")
    model = decode_of(artifact)
    for node in subgraphs(model):
        body = model.functions[node.op_identifier()]
        assert operators.FUNCTION_DOMAIN not in {inner.domain for inner in body}
        assert len(node.inputs) == len(body.inputs)
    options = ort.SessionOptions()
    options.log_severity_level = SILENT
    ort.InferenceSession(artifact / contract.DECODE_FILE, options, providers=[CPU])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_groups_of_any_graph(data: st.DataObject) -> None:
    """Nodes in any order that the values allow: the graph stays in order, and computes what it did.

    A norm of AddNorm has a kernel, and Tanh has none.
    """
    ops, half = Ops(), ir.TensorType(ir.DataType.FLOAT)
    inputs = [ir.Value(name=name, type=half) for name in ("a", "b", "weight")]
    values = inputs[:2]
    kinds = data.draw(st.lists(st.booleans(), min_size=1, max_size=12))
    for kernel in kinds:
        x, residual = (values[data.draw(st.integers(max(0, len(values) - 5), len(values) - 1))] for _ in range(2))
        if kernel:
            values += ops.multi(
                operators.ADD_NORM,
                *(x, residual, inputs[2]),
                outputs=(True, True),
                domain=operators.FUNCTION_DOMAIN,
                epsilon=1e-5,
            )
        else:
            values.append(ops.op("Tanh", x))
    outputs = [value for value in values[2:] if not value.uses() or data.draw(st.booleans())]
    for place, value in enumerate(outputs):
        value.name, value.type = f"output_{place}", half
    imports = {"": OPSET, "com.microsoft": 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=ops.tape.nodes, opset_imports=imports, name="any")
    model = ir.Model(graph, ir_version=IR_VERSION, functions=linear_functions())
    before = ir.to_proto(model).SerializeToString()
    group(model)
    after = ir.to_proto(model).SerializeToString()

    alone = [node for node in model.graph if node.op_type == operators.ADD_NORM]
    inside = sum(len(node.attributes[NODES].as_string().splitlines()) for node in subgraphs(model))
    assert len(alone) + inside == sum(kinds)
    made = set(inputs)
    for node in model.graph:
        assert made.issuperset(node.inputs)
        made |= set(node.outputs)
    rng = np.random.default_rng(0)
    feeds = {
        value.name: rng.standard_normal((1, 2, 8) if value is not inputs[2] else 8).astype("f4") for value in inputs
    }
    for native in (True, False):
        found = [small_session(text, CPU, native=native).run(None, feeds) for text in (before, after)]
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)
