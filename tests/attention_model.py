"""Models of one node of attention, and the slow reference: one token and head at a time, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from hypothesis import strategies as st

from tda_export.graph import kv_formats, operators
from tda_export.graph.attention_function import (
    attention_functions,
    attention_node,
    stored_attention_functions,
    stored_attention_node,
)
from tda_export.graph.cache_formats import CACHE_FORMATS, hadamard
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tests.ffn_model import NUMPY_DTYPES, PROVIDERS
from tests.sessions import small_session

NUMBERS = ("last_index", "buffer")  # int32
TABLES = ("cos_cache", "sin_cache")


@dataclass(frozen=True)
class AttentionForm:
    """Attributes of an attention. `window` and `softcap` 0 mean none, `scale` 0 the default. `kv`: how the
    cache is stored."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    packed: bool = False
    rotary: bool = True
    interleaved: bool = False
    window: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    kv: str = kv_formats.KV_FLOAT

    @property
    def codes(self) -> bool:
        """Whether the cache holds codes."""
        return self.kv == kv_formats.KV_INT8

    @property
    def inputs(self) -> list[str]:
        """Return the names of the node's inputs."""
        left_out = {*(("key", "value") if self.packed else ()), *(() if self.rotary else TABLES)}
        names = operators.ATTENTION_8_INPUTS if self.codes else operators.ATTENTION_INPUTS
        return [name for name in names if name not in left_out]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the node's outputs."""
        return operators.ATTENTION_8_OUTPUTS if self.codes else operators.ATTENTION_OUTPUTS

    def dtype_of(self, name: str, dtype: str) -> str:
        """Return the dtype of an input or output if activations have `dtype`."""
        if name in NUMBERS:
            return "int32"
        if name.endswith("_scale"):
            return "float32"
        stored = name in ("past_key", "past_value", "present_key", "present_value")
        return dtype if self.kv == kv_formats.KV_FLOAT or not stored else self.kv


def attention_session(
    form: AttentionForm,
    *,
    native: bool = True,
    threads: int | None = None,
    dtype: str = "float32",
    provider: str | None = None,
    captured: int = 0,
) -> ort.InferenceSession:
    """Make a session on a provider, by default on the CPU for float32 and on CUDA otherwise. Without `native` the
    function body runs. With `captured`, the attention mask's length, calls are captured as a CUDA graph."""
    values = {name: ir.Value(name=name, type=ir.TensorType(DTYPES[form.dtype_of(name, dtype)])) for name in form.inputs}
    ops = Ops()
    given = operators.ATTENTION_8_INPUTS if form.codes else operators.ATTENTION_INPUTS
    inputs = [values.get(name) for name in (given if form.rotary else given[: -len(TABLES)])]
    settings: dict[str, Any] = {
        "num_heads": form.heads,
        "kv_num_heads": form.kv_heads,
        "local_window_size": form.window or -1,
        "do_rotary": int(form.rotary),
        "rotary_interleaved": int(form.interleaved),
        **({"scale": form.scale} if form.scale else {}),
        **({"softcap": form.softcap} if form.softcap else {}),
    }
    if form.kv == kv_formats.KV_FLOAT:
        outputs = attention_node(ops, inputs, width=form.heads * form.size, **settings)
        functions = attention_functions()
    else:
        format = CACHE_FORMATS[form.kv]
        outputs = stored_attention_node(ops, format, inputs, **settings)
        functions = stored_attention_functions(format, form.size)
    for output, name in zip(outputs, form.outputs, strict=True):
        output.name, output.type = name, ir.TensorType(DTYPES[form.dtype_of(name, dtype)])
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    constants = [values.pop("buffer")] if captured else []
    for constant in constants:
        constant.const_value = ir.tensor(np.array(captured, np.int32), name=constant.name)
        constant.shape = ir.Shape([])
    graph = ir.Graph(
        list(values.values()),
        outputs,
        nodes=ops.tape.nodes,
        initializers=constants,
        opset_imports=imports,
        name="attention",
    )
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=functions))
    options = {"enable_cuda_graph": "1"} if captured else {}
    chosen = provider or PROVIDERS[dtype]
    return small_session(model.SerializeToString(), chosen, native=native, threads=threads, **options)


