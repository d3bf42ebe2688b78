"""Memory on huge pages: the same numbers as a mapped file, and the mapped file wherever a copy would not do."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_export.runtime import Model, huge_pages, load
from tda_export.runtime.session import Sessions, empty_tensors, map_weight
from tests.runtime.conftest import PROMPT

DTYPES = ("float32", "float16", "int8", "uint8", "int64")
linux_only = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages to ask for")


@given(size=st.integers(0, 5 << 20))
def test_anonymous(size: int) -> None:
    memory = huge_pages.anonymous(size)
    assert memory.shape == (size,)
    assert memory.dtype == np.uint8
    assert not memory.any()
    memory[:] = 7
    assert (memory == 7).all()


@linux_only
def test_starts_a_huge_page() -> None:
    assert huge_pages.anonymous(100).ctypes.data % huge_pages.HUGE_PAGE == 0


@given(arrays=st.lists(st.tuples(st.lists(st.integers(1, 40), max_size=4), st.sampled_from(DTYPES)), max_size=6))
def test_zeros(arrays: list[tuple[list[int], str]]) -> None:
    """Tensors have their shapes and dtypes, lie on lines of the cache, and none shares a byte with another."""
    tensors = huge_pages.zeros(arrays)
    views = [np.from_dlpack(tensor) for tensor in tensors]
    assert [(list(view.shape), view.dtype.name) for view in views] == arrays
    assert not any(view.any() for view in views)
    places = [tensor.data_ptr() for tensor in tensors]
    assert len({place % huge_pages.ALIGNMENT for place in places}) <= 1
    ends = [place + view.nbytes for place, view in zip(places, views, strict=True)]
    assert all(end <= place for end, place in zip(ends, places[1:], strict=False))


def test_tensors_keep_their_memory() -> None:
    tensors = [huge_pages.zeros([((1 << 18,), "float32")] * 2)[i % 2] for i in range(20)]  # the other one is dropped
    for i, tensor in enumerate(tensors):
        tensor.update_inplace(np.full(1 << 18, i, np.float32))
    gc.collect()
    assert all((tensor.numpy() == i).all() for i, tensor in enumerate(tensors))


def test_zeros_of_bfloat16() -> None:
    (tensor,) = empty_tensors([((2, 3), "bfloat16")], "cpu")
    assert tensor.shape() == [2, 3]
    assert tensor.element_type() == 16


@linux_only
def test_read_file(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, (5 << 20) + 3, np.uint8)
    (tmp_path / "file").write_bytes(content.tobytes())
    memory = huge_pages.read_file(tmp_path / "file", content.size)
    assert memory is not None
    assert (memory == content).all()
    assert huge_pages.read_file(tmp_path / "file", content.size + 1) is None
    assert huge_pages.read_file(tmp_path / "absent", 1) is None


def test_mapped_where_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(1000))
    with monkeypatch.context() as patch:
        patch.setenv(huge_pages.SWITCH, "0")
        assert huge_pages.read_file(tmp_path / "file", 1000) is None
    with monkeypatch.context() as patch:
        patch.setattr(huge_pages, "available_memory", lambda: 1999)
        assert huge_pages.read_file(tmp_path / "file", 1000) is None
    with monkeypatch.context() as patch:
        patch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
        assert huge_pages.read_file(tmp_path / "file", 1000) is None
        assert not huge_pages.anonymous(1000).any()


@pytest.mark.parametrize(
    ("info", "limit", "use", "available"),
    [
        ("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n", None, None, 4000 << 10),
        ("MemAvailable:  4000 kB\n", "max", "1000", 4000 << 10),
        ("MemAvailable:  4000 kB\n", "3000000", "1000000", 2_000_500),
        ("MemAvailable:  4000 kB\n", "9000000", "1000000", 4000 << 10),
        ("MemAvailable:  4000 kB\n", "3000000", "3000000", 500),
        ("MemAvailable:  4000 kB\n", "3000000", "3500000", 0),
        ("MemAvailable:  4000 kB\n", "much", "0", 0),
        ("MemTotal:  9000 kB\n", None, None, 0),
        ("nothing", None, None, 0),
        (None, None, None, 0),
    ],
)
def test_available_memory(
    info: str | None,
    limit: str | None,
    use: str | None,
    available: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics = "anon 12\ninactive_file 500\n"
    files = {"MEMORY_INFO": info, "GROUP_LIMIT": limit, "GROUP_USE": use, "GROUP_STATISTICS": statistics}
    for name, text in files.items():
        monkeypatch.setattr(huge_pages, name, tmp_path / name)
        if text is not None:
            (tmp_path / name).write_text(text)
    assert huge_pages.available_memory() == available


@linux_only
def test_weights_are_the_file(model: Model) -> None:
    """Every tensor that sessions share holds what weights.bin does."""
    shared = Sessions(model.artifact, "cpu").shared_weights
    assert shared.keys() == model.artifact.manifest["weights"].keys()
    for name, value in shared.items():
        assert (value.numpy() == map_weight(model.artifact, name)).all()


@pytest.mark.parametrize("which", ["tiny_artifact", "priced_artifact"])
def test_same_tokens(which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = request.getfixturevalue(which)
    answers = []
    for switch in ("0", "1"):
        monkeypatch.setenv(huge_pages.SWITCH, switch)
        opened = load(folder, provider="cpu")
        assert bool(opened.sessions.shared_weights) == (switch == "1" and hasattr(mmap, "MADV_HUGEPAGE"))
        answers.append(list(opened.generate(PROMPT, max_new_tokens=20, ignore_eos=True)))
    assert answers[0] == answers[1]
