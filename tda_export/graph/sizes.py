"""The bytes that a decoder's weights and cache take, and the bytes that one token reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.graph.decoder import model_shape
from tda_export.graph.storage import Storage
from tda_export.graph.weight_plan import PricedRows, plan_weights
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, linear_shape, packed_matrices
from tda_export.runtime.artifact import Artifact
from tda_export.weights.matrix import Matrix

# Matrices of a layer, in every packing.
ATTENTION_MATRICES = ("q", "k", "v", "qkv", "o")
FFN_MATRICES = ("gate", "up", "gate_up", "down")
LINEAR_MATRICES = (*ATTENTION_MATRICES, *FFN_MATRICES)


@dataclass(frozen=True)
class Sizes:
    """Sizes in bytes. `stored`: all weights. `read`: weights that a dense decode step reads. `linears`: the layers'
    linears among them; `ffn`: the FFN's linears (without biases, as sparsity counts). `cache_row`: one token's key and
    value in one layer. `formats`: names of the formats of the linears."""

    stored: int
    read: int
    linears: int
    ffn: int
    cache_row: int
    windows: tuple[int | None, ...]
    formats: tuple[str, ...]

    def cache(self, context: int) -> int:
        """Return the bytes of the keys and values of `context` tokens."""
        return len(self.windows) * context * self.cache_row

    def cache_read(self, context: int) -> int:
        """Return the bytes of keys and values that a step reads; layers with a window read at most the window."""
        return sum(min(window or context, context) for window in self.windows) * self.cache_row

    def ceiling(self, sparsity: float, context: int, *, linears: bool = False) -> float:
        """Return the highest speedup over dense that decode can have at a sparsity, if only bytes took time.

        Args:
            sparsity: The share of the FFN's bytes that is not read.
            context: The number of tokens in the cache.
            linears: Whether the sparsity counts all linears instead.
        """
        dense = self.read + self.cache_read(context)
        return dense / (dense - sparsity * (self.linears if linears else self.ffn))


def weight_sizes(
    spec: DecoderSpec, weights: Mapping[str, int], matrices: Mapping[str, Matrix], shape: ModelShape
) -> Sizes:
    """Group the weights of an artifact by what a token reads of them.

    Args:
        spec: The architecture.
        weights: Bytes of tensors by name, as in weights.bin.
        matrices: The matrices of the tensors, by name.
        shape: The artifact's dtype, and how keys and values are stored.
    """
    looked_up = {*contract.ROPE_CACHES, *contract.LOCAL_ROPE_CACHES, contract.POSITIONS}  # one row of each is read
    if contract.HEAD in matrices:
        looked_up |= {tensor.name for tensor in matrices[contract.EMBEDDING].tensors}
    ffn = attention = 0
    formats: set[str] = set()
    for layer in range(spec.num_layers):
        of_layer = {stored: matrices.get(contract.linear_weight(layer, stored)) for stored in LINEAR_MATRICES}
        sizes = {stored: matrix.bytes for stored, matrix in of_layer.items() if matrix is not None}
        formats |= {matrix.format.name for matrix in of_layer.values() if matrix is not None}
        ffn += sum(sizes.get(stored, 0) for stored in FFN_MATRICES)
        attention += sum(sizes.get(stored, 0) for stored in ATTENTION_MATRICES)
        looked_up |= {contract.down_squared_norms(layer), contract.neuron_scale(layer)}
    return Sizes(
        stored=sum(weights.values()),
        read=sum(size for name, size in weights.items() if name not in looked_up),
        linears=ffn + attention,
        ffn=ffn,
        cache_row=sum(contract.tensor_bytes(cache.axes(1), cache.dtype) for cache in contract.layer_caches(shape, 0)),
        windows=spec.sliding_windows,
        formats=tuple(sorted(formats)),
    )


def planned_sizes(
    spec: DecoderSpec, shapes: Mapping[str, tuple[int, ...]], storage: Storage, packing: Packing, *, head: bool
) -> Sizes:
    """Return the sizes of a model's priced artifact before it is built.

    Args:
        spec: The architecture.
        shapes: The shapes of the checkpoint's tensors, by name.
        storage: How the tensors are stored.
        packing: The packing of the linears.
        head: Whether the head's rows have prices too.

    Raises:
        TdaError: The shapes do not fit the architecture.
    """
    prices = {
        stored: torch.empty(spec.num_layers, linear_shape(spec, parts[0])[0], device="meta")
        for stored, parts in packed_matrices(spec, packing).items()
    }
    if head:
        prices[contract.HEAD] = torch.empty(1, linear_shape(spec, contract.HEAD)[0], device="meta")
    plan = list(plan_weights(spec, _Shapes(shapes), storage, PricedRows(packing, prices)))
    sizes = {planned.name: planned.bytes for planned in plan}
    matrices = {planned.name: planned.matrix for planned in plan if planned.matrix}
    return weight_sizes(spec, sizes, matrices, model_shape(spec, storage.dtype))


def artifact_sizes(spec: DecoderSpec, artifact: Artifact) -> Sizes:
    """Return the sizes of an artifact."""
    entries = artifact.manifest["weights"].items()
    sizes = {name: contract.tensor_bytes(entry["shape"], entry["dtype"]) for name, entry in entries}
    return weight_sizes(spec, sizes, artifact.matrices, artifact.shape)


class _Shapes:
    """A checkpoint of which only the shapes are known."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def load(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name}: no more than its shape is known")


def features(spec: DecoderSpec) -> Iterable[str]:
    """Yield short descriptions of an architecture's features."""
    norms = {"rms": "RMS norms", "layer": "layer norms"}[spec.norm]
    places = {"before": "before", "after": "after", "output": "on the output of", "both": "before and after"}
    yield f"{norms} {places[spec.norm_placement]} attention and FFN"
    if spec.parallel_residual:
        yield "attention and FFN side by side"
    yield f"{spec.activation} FFN {'with' if spec.gated else 'without'} gates"
    yield from _attention_features(spec)
    if spec.embedding_width != spec.hidden_size:
        yield f"embeddings of {spec.embedding_width} elements"
    if spec.logits_softcap is not None:
        yield f"logits capped at {spec.logits_softcap:g}"


def _attention_features(spec: DecoderSpec) -> Iterable[str]:
    if spec.qk_norm != "none":
        yield "norms of queries and keys"
    if spec.attention_softcap is not None:
        yield f"attention scores capped at {spec.attention_softcap:g}"
    windows = [window for window in spec.sliding_windows if window is not None]
    if windows:
        yield f"a window of {max(windows)} tokens in {len(windows)} of {spec.num_layers} layers"
    if spec.rope is None:
        yield "learned positions"
        return
    share = f" of {spec.rotary_size} of {spec.head_size} elements" if spec.rotary_size else ""
    scaling = "" if spec.rope.scaling == "default" else f", {spec.rope.scaling} scaling"
    yield f"rotary embedding{share}{scaling}"
    if spec.local_rope is not None:
        yield "another rotary base in layers with a window"
    if spec.rope_layers is not None and not all(spec.rope_layers):
        yield f"{spec.rope_layers.count(False)} layers without rotary embedding"
