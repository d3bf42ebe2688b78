"""Run every CUDA kernel at awkward shapes under a checker:

compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.native.every_kernel
compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.native.every_kernel

Arguments are element types and parts (`PARTS`), all by default, so that several processes share the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import numpy as np

from tda_export.graph import operators
from tda_export.graph.ffn import FfnForm
from tda_export.weights.formats import integer_format
from tests.attention_model import AttentionForm, attention_session, random_attention
from tests.code_model import code_session, feeds_of, random_codes, row_feeds
from tests.ffn_model import NUMPY_DTYPES, array_of, ffn_session, ort_value, random_feeds, run
from tests.fused_model import AHEAD, fused_feeds, fused_session, run_all
from tests.native.test_functions import run as run_function
from tests.native.test_row_linear_sums import ADDING, layer_feeds, layer_session
from tests.row_model import price_for, random_rows, row_session
from tests.sessions import CUDA

FORMS = [
    FfnForm("silu", two_levels=True),
    FfnForm("relu", gated=False, bias=True),
    FfnForm("gelu_tanh", bias=True),
]


def ffn(rng: np.random.Generator, dtype: str) -> None:
    for form in FORMS:
        session = ffn_session(form, down_bias=True, layer=1, dtype=dtype)
        for hidden, neurons, tokens in ((577, 33, 1), (264, 50, 5), (1024, 700, 1), (8, 9, 4), (4360, 33, 1)):
            foreign = [-7, neurons, 2**30, -(2**31), -1, -1]
            for indices in (np.append(np.arange(0, neurons, 2), foreign), np.array([], np.int32), np.array([-1])):
                for threshold in (0.0, 0.3):
                    feeds = random_feeds(
                        rng,
                        tokens=tokens,
                        hidden=hidden,
                        neurons=neurons,
                        indices=indices,
                        dtype=dtype,
                        threshold=threshold,
                    )
                    assert np.isfinite(run(session, feeds).astype(np.float32)).all()


def functions(rng: np.random.Generator, dtype: str) -> None:
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype])

    floats = rng.random((2, 3001)).astype(np.float32)
    for neurons, tokens in ((96, 5), (3001, 19), (2056, 1)):
        feeds = {"h": draw(1, tokens, neurons), "counted": rng.random(tokens) < 0.5}
        feeds |= {
            "past_stats": floats[:, :neurons],
            "decay": np.ones(1, np.float32),
            "squared_norms": floats[0, :neurons],
        }
        run_function(operators.NEURON_STATS, feeds, ("float32",), CUDA, True)
        feeds = {"stats": floats[:, :neurons], "weight": np.ones(1, np.float32)}
        mask = feeds | {"thresholds": np.full(2, 0.7, np.float32)}
        _, keep = run_function(operators.SELECT_MASK, mask, ("int32", "bool"), CUDA, True, layer=1)
        run_function(operators.TAIL_MEAN, feeds | {"keep": keep, "w_down": draw(neurons, 577)}, (dtype,), CUDA, True)
    for inputs, outputs, tokens in ((577, 33, 1), (264, 1025, 5), (4096, 40, 1), (4360, 40, 2)):
        feeds = {"x": draw(1, tokens, inputs), "weight": draw(outputs, inputs)}
        run_function(operators.LINEAR, feeds, (dtype,), CUDA, True, early=1)
    for hidden in (577, 4096, 8200):
        feeds = {"x": draw(1, 3, hidden), "residual": draw(1, 3, hidden), "weight": draw(hidden), "bias": draw(hidden)}
        run_function(operators.ADD_BIAS_NORM, feeds, (dtype, dtype), CUDA, True, epsilon=1e-5, early=1)
    run_function(operators.GREEDY_TOKEN, {"logits": floats[None, :, :777]}, ("int64",), CUDA, True)


# The last has more slices of columns than blocks that run at once.
ROW_SHAPES = [(33, 577, 1), (700, 264, 5), (3000, 1024, 1), (9, 8, 4), (40, 9000, 1), (300, 403 * 256, 1)]


def rows(rng: np.random.Generator, dtype: str) -> None:
    for bias, early in ((True, False), (False, True)):
        session = row_session(bias=bias, early=early, dtype=dtype)
        for inputs, outputs, tokens in ROW_SHAPES:
            feeds = random_rows(rng, tokens=tokens, inputs=inputs, outputs=outputs, dtype=dtype, zeros=0.2)
            for density in (0.0, 0.4, 1.0):
                feeds["price"] = price_for(feeds, density)
                assert np.isfinite(run(session, feeds).astype(np.float32)).all()


CODE_SHAPES = [
    *((33, 577, 1), (300, 4096, 1), (4096, 4096, 1), (300, 8192, 1), (300, 12288, 1)),
    *((90, 264, 5), (300, 4096, 40)),
]


def codes(rng: np.random.Generator, dtype: str) -> None:
    """Run rows and products of integers, with every number of columns that a thread loads."""
    for format in (integer_format(4), integer_format(8)):
        for inputs, outputs, tokens in CODE_SHAPES:
            feeds, _ = row_feeds(rng, format, inputs, outputs, tokens, dtype)
            del feeds["tolerance"]
            for early in (False, True):
                session = code_session(format, outputs, rows=True, bias=True, dtype=dtype, early=early)
                for density in (0.0, 0.4, 1.0):
                    feeds["price"] = price_for(feeds, density)
                    assert np.isfinite(run(session, feeds).astype(np.float32)).all()
            stored = random_codes(rng, format, inputs, outputs)
            x = rng.standard_normal((1, tokens, outputs)).astype(NUMPY_DTYPES[dtype])
            session = code_session(format, outputs, rows=False, dtype=dtype)
            assert np.isfinite(run(session, feeds_of(stored, x)).astype(np.float32)).all()


def fused(rng: np.random.Generator, dtype: str, bits_of_codes: tuple[int, ...] = (0, 4, 8)) -> None:
    """Products that make their own inputs, wide and narrow, with every number of columns that a thread loads."""
    for bits in bits_of_codes:
        for inputs, outputs, tokens in ((33, 577, 1), (304, 4096, 1), (8200, 264, 1), (300, 12288, 1), (90, 264, 5)):
            for kind, early in ((kind, early) for kind in AHEAD for early in (False, True)):
                feeds = fused_feeds(rng, kind, bits, tokens=tokens, inputs=inputs, outputs=outputs, dtype=dtype)
                session = fused_session(kind, bits, outputs, dtype=dtype, fused=True, early=early)
                for price in (0.0, 0.3, np.inf):
                    feeds["price"][:] = price
                    for result in run_all(session, feeds):
                        assert np.isfinite(result.astype(np.float32)).all()


def sums(rng: np.random.Generator, dtype: str) -> None:
    """Products that add a residual, and the norms of the sums."""
    for bits in (0, 4, 8):
        for *sizes, tokens in ((33, 544, 577, 1), (304, 4096, 264, 1), (90, 256, 264, 5), (64, 96, 40, 40)):
            inputs, hidden, outputs = sizes
            for kind in ADDING:
                feeds = layer_feeds(rng, kind, bits, (inputs, hidden, outputs), tokens=tokens, dtype=dtype)
                session = layer_session(kind, bits, inputs, hidden, outputs, dtype=dtype, sums=True)
                for result in run_all(session, feeds):
                    assert np.isfinite(result.astype(np.float32)).all()


def attention(rng: np.random.Generator, dtype: str) -> None:
    for kv in ("float", "int8"):
        for size, heads, kv_heads in ((16, 3, 1), (48, 2, 1), (128, 8, 1), (256, 1, 1), (64, 96, 32), (128, 40, 40)):
            form = AttentionForm(heads=heads, kv_heads=kv_heads, size=size, window=300 * (heads == 3), kv=kv)
            session = attention_session(form, dtype=dtype)
            for tokens, past in ((1, 0), (1, 700), (5, 61), (17, 3)):
                feeds = random_attention(rng, form, tokens=tokens, past=past, dtype=dtype)
                values = {name: ort_value(value) for name, value in feeds.items()}
                (attended,) = session.run_with_ort_values(["attended"], values)
                assert np.isfinite(array_of(attended).astype(np.float32)).all()


PARTS: dict[str, Callable[[np.random.Generator, str], None]] = {
    "ffn": ffn,
    "functions": functions,
    "rows": rows,
    "codes": codes,
    **{f"fused{bits}": partial(fused, bits_of_codes=(bits,)) for bits in (0, 4, 8)},
    "sums": sums,
    "attention": attention,
}


if __name__ == "__main__":
    for dtype in [name for name in sys.argv[1:] if name not in PARTS] or ("float16", "bfloat16"):
        for part in [name for name in sys.argv[1:] if name in PARTS] or PARTS:
            PARTS[part](np.random.default_rng(0), dtype)
            print(f"{part} ran in {dtype}", flush=True)
