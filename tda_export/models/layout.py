"""A checkpoint's tensors in the graphs' layout: linear layers [out, in]; Q, K and V one below the other.

Families pack, interleave and transpose; `Layout` undoes that. Nothing is read before a tensor's `load` is called, and
only one tensor of the checkpoint is read at a time, except for Q, K and V in three tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tda_export.errors import TdaError
from tda_export.models.rope import rotary_order
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import OTHER_FILES, Weights
from tda_export.packing import linear_parts

QKV_PARTS = ("q", "k", "v")


def module_parts(spec: DecoderSpec) -> dict[str, tuple[str, ...]]:
    """Return the parts of a layer that are in each module, in the order that a module packs them.

    Names of modules have `{i}` in place of the layer's number.
    """
    names = spec.names
    modules = {"q": names.query, "k": names.key, "v": names.value, "o": names.attention_out}
    modules |= {"gate": names.gate, "up": names.up, "down": names.down}
    found: dict[str, tuple[str, ...]] = {}
    for part in linear_parts(spec):
        found[modules[part]] = (*found.get(modules[part], ()), part)
    return found


def checkpoint_order(spec: DecoderSpec, part: str, weight: torch.Tensor) -> torch.Tensor:
    """Reorder the outputs of a part [in, out] from the graphs' order to the checkpoint's."""
    if part not in ("q", "k") or spec.rotary_size is None:
        return weight
    heads = weight.unflatten(1, (-1, spec.head_size))  # [in, heads, D]
    return heads[:, :, rotary_order(spec.head_size, spec.rotary_size).argsort()].flatten(1)


def module_weight(spec: DecoderSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Make the checkpoint's weight of a module from its parts: the inverse of `Layout.part`.

    Args:
        spec: The architecture.
        parts: All parts of the module, [in, out] of each, in the order of `module_parts`.
    """
    ordered = [checkpoint_order(spec, part, weight) for part, weight in parts.items()]
    if "q" in parts and spec.qkv_layout == "by_head":
        heads = [weight.unflatten(1, (spec.num_heads, spec.head_size)) for weight in ordered]  # [in, H, D] of each
        whole = torch.stack(heads, dim=2).flatten(1)
    else:
        whole = torch.cat(ordered, dim=1)
    return (whole if spec.transposed_linears else whole.T).contiguous()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read on demand: its shape, and how to read it."""

    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


class Layout:
    """Reads the parts of a decoder from its checkpoint, and checks their shapes against the configuration."""

    def __init__(self, spec: DecoderSpec, weights: Weights) -> None:
        self._spec, self._weights = spec, weights
        self._heads, self._kv_heads = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size

    def plain(self, name: str, *shape: int) -> LazyTensor:
        """Return a tensor as it is in the checkpoint."""
        self._check(name, shape)
        return LazyTensor(shape, partial(self._weights.load, name))

    def norm(self, module: str, size: int) -> LazyTensor:
        """Return the weights of a norm, float32, with the offset of families whose norms multiply by 1 + w."""
        plain, offset = self.plain(f"{module}.weight", size), self._spec.norm_offset
        return LazyTensor(plain.shape, lambda: plain.load().float() + offset) if offset else plain

    def head_norm(self, module: str, heads: int) -> LazyTensor:
        """Return the weights of a norm of queries or keys, in the graphs' order of a head's elements."""
        spec = self._spec
        whole = spec.qk_norm == "whole"
        plain = self.norm(module, heads * spec.head_size if whole else spec.head_size)
        return LazyTensor(plain.shape, lambda: self._rotated(plain.load(), heads if whole else 1))

    def positions(self) -> LazyTensor:
        """Return the table of learned positions, [positions, M], starting with position 0."""
        spec, offset = self._spec, self._spec.position_offset or 0
        plain = self.plain(f"{spec.names.positions}.weight", spec.max_positions + offset, spec.hidden_size)
        return LazyTensor((spec.max_positions, spec.hidden_size), lambda: plain.load()[offset:])

    def linear(self, module: str, outputs: int, inputs: int) -> LazyTensor:
        """Return the weights of a linear layer, [out, in]."""
        if not self._spec.transposed_linears:
            return self.plain(f"{module}.weight", outputs, inputs)
        plain = self.plain(f"{module}.weight", inputs, outputs)
        return LazyTensor((outputs, inputs), lambda: plain.load().T)

    def qkv(self, layer: int) -> LazyTensor:
        """Return the weights of Q, K and V, one below the other, [(H + 2 KV) D, M]."""
        linears = [self.linear(module, rows, self._spec.hidden_size) for module, rows in self._projections(layer)]
        return self._qkv(linears)

    def qkv_bias(self, layer: int) -> LazyTensor:
        """Return the biases of Q, K and V, [(H + 2 KV) D]."""
        return self._qkv([self.plain(f"{module}.bias", rows) for module, rows in self._projections(layer)])

    def part(self, layer: int, part: str) -> LazyTensor:
        """Return the weights of one linear of a layer, [out, in]: q, k, v, o, or a part of the FFN."""
        spec = self._spec
        if part == "o":
            return self.linear(spec.names.attention_out.format(i=layer), spec.hidden_size, self._heads)
        if part == "down":
            return self.linear(spec.names.down.format(i=layer), spec.hidden_size, spec.ffn_size)
        return self._qkv_part(layer, part, bias=False) if part in QKV_PARTS else self.ffn(layer, part)

    def part_bias(self, layer: int, part: str) -> LazyTensor:
        """Return the bias of one linear of a layer, [out]."""
        if part == "o":
            return self.plain(f"{self._spec.names.attention_out.format(i=layer)}.bias", self._spec.hidden_size)
        return self._qkv_part(layer, part, bias=True) if part in QKV_PARTS else self.ffn_bias(layer, part)

    def _qkv_part(self, layer: int, part: str, *, bias: bool) -> LazyTensor:
        """Return only the rows of q, k or v; where they are packed, all are read."""
        spec, place = self._spec, QKV_PARTS.index(part)
        heads = spec.num_heads if part == "q" else spec.num_kv_heads
        if spec.qkv_layout == "separate":
            module, rows = self._projections(layer)[place]
            own = self.plain(f"{module}.bias", rows) if bias else self.linear(module, rows, spec.hidden_size)
            return own if part == "v" else LazyTensor(own.shape, lambda: self._rotated(own.load(), heads))
        packed = self.qkv_bias(layer) if bias else self.qkv(layer)
        sizes = [self._heads, self._kv_heads, self._kv_heads]
        return LazyTensor((sizes[place], *packed.shape[1:]), lambda: packed.load().split(sizes)[place])

    def ffn(self, layer: int, part: str) -> LazyTensor:
        """Return an FFN matrix, neuron-major: [F, M], row i is neuron i."""
        spec = self._spec
        module = getattr(spec.names, part).format(i=layer)
        if part == "down":
            down = self.linear(module, spec.hidden_size, spec.ffn_size)
            return LazyTensor((spec.ffn_size, spec.hidden_size), lambda: down.load().T)
        if not spec.packed_gate:
            return self.linear(module, spec.ffn_size, spec.hidden_size)
        return self._half(self.linear(module, 2 * spec.ffn_size, spec.hidden_size), part)

    def ffn_bias(self, layer: int, part: str) -> LazyTensor:
        """Return the bias of an FFN matrix, [F], or [M] for down."""
        spec = self._spec
        name = f"{getattr(spec.names, part).format(i=layer)}.bias"
        if part == "down" or not spec.packed_gate:
            return self.plain(name, spec.hidden_size if part == "down" else spec.ffn_size)
        return self._half(self.plain(name, 2 * spec.ffn_size), part)

    def _projections(self, layer: int) -> list[tuple[str, int]]:
        """Name the modules that hold Q, K and V, with their numbers of rows."""
        names, sizes = self._spec.names, (self._heads, self._kv_heads, self._kv_heads)
        modules = [name.format(i=layer) for name in (names.query, names.key, names.value)]
        if self._spec.qkv_layout == "separate":
            return list(zip(modules, sizes, strict=True))
        return [(modules[0], sum(sizes))]

    def _qkv(self, parts: list[LazyTensor]) -> LazyTensor:
        rows = sum(part.shape[0] for part in parts)
        return LazyTensor((rows, *parts[0].shape[1:]), lambda: self._joined([part.load() for part in parts]))

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        spec = self._spec
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if spec.qkv_layout == "by_head":  # [H, 3, D] rows to [3, H, D]
            joined = joined.unflatten(0, (spec.num_heads, 3, spec.head_size)).transpose(0, 1).flatten(0, 2)
        if spec.rotary_size is None:
            return joined
        query, key, value = joined.split([self._heads, self._kv_heads, self._kv_heads])
        return torch.cat([self._rotated(query, spec.num_heads), self._rotated(key, spec.num_kv_heads), value])

    def _rotated(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        """Reorder the elements of each head [heads * D, ..] for rotation of whole heads."""
        size = self._spec.rotary_size
        if size is None:
            return rows
        order = rotary_order(self._spec.head_size, size)
        return rows.unflatten(0, (heads, self._spec.head_size))[:, order].flatten(0, 1)

    def _half(self, packed: LazyTensor, part: str) -> LazyTensor:
        size = self._spec.ffn_size
        rows = slice(0, size) if part == "gate" else slice(size, 2 * size)
        return LazyTensor((size, *packed.shape[1:]), lambda: packed.load()[rows])

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        if name not in self._weights:
            raise TdaError(f"{name} is missing from the checkpoint. {OTHER_FILES}")
        if self._weights.shape(name) != expected:
            raise TdaError(
                f"{name}: config.json says shape {list(expected)}, the checkpoint has "
                f"{list(self._weights.shape(name))}. {OTHER_FILES}"
            )
