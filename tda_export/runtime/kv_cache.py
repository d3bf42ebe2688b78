"""Past keys and values in one preallocated buffer per layer, which attention reads and writes in place."""

from __future__ import annotations

import numpy as np

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.session import Call, device_tensor, empty_tensor

FIRST_CAPACITY = 1024  # tokens; doubles when full


class KvCache:
    """Buffers [1, KV, capacity, D] that hold `length` tokens so far, and `limit` at most.

    A full cache doubles: the tokens so far are copied through the host, since attention accepts a larger output
    buffer only where it is larger by exactly the new tokens. That happens once for each doubling.
    """

    def __init__(self, shape: ModelShape, provider: str, limit: int) -> None:
        self.length = 0
        self.limit = limit
        self.capacity = min(FIRST_CAPACITY, limit)
        self.mask = np.zeros((1, self.capacity), np.int64)  # the attention mask of the next call
        self._shape, self._provider = shape, provider
        self._reserved = 0
        size = self._size
        self._buffers = {name: empty_tensor(size, shape.dtype, provider) for name in self._names()}

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more; they are attended to by the next call."""
        total = self.length + tokens
        if total > self.limit:
            raise TdaError(f"{total} tokens do not fit into a context of {self.limit}. Shorten the prompt.")
        if total > self.capacity:
            self._grow(total)
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

    def commit(self) -> None:
        """Record that the reserved tokens were written."""
        self.length = self._reserved

    def truncate(self, length: int) -> None:
        """Forget all tokens from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def keys_and_values(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Copy a layer's keys and values of the tokens so far to the host, each [KV, length, D]."""
        key, value = (self._buffers[name] for name in (contract.past_key(layer), contract.past_value(layer)))
        return key.numpy()[0, :, : self.length], value.numpy()[0, :, : self.length]

    def _names(self) -> list[str]:
        layers = range(self._shape.num_layers)
        return [name(i) for i in layers for name in (contract.past_key, contract.past_value)]

    @property
    def _size(self) -> tuple[int, int, int, int]:
        return 1, self._shape.num_kv_heads, self.capacity, self._shape.head_size

    def _grow(self, total: int) -> None:
        while self.capacity < total:
            self.capacity = min(2 * self.capacity, self.limit)
        self.mask = np.zeros((1, self.capacity), np.int64)
        for name, buffer in self._buffers.items():
            larger = np.zeros(self._size, self._shape.dtype)
            larger[:, :, : self.length] = buffer.numpy()[:, :, : self.length]
            self._buffers[name] = device_tensor(larger, self._provider)
