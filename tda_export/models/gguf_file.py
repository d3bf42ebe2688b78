"""The header of a GGUF file, read within the file's own size, so that false sizes in a damaged or hostile file do no
harm."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "general.architecture"
TOKENS = "tokenizer.ggml.tokens"
# Types of values of a fixed size, in the notation of `struct`.
FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
LONGEST_SHAPE = 4  # dimensions that the format allows
SMALLEST_PAIR, SMALLEST_TENSOR = 13, 24  # bytes
LARGEST_ALIGNMENT = 1 << 20  # bytes; files usually have 32


class DamagedGguf(ValueError):
    """The file is not a valid GGUF file."""


@dataclass(frozen=True)
class GgufHeader:
    """The content of a header by name: single values, lengths of arrays, and shapes in the file's order."""

    architecture: str
    values: dict[str, Any]
    lengths: dict[str, int]
    tensors: dict[str, tuple[int, ...]]

    def of_model(self, key: str) -> Any:
        """Return a value of this architecture, or None where it is absent."""
        return self.values.get(f"{self.architecture}.{key}")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        path: The file.

    Raises:
        DamagedGguf: The file ends early, or holds impossible values.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(content).header()


class _Walk:
    """One pass over a header, from its first byte."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._size, self._at = content, len(content), 0

    def header(self) -> GgufHeader:
        if self._bytes(len(MAGIC)) != MAGIC or self._number("<I") not in VERSIONS:
            raise DamagedGguf(f"it is no GGUF file of version {' or '.join(map(str, VERSIONS))}")
        tensor_count, pair_count = self._number("<Q"), self._number("<Q")
        self._room(pair_count * SMALLEST_PAIR, f"{pair_count} keys")
        values: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(pair_count):
            key, kind = self._string(), self._number("<I")
            if kind == ARRAY:
                lengths[key] = self._array(key)
            else:
                values[key] = self._value(kind, key)
        self._room(tensor_count * SMALLEST_TENSOR, f"{tensor_count} tensors")
        tensors = dict(self._tensor() for _ in range(tensor_count))
        architecture = values.get(ARCHITECTURE)
        if not isinstance(architecture, str) or not architecture:
            raise DamagedGguf(f"it has no {ARCHITECTURE}")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT:
            raise DamagedGguf(f"its general.alignment is {alignment}")
        return GgufHeader(architecture, values, lengths, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...]]:
        name, count = self._string(), self._number("<I")
        if count > LONGEST_SHAPE:
            raise DamagedGguf(f"its tensor {name[:80]!r} has {count} dimensions")
        shape = tuple(self._number("<Q") for _ in range(count))
        self._bytes(12)  # type and offset
        return name, shape

    def _array(self, key: str) -> int:
        """Skip an array and return its length."""
        kind, count = self._number("<I"), self._number("<Q")
        if kind == STRING:
            self._room(count * 8, f"{count} texts in {key[:80]!r}")
            for _ in range(count):
                self._bytes(self._number("<Q"))
        elif kind in FIXED:
            size = count * struct.calcsize(FIXED[kind])
            self._room(size, f"{count} numbers in {key[:80]!r}")
            self._at += size
        else:
            raise DamagedGguf(f"its key {key[:80]!r} is an array of values of type {kind}")
        return count

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._string()
        if kind not in FIXED:
            raise DamagedGguf(f"its key {key[:80]!r} has a value of type {kind}")
        return self._number(FIXED[kind])

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._bytes(self._number("<Q")).decode("utf-8")

    def _bytes(self, count: int) -> bytes:
        self._room(count, f"{count} bytes at {self._at}")
        self._at += count
        return self._content[self._at - count : self._at]

    def _room(self, size: int, what: str) -> None:
        if size > self._size - self._at:
            raise DamagedGguf(f"it announces {what} and ends before them")