def random_attention(
    rng: np.random.Generator,
    form: AttentionForm,
    *,
    tokens: int,
    past: int,
    room: int | None = None,
    pairs: int | None = None,
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Return random inputs after `past` tokens. The cache holds just these, or has `room` for this many tokens, the
    call's included. `pairs` of a head's elements are rotated, by default all."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype])

    total = past + tokens
    parts = [draw(1, tokens, heads * form.size) for heads in (form.heads, form.kv_heads, form.kv_heads)]
    projected = {"query": np.concatenate(parts, axis=2)} if form.packed else dict(zip(form.inputs, parts, strict=False))
    angles = rng.uniform(0, 6, ((room or total) + 3, form.size // 2 if pairs is None else pairs))
    cache = (1, form.kv_heads, past if room is None else room, form.size)
    past_rows = {"past_key": draw(*cache), "past_value": draw(*cache)}
    if form.kv == kv_formats.KV_FLOAT16:
        past_rows = {name: rows.astype(np.float16) for name, rows in past_rows.items()}
    if form.codes:
        past_rows = {name: rng.integers(-127, 128, cache).astype(np.int8) for name in past_rows}
        scales = {f"{name}_scale": np.abs(draw(*cache[:3])) / 60 for name in past_rows}  # to values of order one
        past_rows |= {name: np.where(rng.random(scale.shape) < 0.05, 0, scale) for name, scale in scales.items()}
        past_rows |= {name: value.astype(np.float32) for name, value in past_rows.items() if name in scales}
    feeds = projected | {
        **past_rows,
        "last_index": np.array([total - 1], np.int32),
        "buffer": np.array(room or total, np.int32),
        "cos_cache": np.cos(angles).astype(NUMPY_DTYPES[dtype]),
        "sin_cache": np.sin(angles).astype(NUMPY_DTYPES[dtype]),
    }
    return {name: feeds[name] for name in form.inputs}


def run_attention(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run as applications with a growing cache do; return the output, and present keys and values."""
    results: list[np.ndarray] = session.run([output.name for output in session.get_outputs()], dict(feeds))
    return results


def run_in_place(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run with the past's buffers as the present's, as the driver does."""
    binding = session.io_binding()
    arrays = {name: value.copy() for name, value in feeds.items()}  # the memory of the values
    values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("attended", "cpu")
    caches = [output.name.replace("present", "past") for output in session.get_outputs()[1:]]
    for past in caches:
        binding.bind_ortvalue_output(past.replace("past", "present"), values[past])
    session.run_with_iobinding(binding)
    return [binding.get_outputs()[0].numpy().copy(), *(arrays[past] for past in caches)]


def reference(
    feeds: Mapping[str, np.ndarray], form: AttentionForm, present: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """Compute the output of attention, float64 [1, S, H D]. Where the cache rounds, it is given after the call."""
    queries, keys, values = _of_call(feeds, form)
    past = _past(feeds)
    if present is not None:
        keys, values = (_stands_for(*stored) for stored in (present[::2], present[1::2]))
    else:
        before = [feeds[name][0, :, :past].astype(np.float64).swapaxes(0, 1) for name in ("past_key", "past_value")]
        keys, values = (np.concatenate(rows) for rows in zip(before, (keys, values), strict=True))  # [T, KV, D]
    return _attended(queries, keys, values, past, form)


def unrounded(feeds: Mapping[str, np.ndarray], form: AttentionForm) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute unrounded codes and scales of the call's keys and values, float64 [S, KV, D] and [S, KV]."""
    found = []
    for rows in unrounded_heads(feeds, form):
        scales = np.abs(rows).max(axis=2) / 127
        found.append((rows / np.where(scales > 0, scales, 1.0)[..., None], scales))
    return found


def unrounded_heads(feeds: Mapping[str, np.ndarray], form: AttentionForm) -> list[np.ndarray]:
    """Compute the call's keys, after rotation, and values as they are before rounding, float64 [S, KV, D]."""
    return _of_call(feeds, form)[1:]


def _past(feeds: Mapping[str, np.ndarray]) -> int:
    tokens, total = feeds["query"].shape[1], int(feeds["last_index"][0]) + 1
    return 0 if tokens == int(feeds["buffer"]) else total - tokens


def _stands_for(stored: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    rows = stored[0].astype(np.float64)
    return (rows if scales is None else rows * scales[0, ..., None]).swapaxes(0, 1)  # [T, KV, D]


def _of_call(feeds: Mapping[str, np.ndarray], form: AttentionForm) -> list[np.ndarray]:
    """Return the call's queries, keys and values after rotation, float64 [S, heads, D]."""
    of: dict[str, Any] = {name: np.asarray(value, np.float64) for name, value in feeds.items() if name not in NUMBERS}
    tokens, past, size = of["query"].shape[1], _past(feeds), form.size
    if form.packed:
        widths = np.cumsum([form.heads * size, form.kv_heads * size])
        of["query"], of["key"], of["value"] = np.split(of["query"], widths, axis=2)

    def heads(name: str) -> np.ndarray:
        return of[name][0].reshape(tokens, -1, size)  # [S, heads, D]

    def rotated(rows: np.ndarray) -> np.ndarray:
        if not form.rotary:
            return rows
        cos, sin = (of[name][past : past + tokens, None] for name in TABLES)  # [S, 1, pairs]
        pairs, out = cos.shape[2], rows.copy()
        first, second = (
            (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
            if form.interleaved
            else (slice(0, pairs), slice(pairs, 2 * pairs))
        )
        out[..., first] = rows[..., first] * cos - rows[..., second] * sin
        out[..., second] = rows[..., second] * cos + rows[..., first] * sin
        return out

    queries, keys = rotated(heads("query")), rotated(heads("key"))
    if form.codes:
        queries, keys = (rows @ hadamard(size).astype(np.float64) for rows in (queries, keys))
    return [queries, keys, heads("value")]


def _attended(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, past: int, form: AttentionForm) -> np.ndarray:
    tokens, size = queries.shape[0], form.size
    attended = np.zeros((1, tokens, form.heads, size))
    for t in range(tokens):
        end = past + t + 1
        seen = slice(max(0, end - form.window) if form.window else 0, end)
        for h in range(form.heads):
            kv = h // (form.heads // form.kv_heads)
            with np.errstate(invalid="ignore"):  # tests of what is not finite
                scores = keys[seen, kv] @ queries[t, h] * (form.scale or size**-0.5)
                if form.softcap:
                    scores = np.tanh(scores / form.softcap) * form.softcap
                weights = np.exp(scores - scores.max())
            attended[0, t, h] = weights @ values[seen, kv] / weights.sum()
    return attended.reshape(1, tokens, -1)


@st.composite
def forms(
    draw: st.DrawFn, sizes: tuple[int, ...], kv: str = kv_formats.KV_FLOAT, kv_heads: tuple[int, ...] = (1, 2, 3)
) -> AttentionForm:
    """Draw a form with one of these head sizes, and numbers of heads. `kv`: how the cache is stored."""
    shared = draw(st.sampled_from(kv_heads))
    return AttentionForm(
        heads=shared * draw(st.sampled_from([1, 2, 3, 4, 5, 9])),
        kv_heads=shared,
        size=draw(st.sampled_from(sizes)),
        packed=draw(st.booleans()),
        rotary=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 300])),
        scale=draw(st.sampled_from([0.0, 0.0, 0.05, 0.3])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.7, 50.0])),
        kv=kv,
    )
