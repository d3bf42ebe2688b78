"""Graphs of other methods, derived from an artifact: they refer to its weights.bin and differ only in their nodes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import onnx_ir as ir

from tda_export.errors import TdaError, first_line, shown
from tda_export.graph import contract
from tda_export.graph.decode import build_decode
from tda_export.graph.dense import build_dense, dense_weight_table
from tda_export.graph.method import Method
from tda_export.graph.ops import DTYPES
from tda_export.graph.prefill import build_prefill
from tda_export.graph.priced import build_priced_decode
from tda_export.graph.subgraph import operators_of
from tda_export.graph.truncation import build_truncation
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec, spec_from_dict
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.session import Sessions, open_session

SHAPE_OF_SPEC = (
    "num_layers",
    "num_kv_heads",
    "head_size",
    "hidden_size",
    "ffn_size",
    "vocab_size",
    "max_positions",
)  # the fields that spec and shape share
UNBUILDABLE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError, AssertionError)


@contextlib.contextmanager
def _of_manifest(artifact: Artifact) -> Iterator[None]:
    """Report a spec that cannot be read or built as an error in the manifest."""
    try:
        yield
    except UNBUILDABLE as error:
        raise TdaError(
            f"{artifact.file(contract.MANIFEST_FILE)}: its spec describes no graph of this artifact "
            f"({first_line(error)}). Build the artifact again."
        ) from error


def artifact_spec(artifact: Artifact) -> DecoderSpec:
    """Read the architecture out of an artifact's manifest.

    Raises:
        TdaError: The architecture is invalid, or does not have the artifact's sizes.
    """
    with _of_manifest(artifact):
        spec = spec_from_dict(artifact.manifest["spec"])
        for name in SHAPE_OF_SPEC:
            if getattr(spec, name) != getattr(artifact.shape, name):
                raise ValueError(f"{name} is {shown(getattr(spec, name))}")
        return spec


def artifact_method(artifact: Artifact) -> Method:
    """Read the method out of an artifact's manifest; fields that this version does not know are ignored."""
    known = {field.name for field in fields(Method)}
    return Method(**{name: value for name, value in artifact.manifest["method"].items() if name in known})


def weight_table(artifact: Artifact) -> WeightTable:
    """List the tensors of an artifact's weights.bin as the graph builder takes them."""
    table = WeightTable({}, artifact.matrices)
    for name, entry in artifact.manifest["weights"].items():
        table[name] = ir.ExternalTensor(
            artifact.weights_file.name,
            entry["offset"],
            contract.tensor_bytes(entry["shape"], entry["dtype"]),
            DTYPES[entry["dtype"]],
            shape=ir.Shape(entry["shape"]),
            name=name,
            base_dir=artifact.weights_file.parent,
        )
    return table


def derived_prefill(artifact: Artifact, method: Method) -> bytes:
    """Build the prefill graph of another method."""
    spec, thresholds = artifact_spec(artifact), np.asarray(artifact.manifest["thresholds"], np.float32)
    with _of_manifest(artifact):
        return _serialised(
            build_prefill(spec, weight_table(artifact), artifact.shape.dtype, method, thresholds, kv=artifact.shape.kv)
        )


def derived_sessions(artifact: Artifact, sessions: Sessions, method: Method) -> Sessions:
    """Return sessions whose prefill chooses prompt masks by another method; decode and weights are the same."""
    model = derived_prefill(artifact, method)
    names = initializer_names(model)
    weights = {name: value for name, value in sessions.shared_weights.items() if name in names}
    other = copy.copy(sessions)
    other.prefill = open_session(artifact, model, sessions.provider, weights, native=sessions.captures)
    other.pads_masks = sessions.captures and method.selection == "threshold"
    return other


def derived_dense(artifact: Artifact) -> bytes:
    """Build the plain dense graph; its session must be given the transposed weights (`graph/dense.py`)."""
    spec = artifact_spec(artifact)
    with _of_manifest(artifact):
        return _serialised(build_dense(spec, dense_weight_table(weight_table(artifact)), artifact.shape.dtype))


def derived_probe(artifact: Artifact) -> bytes:
    """Build the decode graph with every FFN's input among its outputs."""
    spec, method = artifact_spec(artifact), artifact_method(artifact)
    with _of_manifest(artifact):
        return _serialised(
            build_decode(
                spec, weight_table(artifact), artifact.shape.dtype, method, kv=artifact.shape.kv, ffn_inputs=True
            )
        )


def counted_rows(artifact: Artifact) -> bytes:
    """Build the decode graph of a priced artifact that also counts the rows that each token reads."""
    return _priced_decode(artifact, counted=True)


def listed_rows(artifact: Artifact) -> bytes:
    """Build the decode graph of a priced artifact that also returns which rows are worth the price to each token."""
    return _priced_decode(artifact, listed=True)


def _priced_decode(artifact: Artifact, **outputs: bool) -> bytes:
    spec, shape = artifact_spec(artifact), artifact.shape
    like = operators_of(ir.load(artifact.file(contract.DECODE_FILE)).graph)
    with _of_manifest(artifact):
        return _serialised(
            build_priced_decode(spec, weight_table(artifact), shape.dtype, kv=shape.kv, like=like, **outputs)
        )


def derived_counting(artifact: Artifact) -> bytes:
    """Build the decode graph that also counts the neurons that are computed for each token."""
    spec, method = artifact_spec(artifact), artifact_method(artifact)
    with _of_manifest(artifact):
        return _serialised(
            build_decode(spec, weight_table(artifact), artifact.shape.dtype, method, kv=artifact.shape.kv, counted=True)
        )


def counting_sessions(artifact: Artifact, sessions: Sessions) -> Sessions:
    """Return sessions whose decode also counts; weights are the same."""
    model = derived_counting(artifact)
    names = initializer_names(model)
    weights = {name: value for name, value in sessions.shared_weights.items() if name in names}
    other = copy.copy(sessions)
    other.decode = open_session(artifact, model, sessions.provider, weights, native=sessions.native)
    return other


def derived_truncation(artifact: Artifact) -> bytes:
    """Build the threshold-truncation graph."""
    spec = artifact_spec(artifact)
    with _of_manifest(artifact):
        return _serialised(build_truncation(spec, weight_table(artifact), artifact.shape.dtype, kv=artifact.shape.kv))


def truncation_sessions(artifact: Artifact, sessions: Sessions) -> Sessions:
    """Return sessions whose decode truncates by threshold; prefill and weights are the same.

    Decode takes no prompt mask. Without thresholds it keeps every neuron, so it is its own dense reference.
    """
    model = derived_truncation(artifact)
    names = initializer_names(model)
    weights = {name: value for name, value in sessions.shared_weights.items() if name in names}
    other = copy.copy(sessions)
    other.decode = open_session(
        artifact, model, sessions.provider, weights, native=sessions.native, capture=False, prepack=True
    )
    other.captures = other.two_levels = False
    other.dense_inputs = {}
    return other


def initializer_names(model: bytes) -> set[str]:
    """Name the weights that a serialised graph reads."""
    import onnx

    graph = onnx.load_model_from_string(model).graph
    return {tensor.name for tensor in graph.initializer}


def _serialised(model: ir.Model) -> bytes:
    serialised: bytes = ir.to_proto(model).SerializeToString()
    return serialised
