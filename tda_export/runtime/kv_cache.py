"""Past keys and values in one preallocated buffer per layer, which attention reads and writes in place."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from tda_export.errors import TdaError, first_line
from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.session import Call, empty_tensor


class KvCache:
    """Buffers [1, KV, capacity, D] that hold `length` tokens so far.

    Raises:
        TdaError: There is no memory for them.
    """

    def __init__(self, shape: ModelShape, provider: str, capacity: int) -> None:
        self.length = 0
        self.capacity = capacity
        self._shape = shape
        self._reserved = 0
        size = (1, shape.num_kv_heads, capacity, shape.head_size)
        try:
            self.mask = np.zeros((1, capacity), np.int64)  # the attention mask of the next call
            self._buffers = {name: empty_tensor(size, shape.dtype, provider) for name in self._names()}
        except Exception as error:  # numpy's MemoryError; ONNX Runtime's exceptions share no narrower base
            raise TdaError(
                f"No memory for keys and values of {capacity} tokens ({first_line(error)}). "
                "Give a smaller --context, or ask for fewer new tokens."
            ) from error

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more; they are attended to by the next call."""
        total = self.length + tokens
        if total > self.capacity:
            raise TdaError(f"{total} tokens do not fit into a context of {self.capacity}. Shorten the prompt.")
        self.mask[0, :total] = 1
        self.mask[0, total:] = 0
        self._reserved = total

    def bind(self, call: Call) -> None:
        """Bind past and present of every layer to the same buffers."""
        for layer in range(self._shape.num_layers):
            for past, present in (
                (contract.past_key(layer), contract.present_key(layer)),
                (contract.past_value(layer), contract.present_value(layer)),
            ):
                call.feed(past, self._buffers[past])
                call.write_to(present, self._buffers[past])

    def commit(self, tokens: int | None = None) -> None:
        """Record that the reserved tokens were written; with `tokens` only the first of them count so far."""
        self.length = self._reserved if tokens is None else self.length + tokens

    def confirm(self, tokens: int) -> None:
        """Let so many tokens count that the last call has written behind those that count."""
        assert self.length + tokens <= self._reserved
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def keys_and_values(self, layer: int) -> tuple[ort.OrtValue, ort.OrtValue]:
        """Return a layer's buffers [1, KV, capacity, D], of which the first `length` tokens count."""
        return self._buffers[contract.past_key(layer)], self._buffers[contract.past_value(layer)]

    def _names(self) -> list[str]:
        layers = range(self._shape.num_layers)
        return [name(i) for i in layers for name in (contract.past_key, contract.past_value)]
