"""Products by blocks that stay: their device code on the CPU, in clusters of every kind, and the host's choice."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tda_export.native.build import FOLDER, find_compiler
from tda_export.weights.formats import integer_format
from tests.code_model import row_feeds, row_reference
from tests.native.cuda_on_cpu import Guarded, compile_for_cpu
from tests.native.test_codes_cuda import assert_close
from tests.native.test_row_linear_on_cpu import SOURCES, WHOLE, Arguments
from tests.row_model import price_for, worth
from tests.sums_model import square_parts

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="written for Linux on x86-64"
)
WARPS, MOST_RANKS = 16, 16
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@pytest.fixture(scope="module", params=[4, 8])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, ctypes.CDLL]:
    """The bits of a code, and the kernel for these."""
    defines = {"TDA_BF16": 0, "TDA_BITS": request.param, "TDA_CLUSTERS": 1, "TDA_INPUTS": 0, "__CUDA_ARCH__": 900}
    named = {f"RowLinear_{WHOLE}": 32 * WARPS}
    folder = tmp_path_factory.mktemp("device")
    return request.param, compile_for_cpu(folder, SOURCES, named, "RowLinearArguments", defines)


def multiply(
    library: ctypes.CDLL, feeds: dict[str, np.ndarray], ranks: int, clusters: int, early: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return y and its square parts, by so many clusters."""
    feeds = {name: np.asarray(array, order="C") for name, array in feeds.items()}
    x, outputs = feeds["x"], feeds["bias"].shape[0]
    y = Guarded((1, 1, outputs), np.dtype(np.uint16))
    squares = Guarded((1, 1, outputs // 32), np.dtype(np.float32))
    names = ("scales", "zero_points", "row_price", "price", "bias", "residual")
    arguments = Arguments(
        x=x.ctypes.data,
        codes=feeds["w"].ctypes.data,
        **{name: feeds[name].ctypes.data for name in names if name in feeds},
        columns=outputs,
        group_shift=5,
        y=y.array.ctypes.data,
        tokens=1,
        inputs=x.shape[2],
        outputs=outputs,
        early=early,
        squares=squares.array.ctypes.data,
    )
    library.Run(f"RowLinear_{WHOLE}".encode(), ranks, clusters, 1, ranks, ctypes.byref(arguments))
    for guarded in (y, squares):
        guarded.check()
    return y.array.view(np.float16), squares.array.copy()


@settings(max_examples=60, **SLOW)
@given(
    slices=st.integers(1, WARPS),
    all_slices=st.integers(1, 18),
    ranks=st.integers(2, 9) | st.just(MOST_RANKS),
    inputs=st.sampled_from([1, 3, 4, 63, 130, 515, 1300]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    zeros=st.sampled_from([0.0, 0.4, 1.0]),
    early=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sums_by_clusters_of_any_size(
    device: tuple[int, ctypes.CDLL],
    slices: int,
    all_slices: int,
    ranks: int,
    inputs: int,
    density: float,
    zeros: float,
    early: bool,
    seed: int,
) -> None:
    """The last cluster may have fewer slices than the others; and rows may be fewer than warps."""
    bits, library = device
    rng = np.random.default_rng(seed)
    feeds, elements = row_feeds(rng, integer_format(bits), inputs, 256 * all_slices, 1, "float16")
    feeds["x"][rng.random(feeds["x"].shape) < zeros] = 0
    feeds["price"] = price_for(feeds, density)
    feeds["scales"] = np.where((worth(feeds)[0] < feeds["price"])[:, None], np.float16(np.nan), feeds["scales"])
    elements[worth(feeds)[0] < feeds["price"]] = 0
    clusters = -(-all_slices // slices)
    y, squares = multiply(library, feeds, ranks, clusters, early)
    assert_close(y, row_reference(feeds, elements, bias=True), "float16")
    np.testing.assert_array_equal(squares, square_parts(y))


def test_lists_in_several_turns_and_a_residual(device: tuple[int, ctypes.CDLL]) -> None:
    """Four looks of one warp are fewer rows than a share has."""
    bits, library = device
    rng = np.random.default_rng(7)
    feeds, elements = row_feeds(rng, integer_format(bits), 9000, 256, 1, "float16")
    feeds["price"] = price_for(feeds, 0.6)
    alone, _ = multiply(library, feeds, 3, 1, True)
    assert_close(alone, row_reference(feeds, elements, bias=True), "float16")
    residual = rng.standard_normal(alone.shape).astype(np.float16)
    sums, squares = multiply(library, feeds | {"residual": residual}, 3, 1, True)
    expected = (alone.astype(np.float32) + residual.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(sums.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(squares, square_parts(sums))


class Limits(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bits", "matrices", "multiprocessors", "shared_bytes")),
        ("resident_clusters", ctypes.c_int * (MOST_RANKS + 1)),
    )


class Shares(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("ranks", "clusters", "rows", "shared_bytes")),
        ("worth", ctypes.c_double),
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("host")
    (folder / "choose.cc").write_text(
        f'#include "{FOLDER / "whole_slices.h"}"\n'
        'extern "C" void Choose(int64_t slices, int64_t inputs, const tda::WholeKernelLimits* limits,\n'
        "                       tda::WholeShares* shares) {\n"
        "  *shares = tda::ChooseWholeShares(slices, inputs, *limits);\n"
        "}\n"
        'extern "C" bool Pays(const tda::WholeShares* shares, int64_t bits, double large_busy) {\n'
        "  return shares->Pays(bits, large_busy);\n"
        "}\n"
    )
    output = folder / "choose.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([*find_compiler(), *flags, str(folder / "choose.cc"), "-o", str(output)], check=True)
    library = ctypes.CDLL(str(output))
    library.Pays.restype = ctypes.c_bool
    library.Pays.argtypes = [ctypes.POINTER(Shares), ctypes.c_int64, ctypes.c_double]
    library.Choose.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(Limits), ctypes.POINTER(Shares)]
    return library


def choose(host: ctypes.CDLL, slices: int, inputs: int, limits: Limits) -> Shares:
    shares = Shares()
    host.Choose(slices, inputs, ctypes.byref(limits), ctypes.byref(shares))
    return shares


def limits_of(bits: int, resident: list[int], multiprocessors: int = 132, shared_bytes: int = 228352) -> Limits:
    counts = (ctypes.c_int * (MOST_RANKS + 1))(*resident)
    return Limits(bits, {4: 2, 8: 1}[bits], multiprocessors, shared_bytes, counts)


@settings(max_examples=300)
@given(
    bits=st.sampled_from([4, 8]),
    slices=st.integers(1, 1100),
    inputs=st.integers(1, 60_000),
    resident=st.lists(st.integers(0, 140), min_size=MOST_RANKS + 1, max_size=MOST_RANKS + 1),
    shared_bytes=st.integers(70_000, 228_352),
)
def test_a_choice_fits(
    host: ctypes.CDLL, bits: int, slices: int, inputs: int, resident: list[int], shared_bytes: int
) -> None:
    shares = choose(host, slices, inputs, limits_of(bits, resident, shared_bytes=shared_bytes))
    if shares.ranks == 0:
        return
    assert 2 <= shares.ranks <= MOST_RANKS
    assert 1 <= shares.clusters <= resident[shares.ranks]
    own = -(-slices // shares.clusters)  # as the device computes it
    assert own <= WARPS
    assert (shares.clusters - 1) * own < slices <= shares.clusters * own
    parts = WARPS // own
    adding = max(count for count in (1, 2, 4, 8) if count <= shares.ranks)
    rows = -(-inputs // (4 * shares.ranks * parts)) * 4
    under_way = WARPS * {4: 2 * 2432, 8: 4608}[bits]
    received = own * parts * shares.ranks * (256 // adding) * 4
    assert shares.rows == rows
    assert shares.shared_bytes == under_way + received + parts * -(-rows // 16) * 16 * 6 <= shared_bytes


# The clusters that an H200 holds at once.
H200 = [0, 132, 66, 39, 30, 22, 17, 15, 15, *[7] * 8]


@pytest.mark.parametrize(
    ("inputs", "outputs", "ranks", "clusters", "large_busy", "pays"),
    [
        (8192, 57344, 8, 14, 0.85, True),
        (4096, 28672, 8, 14, 0.85, True),
        (5120, 27648, 8, 14, 0.82, True),
        (28672, 8192, 16, 7, 0.73, True),
        (4096, 22016, 8, 15, 0.65, True),
        (4096, 128256, 2, 63, 0.95, True),
        (4096, 32000, 2, 63, 0.95, False),
        (4096, 12288, 16, 7, 0.73, False),
        (14336, 4096, 16, 6, 0.73, False),
    ],
)
def test_choices_that_were_measured(
    host: ctypes.CDLL, inputs: int, outputs: int, ranks: int, clusters: int, large_busy: float, pays: bool
) -> None:
    shares = choose(host, outputs // 256, inputs, limits_of(4, H200))
    assert (shares.ranks, shares.clusters) == (ranks, clusters)
    assert host.Pays(ctypes.byref(shares), 4, large_busy) == pays


def test_a_gpu_without_clusters_has_no_choice(host: ctypes.CDLL) -> None:
    shares = choose(host, 224, 8192, limits_of(4, [0] * (MOST_RANKS + 1)))
    assert shares.ranks == 0
    assert not host.Pays(ctypes.byref(shares), 4, 0.0)
