"""Compile device code for the CPU (`cuda_on_cpu.h`), and launch attention and RowLinear as their hosts do."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tda_export.native.build import FOLDER, find_compiler
from tests.attention_model import AttentionForm

SOURCES = (
    "cluster.cuh",
    "common.cuh",
    "half_products.cuh",
    "kv_rows.cuh",
    "kv_sums.cuh",
    "kv_sums_matrices.cuh",
    "attention.cu",
)
# Hidden, so that libraries that are loaded together share no variables. Not fortified, as some compilers are unasked: a
# fortified longjmp refuses to change to another stack.
FLAGS = ("-std=c++17", "-O1", "-w", "-fPIC", "-pthread", "-fvisibility=hidden", "-U_FORTIFY_SOURCE")
FIRST_WITH_CLUSTERS = 90  # compute capability
# Replacements for PTX, by its first word. Other PTX, such as that for overlapping launches, is left out.
INSTRUCTIONS = {
    "cvt.f32.f16 ": "value = HalfOf(bits);",
    "cvt.rn.f16.f32 ": "bits = ToHalf(value);",
    "cvt.rn.bf16.f32 ": "bits = ToBfloat16(value);",
    "cvt.rn.bf16x2.f32 ": "pair = ToBfloat16(low) | static_cast<unsigned>(ToBfloat16(high)) << 16;",
    "cvt.rn.f16x2.f32 ": "pair = Halves(low, high);",
    "add.rn.f16x2 ": "pair = AddHalves(pair, 0xe480e480u);",
    "ldmatrix.": "LoadMatrices(place, loaded);",
    "set.neu.": "mask = NonzeroHalves(pair);",
    "cp.async.ca": "BeginCopy(place, address, kBytes);",
    "movmatrix.": "result = Transpose(pair);",
    "mma.sync.": "MultiplyAdd(sum, first, second);",
    "lop3.b32 %0, %1, 0x000f000f": "codes = (shifted & 0x000f000fu) | 0x64006400u;",
    "lop3.b32 %0, %1, 0x00f000f0": "codes = (shifted & 0x00f000f0u) | 0x64006400u;",
    "sub.f16x2 ": "differences = FmaHalves(zero.subtracted, 0xbc00bc00u, codes);",
    "mul.rn.f16x2 ": "product = FmaHalves(a, b, 0x80008000u);",
    "fma.rn.f16x2 %0, %1, %2, %3": "differences = FmaHalves(codes, 0x2c002c00u, zero.added);",
    "fma.rn.f16x2 %0, %1, %2, %0": "sum = FmaHalves(differences, factor, sum);",
    "cp.async.cg": "BeginCopy(place, address, 16);",
    "cp.async.commit": "CommitGroup();",
    "cp.async.wait": "WaitForGroups(kPending);",
    "ld.shared": "memcpy(words, SharedPlace(place), sizeof words);",
    "mapa.": "there = AtRankOf(own, rank);",
    "mbarrier.init.": "InitBarrier(barrier);",
    "mbarrier.arrive.expect_tx.": "ArriveAndExpect(barrier, floats * static_cast<int>(sizeof(float)));",
    "barrier.cluster.arrive.": "ArriveInCluster();",
    "barrier.cluster.wait.": "WaitForCluster();",
    "st.async.": "SendFloats(place, values, barrier);",
}
# Replacements for instructions in braces, by their registers.
BLOCKS = {
    ".reg .b16 l, h;": "low = HalfOf(halves & 0xffff); high = HalfOf(halves >> 16);",
    ".reg .b16 half;": "factor = Halves(value * Scale(), value * Scale());",
    "mbarrier.try_wait.": "there = HasOpened(Address(&bytes_to_come));",
}
LOADED = {"words": "memcpy(words, address, sizeof words);", "pack": "memcpy(&pack, address, sizeof pack);"}
POINTERS = (
    *("query", "key", "value", "past_key", "past_value", "present_key", "present_value"),
    *("past_key_scale", "past_value_scale", "present_key_scale", "present_value_scale"),
    *("cos", "sin", "last_index", "partial", "attended"),
)
INTEGERS = (
    *("tokens", "heads", "kv_heads", "size", "pairs", "past_room", "room", "most", "buffer", "splits"),
    *("query_stride", "key_stride", "value_stride", "window", "interleaved", "appends"),
)
THREADS = 128  # threads of a block of attention, unless it is a wide one
SIZES = (64, 128, 256)  # the largest head of each of its kernels
GUARD, MARK, UNWRITTEN = 64, 0xAB, 0xFF


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in INTEGERS),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def _on_cpu(found: re.Match[str]) -> str:
    ptx: str = found["ptx"]
    if ptx.startswith("{"):
        return next((text for registers, text in BLOCKS.items() if registers in ptx), _loaded(ptx, "if (wanted)"))
    if ptx.startswith("ld.global"):
        return _loaded(ptx)
    return next((text for word, text in INSTRUCTIONS.items() if ptx.startswith(word)), ";")


def _loaded(ptx: str, condition: str = "") -> str:
    return next((f"{condition} {text}" for name, text in LOADED.items() if f"({name}" in ptx), ";")


@functools.cache
def _precompiled() -> tempfile.TemporaryDirectory[str]:
    """The emulator's header, precompiled once in a process. It does not depend on defines; most of it is the standard
    library's. A compiler that cannot use it reads the header itself."""
    folder = tempfile.TemporaryDirectory(prefix="tda-header-")
    header, output = Path(__file__).with_name("cuda_on_cpu.h"), Path(folder.name) / "cuda_on_cpu.h.gch"
    subprocess.run([*find_compiler(), *FLAGS, "-x", "c++-header", str(header), "-o", str(output)], check=True)
    return folder


