"""docs/artifact-format.md has exactly the names of the contract, with their dtypes and axes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tda_export.graph import contract, kv_formats, operators
from tests.graph.test_manifest_schema import SCHEMA

DOCUMENT = (Path(__file__).parents[2] / "docs" / "artifact-format.md").read_text(encoding="utf-8")
# All sizes differ, so that a size identifies its axis.
SHAPE = contract.ModelShape(17, 3, 5, 7, 11, 13, 19, "float16")
AXES = {1: "1", 2: "2", 17: "L", 3: "KV", 5: "D", 7: "M", 11: "F", 13: "V"} | {
    "sequence_length": "S",
    "past_sequence_length": "P",
    "total_sequence_length": "T",
    "num_mask_indices_0": "K",
}
CODES = dataclasses.replace(SHAPE, kv=kv_formats.KV_INT8)
TABLES = {  # by the headings of their sections
    f"{contract.PREFILL_FILE}, priced": (contract.priced_prefill_inputs(SHAPE), contract.dense_outputs(SHAPE)),
    f"{contract.DECODE_FILE}, priced": (contract.priced_decode_inputs(SHAPE), contract.priced_decode_outputs(SHAPE)),
    f"{contract.PREFILL_FILE}, indexed": (contract.prefill_inputs(SHAPE), contract.prefill_outputs(SHAPE)),
    f"{contract.DECODE_FILE}, indexed": (
        contract.decode_inputs(SHAPE, two_levels=True),
        contract.decode_outputs(SHAPE),
    ),
}


# Changes by keys and values of 8 bits. Dense graphs have only these, tokens and logits.
TABLES["Keys and values of 8 bits"] = (contract.dense_inputs(CODES)[2:], contract.dense_outputs(CODES)[1:])


def by_layer(name: str) -> str:
    return name.replace(".0.", ".{i}.").replace(".0", ".{i}")


def rows(tensors: Sequence[contract.IoTensor]) -> list[tuple[str, ...]]:
    """Return the table of a list of tensors, with one row for all layers."""
    wanted = [tensor for tensor in tensors if not re.search(r"\.[1-9]", tensor.name)]
    return [
        (
            f"`{by_layer(tensor.name)}`{'*' if tensor.default else ''}",
            "model" if tensor.dtype == SHAPE.dtype else tensor.dtype,
            f"[{', '.join(AXES[axis] for axis in tensor.axes)}]",
        )
        for tensor in wanted
    ]


def written_tables(heading: str) -> list[list[tuple[str, ...]]]:
    """Return the tables of a section: name, dtype and axes of each row."""
    section = DOCUMENT.split(f"\n### {heading}\n")[1].split("\n#")[0]
    tables: list[list[tuple[str, ...]]] = []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0] in ("input", "output"):
            tables.append([])
        elif cells and not cells[0].startswith("-"):
            tables[-1].append(tuple(cells[:3]))
    return tables


@pytest.mark.parametrize("heading", TABLES)
def test_tables_are_the_contract(heading: str) -> None:
    assert written_tables(heading) == [rows(tensors) for tensors in TABLES[heading]]


def schema_names(schema: object) -> set[str]:
    """Return every property and choice of the manifest's schema."""
    if isinstance(schema, list):
        return set().union(*map(schema_names, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    names = set(schema.get("properties", {})) | {value for value in schema.get("enum", []) if isinstance(value, str)}
    return names.union(*map(schema_names, schema.values())) if schema else names


def weight_names() -> set[str]:
    norms = (contract.attention_norm, contract.ffn_norm)
    names = {name(0) for name in (*norms, contract.down_squared_norms, contract.neuron_scale)}
    stored = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
    names |= {contract.linear_weight(0, name) for name in stored}
    plain = {contract.EMBEDDING, contract.HEAD, contract.FINAL_NORM, contract.COS_CACHE, contract.SIN_CACHE}
    return plain | {by_layer(name) for name in names}


ENDINGS = (contract.linear_bias, contract.row_price, "{}.scales".format, "{}.zero_points".format)


def beside(names: set[str]) -> set[str]:
    """Return the tensors beside matrices in weights.bin, which the document names by their endings."""
    return {of(name) for name in names if "{i}" in name or name in ("embedding", "head") for of in ENDINGS}


def tensor_names() -> set[str]:
    return {by_layer(tensor.name) for lists in TABLES.values() for tensors in lists for tensor in tensors}


QUOTED = set(re.findall(r"`([^`\n]+)`", DOCUMENT))


def test_every_weight_and_file_appears() -> None:
    assert weight_names() <= QUOTED
    assert QUOTED.issuperset(of("") for of in ENDINGS)
    files = {getattr(contract, name) for name in dir(contract) if name.endswith("_FILE")}
    assert len(files) == 10
    assert files <= QUOTED


def test_every_property_of_the_manifest_appears() -> None:
    missing = set(SCHEMA["properties"]) - QUOTED
    assert not missing
    parts = {name: SCHEMA["properties"][name] for name in ("model", "shape", "refresh", "price_table")}
    parts |= {name: SCHEMA["$defs"][name] for name in ("mask_method", "price_row")}
    for name, part in parts.items():
        properties = set(part["properties"]) - QUOTED
        assert not properties, name


def test_every_name_exists() -> None:
    """A quoted word with an underscore, or with a layer, must be a name of the contract or of an artifact's file."""
    elsewhere = {"bind_cpu_input", "bind_ortvalue_input", "past_present_share_buffer"}  # ONNX Runtime's, GenAI's
    elsewhere |= {"set_model_input", "metadata_props"}
    weights = weight_names() | beside(weight_names()) | {of("") for of in ENDINGS}
    known = tensor_names() | weights | schema_names(SCHEMA) | {operators.FfnInput.NEURON_SCALE} | elsewhere
    names = {word for word in QUOTED if re.fullmatch(r"[a-z_.{}]+", word) and ("_" in word or "{i}" in word)}
    files = {word for word in names if re.search(r"\.(onnx|json|jinja|bin|safetensors)$", word)}
    assert len(names - files) > 40
    assert names - files <= known


@pytest.mark.parametrize("built", ["tiny_artifact", "priced_artifact", "integer_artifact"])
def test_tiny_artifacts_have_no_other_weights(built: str, request: pytest.FixtureRequest) -> None:
    manifest = json.loads((request.getfixturevalue(built) / contract.MANIFEST_FILE).read_text())
    stored = {by_layer(name) for name in manifest["weights"] if not re.search(r"\.[1-9]", name)}
    assert stored <= weight_names() | beside(weight_names())
    assert set(manifest["files"]) | {contract.MANIFEST_FILE} <= QUOTED


def test_versions_are_those_of_the_contract() -> None:
    assert DOCUMENT.startswith(f"# Artifact format {contract.FORMAT_VERSION}\n")
    assert f"\n- {contract.FORMAT_VERSION}: " in DOCUMENT
