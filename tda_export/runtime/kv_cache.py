"""Past keys and values in one preallocated buffer per layer, which attention reads and writes in place."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.session import Call, empty_tensor

FIRST_CAPACITY = 1024  # tokens; doubles when full


class KvCache:
    """Buffers [1, KV, capacity, D] of `length` tokens so far.

    A full cache grows by giving attention a larger output buffer once: it copies the past into it by itself.
    """

    def __init__(self, shape: ModelShape, provider: str, limit: int) -> None:
        self.length = 0
        self.limit = limit
        self._shape, self._provider = shape, provider
        self.capacity = min(FIRST_CAPACITY, limit)
        self._past = self._allocate()
        self._present = self._past
        self._reserved = 0
        self.mask = np.zeros((1, self.capacity), np.int64)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more; they are attended to by the next call."""
        total = self.length + tokens
        assert total <= self.limit, f"{total} tokens in a cache for {self.limit}"  # the driver checks first
        if total > self.capacity:
            while self.capacity < total:
                self.capacity = min(2 * self.capacity, self.limit)
            self._present = self._allocate()
            self.mask = np.zeros((1, self.capacity), np.int64)
        self.mask[0, :total] = 1
        self.mask[0, total:] = 0
        self._reserved = total

    def bind(self, call: Call) -> None:
        """Bind past and present of every layer."""
        for layer in range(self._shape.num_layers):
            call.feed(contract.past_key(layer), self._past[layer][0])
            call.feed(contract.past_value(layer), self._past[layer][1])
            call.write_to(contract.present_key(layer), self._present[layer][0])
            call.write_to(contract.present_value(layer), self._present[layer][1])

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def commit(self) -> None:
        """Record that the reserved tokens were written."""
        self.length = self._reserved
        self._past = self._present

    def keys_and_values(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Copy a layer's keys and values of the tokens so far to the host, each [KV, length, D]."""
        key, value = (tensor.numpy()[0, :, : self.length] for tensor in self._past[layer])
        return key, value

    def _allocate(self) -> list[tuple[ort.OrtValue, ort.OrtValue]]:
        size = (1, self._shape.num_kv_heads, self.capacity, self._shape.head_size)
        return [
            (
                empty_tensor(size, self._shape.dtype, self._provider),
                empty_tensor(size, self._shape.dtype, self._provider),
            )
            for _ in range(self._shape.num_layers)
        ]