def compile_for_cpu(
    folder: Path, sources: Sequence[str], kernels: Mapping[str, int], arguments: str, defines: Mapping[str, int]
) -> ctypes.CDLL:
    """Compile kernels, given with their threads, that take a struct of this name. The library's `Run` launches one."""
    source = "".join((FOLDER / "device" / name).read_text(encoding="utf-8") for name in sources)
    source = re.sub(r'asm( volatile)?\(\s*"(?P<ptx>(?:.|\n)*?)\);', _on_cpu, source)
    cases = "".join(
        f'  if (!strcmp(name, "{kernel}")) emulator::Launch(grid, cluster, {threads}, [=] {{ {kernel}(*a); }});\n'
        for kernel, threads in kernels.items()
    )
    shown = 'extern "C" __attribute__((visibility("default")))'
    parameters = f"const char* name, unsigned x, unsigned y, unsigned z, unsigned cluster, const {arguments}* a"
    run = f"{shown} void Run({parameters}) {{\n  const emulator::Index grid = {{x, y, z}};\n{cases}}}\n"
    clusters = f"{shown} int HasClusters() {{ return TDA_CLUSTERS; }}\n"
    name = "-".join([arguments, *(str(value) for value in defines.values())])
    (folder / f"{name}.cc").write_text(f'#include "cuda_on_cpu.h"\n{source}{run}{clusters}')
    defined = [f"-D{define}={value}" for define, value in defines.items()]
    library = folder / f"{name}.so"
    subprocess.run(
        [
            *find_compiler(),
            *FLAGS,
            "-shared",
            *defined,
            f"-I{_precompiled().name}",
            f"-I{Path(__file__).parent}",
            str(folder / f"{name}.cc"),
            "-o",
            str(library),
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def has_clusters(library: ctypes.CDLL) -> bool:
    """Whether kernels were compiled for a GPU with clusters."""
    return bool(library.HasClusters())


def compile_attention(folder: Path, *, bf16: bool, codes: bool, capability: int) -> ctypes.CDLL:
    """The kernels of a kind of GPU."""
    clusters = capability >= FIRST_WITH_CLUSTERS
    kernels = dict.fromkeys(("AppendTokens", "CopyPast", *(() if clusters else ("JoinParts",))), THREADS)
    for size, heads, wide in itertools.product(SIZES, (1, 2, 4), (False, True) if clusters else (False,)):
        threads = threads_of(size, wide)
        kernels[f"Attend_{size}_{heads}_{threads}"] = threads
    defines = {"TDA_BF16": int(bf16), "TDA_KV_CODES": int(codes), "TDA_CLUSTERS": int(clusters)}
    defines |= {"__CUDA_ARCH__": 10 * capability}
    return compile_for_cpu(folder, SOURCES, kernels, "AttentionArguments", defines)


def threads_of(size: int, wide: bool) -> int:
    """The threads of a block of attention to heads of at most this size."""
    return THREADS if not wide else 512 if size < SIZES[-1] else 256


class Guarded:
    """An array with known memory around it, so that a write outside is found."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        count = int(np.prod(shape))
        self._whole = np.zeros(count + 2 * GUARD, dtype)
        self._whole.view(np.uint8)[:] = MARK
        self.array = self._whole[GUARD : GUARD + count].reshape(shape)
        self.array.reshape(-1).view(np.uint8)[:] = UNWRITTEN

    def check(self) -> None:
        outside = np.concatenate([self._whole[:GUARD], self._whole[-GUARD:]]).view(np.uint8)
        assert (outside == MARK).all()


def run_on_cpu(
    library: ctypes.CDLL,
    form: AttentionForm,
    feeds: Mapping[str, np.ndarray],
    *,
    splits: int,
    in_place: bool = False,
    wide: bool = False,
) -> list[np.ndarray]:
    """Run attention. Return its output, present keys and values, and their scales.

    `wide`, with clusters only: take wide blocks for few tokens.
    """
    feeds = {name: np.asarray(array, order="C") for name, array in feeds.items()}
    query, dtype = feeds["query"], feeds["query"].dtype
    heads, kv_heads, size = form.heads, form.kv_heads, form.size
    tokens, past_room, buffer = query.shape[1], feeds["past_key"].shape[2], int(feeds["buffer"])
    room = max(past_room, buffer)
    past = {name: array for name, array in feeds.items() if name.startswith("past_")}
    present = {name: Guarded((*array.shape[:2], room, *array.shape[3:]), array.dtype) for name, array in past.items()}
    if in_place:
        for name, array in past.items():
            present[name].array[...] = array
        past = {name: guarded.array for name, guarded in present.items()}
    splits, wide = (splits, wide) if tokens <= 16 else (1, False)
    clusters = has_clusters(library)
    partial = Guarded((tokens * heads * splits * (size + 2),), np.dtype(np.float32))
    attended = Guarded((1, tokens, heads * size), np.dtype(np.uint16))
    start = query.ctypes.data
    key, value = (
        (start + 2 * heads * size, start + 2 * (heads + kv_heads) * size)
        if form.packed
        else (feeds["key"].ctypes.data, feeds["value"].ctypes.data)
    )
    pairs = feeds["cos_cache"].shape[1] if form.rotary else 0
    key_stride = query.shape[2] if form.packed else kv_heads * size
    arguments = Arguments(
        query=start,
        key=key,
        value=value,
        **{name: array.ctypes.data for name, array in past.items()},
        **{name.replace("past", "present"): guarded.array.ctypes.data for name, guarded in present.items()},
        **({table: feeds[f"{table}_cache"].ctypes.data for table in ("cos", "sin")} if form.rotary else {}),
        last_index=feeds["last_index"].ctypes.data,
        partial=partial.array.ctypes.data,
        attended=attended.array.ctypes.data,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        pairs=pairs,
        past_room=past_room,
        room=room,
        most=min(room, feeds["cos_cache"].shape[0]) if form.rotary else room,
        buffer=buffer,
        splits=splits,
        query_stride=query.shape[2],
        key_stride=key_stride,
        value_stride=key_stride,
        window=form.window,
        interleaved=form.interleaved,
        appends=tokens == 1,
        scale=form.scale or size**-0.5,
        softcap=form.softcap,
    )

    def launch(kernel: str, x: int, y: int, z: int = 1, *, cluster: int = 1) -> None:
        library.Run(kernel.encode(), x, y, z, cluster, ctypes.byref(arguments))

    if not in_place:
        launch("CopyPast", min(room, 256), kv_heads, 2)
    if tokens > 1:
        launch("AppendTokens", tokens, kv_heads)
    group = heads // kv_heads
    at_once = group if group < 3 else 4
    most = next(each for each in SIZES if size <= each)
    attend = f"Attend_{most}_{at_once}_{threads_of(most, wide)}"
    launch(attend, splits, kv_heads * -(-group // at_once), tokens, cluster=splits if clusters else 1)
    if splits > 1 and not clusters:
        launch("JoinParts", heads, tokens)
    for guarded in (partial, attended, *present.values()):
        guarded.check()
    result = attended.array.view(ml_dtypes.bfloat16 if dtype == ml_dtypes.bfloat16 else np.float16)
    return [result, *(guarded.array for guarded in present.values())]
