"""The graphs keep the contract, and only the contract module spells its names."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

import tda_export
from tda_export.graph import contract
from tda_export.runtime.artifact import open_artifact

PACKAGE = Path(tda_export.__file__).parent
Listed = Callable[..., list[contract.IoTensor]]
GRAPHS: dict[str, tuple[Listed, Listed]] = {
    contract.PREFILL_FILE: (contract.prefill_inputs, contract.prefill_outputs),
    contract.DECODE_FILE: (functools.partial(contract.decode_inputs, two_levels=True), contract.decode_outputs),
    contract.EXPLICIT_DECODE_FILE: (
        functools.partial(contract.decode_inputs, two_levels=True, explicit=True),
        contract.decode_outputs,
    ),
}
PRICED_GRAPHS: dict[str, tuple[Listed, Listed]] = {
    contract.PREFILL_FILE: (contract.priced_prefill_inputs, contract.dense_outputs),
    contract.DECODE_FILE: (contract.priced_decode_inputs, contract.priced_decode_outputs),
    contract.EXPLICIT_DECODE_FILE: (
        functools.partial(contract.priced_decode_inputs, explicit=True),
        contract.priced_decode_outputs,
    ),
}
Built = tuple[Path, dict[str, tuple[Listed, Listed]]]
ONNX_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}


@pytest.fixture(params=["indexed", "priced"])
def built(request: pytest.FixtureRequest) -> Built:
    """An artifact of each layout, and the contract of its graphs."""
    name, graphs = {"indexed": ("tiny_artifact", GRAPHS), "priced": ("priced_artifact", PRICED_GRAPHS)}[request.param]
    folder = request.getfixturevalue(name)
    assert open_artifact(folder).layout == request.param
    return folder, graphs


@pytest.mark.parametrize("file", contract.GRAPH_FILES)
def test_graph_has_exactly_the_inputs_and_outputs_of_the_contract(file: str, built: Built) -> None:
    folder, graphs = built
    artifact = open_artifact(folder)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    inputs, outputs = (part(artifact.shape) for part in graphs[file])
    needed = [tensor for tensor in inputs if not tensor.default]
    defaulted = {tensor.name: tensor for tensor in inputs if tensor.default}
    assert [(node.name, node.type) for node in session.get_inputs()] == [
        (tensor.name, ONNX_TYPES[tensor.dtype]) for tensor in needed
    ]
    assert {node.name: node.type for node in session.get_overridable_initializers()} == {
        name: ONNX_TYPES[tensor.dtype] for name, tensor in defaulted.items()
    }
    assert [(node.name, node.type, tuple(node.shape)) for node in session.get_outputs()] == [
        (tensor.name, ONNX_TYPES[tensor.dtype], tensor.axes) for tensor in outputs
    ]


def test_manifest_repeats_the_contract(built: Built) -> None:
    folder, graphs = built
    artifact = open_artifact(folder)
    assert set(artifact.manifest["io"]) == set(graphs)
    for file, (inputs, outputs) in graphs.items():
        io = artifact.manifest["io"][file]
        for listed, tensors in ((io["inputs"], inputs(artifact.shape)), (io["outputs"], outputs(artifact.shape))):
            assert [entry["name"] for entry in listed] == [tensor.name for tensor in tensors]


def external_tensors(path: Path) -> dict[str, tuple[int, int]]:
    """Return offset and length in weights.bin of each external initializer."""
    model = onnx.load(path, load_external_data=False)
    tensors = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == contract.WEIGHTS_FILE
            tensors[tensor.name] = (int(entry["offset"]), int(entry["length"]))
    return tensors


def test_no_weight_of_a_layer_is_stored_twice(built: Built) -> None:
    folder, _ = built
    artifact = open_artifact(folder)
    shape = artifact.shape
    graphs = {file: external_tensors(folder / file) for file in GRAPHS}
    names = [name for name in artifact.matrices if contract.in_a_layer(name)]
    assert len(names) == shape.num_layers * (7 if artifact.layout == "priced" else 5)
    for name in names:
        places = {tensors[name] for tensors in graphs.values()}
        assert len(places) == 1, f"{name} lies at {places}"
    every = {name: place for tensors in graphs.values() for name, place in tensors.items()}
    ends = 0
    for offset, length in sorted(every.values()):
        assert offset >= ends, "two tensors overlap"
        ends = offset + length
    # The file has these tensors, with less than a page of padding for each, so there is no second copy.
    assert 0 <= (folder / contract.WEIGHTS_FILE).stat().st_size - sum(n for _, n in every.values()) < 4096 * len(every)
    for file in GRAPHS:  # and no graph file has one
        largest = max(shape.hidden_size * shape.ffn_size, 1) * 4
        model = onnx.load(folder / file, load_external_data=False)
        assert all(len(tensor.raw_data) < largest for tensor in model.graph.initializer)


def test_manifest_places_weights_where_the_graphs_do(built: Built) -> None:
    folder, _ = built
    manifest = json.loads((folder / contract.MANIFEST_FILE).read_text())
    for file in GRAPHS:
        tensors = external_tensors(folder / file)
        assert set(manifest["graph_weights"][file]) == set(tensors)
        for name, (offset, _) in tensors.items():
            assert manifest["weights"][name]["offset"] == offset


def literals(path: Path) -> set[str]:
    """Return every string constant of a module except docstrings, with the parts of f-strings."""
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    }


def test_tensor_names_are_spelled_in_the_contract_module_only() -> None:
    shape = contract.ModelShape(2, 1, 16, 8, 8, 8, 8, "float32")
    spelled = {
        tensor.name.split(".")[0]
        for graphs in (GRAPHS, PRICED_GRAPHS)
        for listed in (*graphs[contract.PREFILL_FILE], *graphs[contract.DECODE_FILE])
        for tensor in listed(shape)
    } - {"logits", "present", "thresholds", "token_thresholds", "price"}  # also plain English words, manifest fields
    spelled |= {"past_key_values.", "present.", "layers.", "cos_cache", "sin_cache"}
    assert len(spelled) > 12
    for path in PACKAGE.rglob("*.py"):
        names = path.name in ("contract.py", "weight_names.py", "operators.py")
        if names or path.parts[-2] in ("models", "weights"):  # where names of checkpoints and formats belong
            continue
        for literal in literals(path):
            # A message may mention an option such as --mask. A name is a whole literal, or begins one.
            found = [name for name in spelled if literal == name or (literal.startswith(name) and name.endswith("."))]
            assert not found, f"{path.name} spells {found} in {literal!r}"
