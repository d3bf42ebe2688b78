"""Load the integers of an artifact, de-quantised, into transformers: the reference of its kernels."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch

from tda_export.graph import contract
from tda_export.models.layout import checkpoint_order
from tda_export.models.linear_modules import layer_linears
from tda_export.models.source import ModelSource
from tda_export.packing import packed_matrices
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.session import map_weight
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import Codes


def stored_codes(artifact: Artifact, name: str) -> Codes:
    """Read an integer matrix from weights.bin."""
    matrix = artifact.matrices[name]
    assert isinstance(matrix.format, IntegerFormat)
    arrays = [map_weight(artifact, tensor.name) for tensor in matrix.tensors]
    return Codes.unpack(matrix.format, matrix.columns, *arrays)


def with_stored_integers(model: Any, artifact: Artifact, source: ModelSource) -> Any:
    """Return a transformers model with the artifact's integer matrices, de-quantised, as its weights.

    Args:
        model: The artifact's float model, which is returned unchanged where nothing differs.
        artifact: The artifact, of the priced layout or without integers.
        source: The source of the model; a quantised source has the integers already, apart from a head that lies the
            other way.
    """
    of_head = artifact.matrices.get(contract.HEAD)
    stored_major = "output" if source.formats is None else source.formats.head_major
    own_head = of_head is not None and of_head.major != stored_major and not of_head.format.is_float
    if not artifact.has_integers or (source.formats is not None and not own_head):
        return model
    # A source may return the same model object again. Only what changes is copied.
    kept = () if source.formats is None else itertools.chain(model.parameters(), model.buffers())
    spec, changed = source.spec, copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    head = changed.get_output_embeddings()
    if own_head and of_head is not None:  # a parameter of its own, since the head may be tied
        weight = torch.from_numpy(stored_codes(artifact, contract.HEAD).decode()).to(head.weight)
        weight = weight.T.contiguous() if of_head.major == "input" else weight
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
    if source.formats is not None:
        return changed
    stored_parts = packed_matrices(spec, artifact.manifest["packing"])
    with torch.no_grad():
        for layer in range(spec.num_layers):
            linears = layer_linears(changed, spec, layer)
            for stored, parts in stored_parts.items():
                name = contract.linear_weight(layer, stored)
                if artifact.matrices[name].format.is_float:
                    continue
                weight = torch.from_numpy(stored_codes(artifact, name).decode())
                sizes = [linears[part].outputs for part in parts]
                for part, own in zip(parts, weight.split(sizes, dim=1), strict=True):
                    linears[part].set_weight(checkpoint_order(spec, part, own))
        modules = {contract.EMBEDDING: changed.get_input_embeddings()} | ({} if own_head else {contract.HEAD: head})
        for name, module in modules.items():
            if name in artifact.matrices and not artifact.matrices[name].format.is_float:
                module.weight.copy_(torch.from_numpy(stored_codes(artifact, name).decode()))
    return changed
