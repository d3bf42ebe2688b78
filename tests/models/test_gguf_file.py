"""The reader of a GGUF file's header: its values, and no file makes it read beyond the end."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import TdaError
from tda_export.models.gguf_file import ARRAY, FIXED, STRING, DamagedGguf, read_gguf_header
from tda_export.models.source import resolve_model
from tests.models.test_source import no_notice
from tests.models.test_source_gguf import write_gguf

HUGE = 2**40


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def file_of(*pairs: bytes, tensors: bytes = b"", tensor_count: int = 0, pair_count: int | None = None) -> bytes:
    """Return a GGUF file that names its architecture, with these key-value pairs after it."""
    pairs = (string("general.architecture") + struct.pack("<I", STRING) + string("llama"), *pairs)
    count = len(pairs) if pair_count is None else pair_count
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, count) + b"".join(pairs) + tensors


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return string("an.array") + struct.pack("<IIQ", ARRAY, kind, count) + content


def test_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", further={"a.text": "é", "a.number": 1.5})
    header, reader = read_gguf_header(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    own = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.values == own
    assert header.architecture == "llama"
    assert header.of_model("a.text") == "é"
    assert header.of_model("missing") is None
    assert header.tensors == {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}


def test_arrays_are_passed_over(tmp_path: Path) -> None:
    fixed = [array(kind, 3, bytes(3 * struct.calcsize(form))) for kind, form in FIXED.items()]
    after = string("after") + struct.pack("<II", 4, 7)
    (tmp_path / "model.gguf").write_bytes(file_of(*fixed, array(STRING, 2, string("a") + string("bc")), after))
    header = read_gguf_header(tmp_path / "model.gguf")
    assert header.lengths == {"an.array": 2}
    assert header.values["after"] == 7


@pytest.mark.parametrize(
    "content",
    [
        *(file_of(array(kind, HUGE)) for kind in (*FIXED, STRING)),
        file_of(array(ARRAY, HUGE)),
        file_of(array(99, 1)),
        file_of(array(STRING, 1, struct.pack("<Q", HUGE))),
        file_of(string("key") + struct.pack("<I", 99)),
        file_of(struct.pack("<Q", HUGE)),
        file_of(pair_count=HUGE),
        file_of(tensor_count=HUGE),
        file_of(tensors=string("a") + struct.pack("<I", HUGE >> 10) + bytes(24), tensor_count=1),
        file_of(tensors=string("a") + struct.pack("<I", 1), tensor_count=1),
        file_of(string("general.alignment") + struct.pack("<II", 4, 0)),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    ],
)
def test_claims_beyond_the_file_are_refused_at_once(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(DamagedGguf):
        read_gguf_header(tmp_path / "model.gguf")
    for part in ("config", "spec", "tokenizer"):
        with pytest.raises(TdaError, match=r"model\.gguf: the model cannot be loaded \(.+\)\. Give a model folder"):
            getattr(resolve_model(str(tmp_path / "model.gguf"), notify=no_notice), part)


def test_file_of_60_bytes_is_no_default_model(tmp_path: Path) -> None:
    content = file_of()
    assert len(content) < 70
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(
        TdaError, match=r"model\.gguf: the GGUF file does not say llama\.block_count, which every model needs"
    ):
        _ = resolve_model(str(tmp_path / "model.gguf"), notify=no_notice).spec


@given(data=st.data())
def test_damage_anywhere_ends_in_an_error_or_a_header(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "model.gguf"
    content = bytearray(
        file_of(array(4, 2, bytes(8)), array(STRING, 1, string("a")), string("n") + struct.pack("<II", 4, 1))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        header = read_gguf_header(path)
    except (DamagedGguf, UnicodeDecodeError):
        return
    assert header.architecture
