"""Past keys and values in one preallocated buffer per tensor, which attention reads and writes in place."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from tda_export.errors import TdaError, first_line
from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.session import Call, empty_tensors


class KvCache:
    """Buffers [1, KV, capacity, ..], one for each of `contract.layer_caches`. They hold `length` tokens so far.

    Raises:
        TdaError: There is not enough memory for them.
    """

    def __init__(self, shape: ModelShape, provider: str, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._reserved = 0
        self._layers = [contract.layer_caches(shape, layer) for layer in range(shape.num_layers)]
        try:
            self.mask = np.zeros((1, capacity), np.int64)  # the attention mask of the next call
            caches = [tensor for tensors in self._layers for tensor in tensors]
            arrays = [(tensor.axes(capacity), tensor.dtype) for tensor in caches]
            self._buffers = dict(zip([tensor.past for tensor in caches], empty_tensors(arrays, provider), strict=True))
        except Exception as error:  # numpy's MemoryError; ONNX Runtime's exceptions share no narrower base
            raise TdaError(
                f"No memory for keys and values of {capacity} tokens ({first_line(error)}). "
                "Give a smaller --context, or ask for fewer new tokens."
            ) from error

    def reserve(self, tokens: int) -> None:
        """Reserve room for `tokens` more; the next call attends to them."""
        total = self.length + tokens
        if total > self.capacity:
            raise TdaError(f"{total} tokens do not fit into a context of {self.capacity}. Shorten the prompt.")
        self.mask[0, :total] = 1
        self.mask[0, total:] = 0
        self._reserved = total

    def bind(self, call: Call) -> None:
        """Bind past and present of every layer to the same buffers."""
        for tensors in self._layers:
            for tensor in tensors:
                call.feed(tensor.past, self._buffers[tensor.past])
                call.write_to(tensor.present, self._buffers[tensor.past])

    def commit(self, tokens: int | None = None) -> None:
        """Record that the reserved tokens were written; with `tokens`, only that many of them, the first, count so
        far."""
        self.length = self._reserved if tokens is None else self.length + tokens

    def confirm(self, tokens: int) -> None:
        """Let `tokens` more of the tokens count that the last call has written."""
        assert self.length + tokens <= self._reserved
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def keys_and_values(self, layer: int) -> list[ort.OrtValue]:
        """Return a layer's buffers [1, KV, capacity, ..], keys and values first; only the first `length` tokens
        count."""
        return [self._buffers[tensor.past] for tensor in self._layers[layer]]
