"""Kernels and bodies of the other functions against plain numpy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.graph import contract, operators
from tda_export.graph.greedy import greedy_token_function
from tda_export.graph.linear import linear_functions
from tda_export.graph.method import griffin, tda
from tda_export.graph.ops import DTYPES, IR_VERSION, MICROSOFT, OPSET, Ops
from tda_export.graph.statistics import neuron_stats_function, select_mask_function, tail_mean_function
from tests.ffn_model import NUMPY_DTYPES, TOLERANCES, array_of, ort_value
from tests.sessions import CPU, CUDA, small_session

HALF = ["float16", "bfloat16"]
FUNCTIONS = {
    operators.NEURON_STATS: neuron_stats_function(tda()),
    operators.SELECT_MASK: select_mask_function(),
    operators.TAIL_MEAN: tail_mean_function(),
    operators.GREEDY_TOKEN: greedy_token_function(),
} | {function.name: function for function in linear_functions()}


@functools.cache
def session(
    name: str,
    inputs: tuple[tuple[str, str], ...],
    outputs: tuple[str, ...],
    provider: str,
    native: bool,
    attributes: tuple[tuple[str, Any], ...] = (),
) -> ort.InferenceSession:
    """Make a session of one node. `inputs` are names and dtypes, `outputs` dtypes."""
    ops = Ops()
    values = [ir.Value(name=each, type=ir.TensorType(DTYPES[dtype])) for each, dtype in inputs]
    results = ops.multi(
        name, *values, outputs=[True] * len(outputs), domain=operators.FUNCTION_DOMAIN, **dict(attributes)
    )
    for number, (value, dtype) in enumerate(zip(results, outputs, strict=True)):
        value.name, value.type = f"output_{number}", ir.TensorType(DTYPES[dtype])
    function = FUNCTIONS[name]
    if name == operators.NEURON_STATS and len(inputs) == 4:
        function = neuron_stats_function(griffin(0.5))
    imports = {"": OPSET, MICROSOFT: 1, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(values, results, nodes=ops.tape.nodes, opset_imports=imports, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[function]))
    return small_session(model.SerializeToString(), provider, native=native)


def run(
    name: str, feeds: dict[str, np.ndarray], outputs: tuple[str, ...], provider: str, native: bool, **attributes: Any
) -> list[np.ndarray]:
    inputs = tuple((key, str(value.dtype)) for key, value in feeds.items())
    call = session(name, inputs, outputs, provider, native, tuple(sorted(attributes.items())))
    values = {key: ort_value(value) for key, value in feeds.items()}
    results = call.run_with_ort_values([node.name for node in call.get_outputs()], values)
    return [array_of(value) for value in results]


WAYS = [
    pytest.param(CPU, False, "float32", id="body-float32"),
    *(pytest.param(CUDA, True, dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in HALF),
]


@pytest.mark.parametrize(("provider", "native", "dtype"), WAYS)
@settings(max_examples=60)
@given(
    tokens=st.sampled_from([1, 2, 5, 17, 64, 130, 700]),
    neurons=st.one_of(st.integers(1, 40), st.sampled_from([96, 264, 2048, 2056, 3001])),
    magnitude=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_neuron_stats(
    provider: str, native: bool, dtype: str, tokens: int, neurons: int, magnitude: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((1, tokens, neurons)).astype(NUMPY_DTYPES[dtype])
    counted = rng.random(tokens) < 0.7
    h[0, ~counted] = np.inf  # tokens that do not count may have any values
    h[0, rng.random(tokens) < 0.1] = 0  # and a token may have no activation at all
    past, decay = rng.random((2, neurons)).astype(np.float32), np.array([0.75], np.float32)
    norms = rng.uniform(0.5, 2, neurons).astype(np.float32) if magnitude else np.ones(neurons, np.float32)
    feeds = {"h": h, "counted": counted, "past_stats": past, "decay": decay}
    feeds |= {"squared_norms": norms} if magnitude else {}
    if not native:
        feeds["h"] = h = np.where(np.isinf(h), 3, h)  # the body multiplies by 0, which keeps inf
    (present,) = run(operators.NEURON_STATS, feeds, ("float32",), provider, native)
    values = np.where(counted[:, None], np.asarray(h[0], np.float64), 0)
    squares = values**2 * norms
    total = squares.sum(axis=1, keepdims=True)
    expected = 0.75 * past + np.stack([(squares / np.where(total > 0, total, 1)).sum(axis=0), values.sum(axis=0)])
    np.testing.assert_allclose(present, expected, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("provider", "native"), [(CPU, False), pytest.param(CUDA, True, marks=pytest.mark.gpu)], ids=["body", "cuda"]
)
@settings(max_examples=80)
@given(
    neurons=st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 11008, 12288, 12289, 20000])),
    weight=st.sampled_from([0.0, 1.0, 37.0]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_select_mask(provider: str, native: bool, neurons: int, weight: float, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats = rng.random((2, neurons)).astype(np.float32)
    scores = np.sqrt(stats[0] / np.float32(max(weight, 1e-30)))
    threshold = float(np.quantile(scores, 1 - density)) if 0 < density < 1 else (0.0 if density else 1e9)
    feeds = {
        "stats": stats,
        "weight": np.array([weight], np.float32),
        "thresholds": np.array([9.0, threshold], np.float32),
    }
    indices, keep = run(operators.SELECT_MASK, feeds, ("int32", "bool"), provider, native, layer=1)
    expected = (scores >= np.float32(threshold)) | (weight <= 0)
    np.testing.assert_array_equal(keep, expected)
    assert indices[indices >= 0].tolist() == np.flatnonzero(expected).tolist()
    if native:  # the kernel pads to all neurons, after the mask
        assert len(indices) == neurons
        assert (indices[expected.sum() :] == contract.PADDING_INDEX).all()


@pytest.mark.parametrize(("provider", "native", "dtype"), WAYS)
@settings(max_examples=40)
@given(
    neurons=st.one_of(st.integers(1, 40), st.sampled_from([96, 3001])),
    hidden=st.one_of(st.integers(1, 40), st.sampled_from([64, 264, 577, 1024])),
    weight=st.sampled_from([0.0, 1.0, 37.0]),
    seed=st.integers(0, 2**16),
)
def test_tail_mean(
    provider: str, native: bool, dtype: str, neurons: int, hidden: int, weight: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    stats = rng.standard_normal((2, neurons)).astype(np.float32) * np.float32(weight)
    keep = rng.random(neurons) < 0.5
    down = (rng.standard_normal((neurons, hidden)) * neurons**-0.5).astype(NUMPY_DTYPES[dtype])
    feeds = {"stats": stats, "weight": np.array([weight], np.float32), "keep": keep, "w_down": down}
    (tail,) = run(operators.TAIL_MEAN, feeds, (dtype,), provider, native)
    means = np.where(keep, 0, stats[1] / max(weight, 1e-30)).astype(np.float64)
    expected = means @ down.astype(np.float64)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(tail.astype(np.float64), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize(
    ("provider", "native"),
    [(CPU, False), (CPU, True), pytest.param(CUDA, True, marks=pytest.mark.gpu)],
    ids=["body", "cpu", "cuda"],
)
@settings(max_examples=80)
@given(
    vocabulary=st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 8192, 50000])),
    tokens=st.integers(1, 3),
    spoiled=st.sampled_from([None, np.nan, np.inf, -np.inf]),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 2**16),
)
def test_greedy_token(
    provider: str, native: bool, vocabulary: int, tokens: int, spoiled: float | None, levels: int, seed: int
) -> None:
    """The first of equal logits is taken; -1 exactly for tokens with a logit that is not finite."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-levels, levels, (1, tokens, vocabulary)).astype(np.float32)
    expected = logits.argmax(axis=2)
    if spoiled is not None:
        logits[0, 0, rng.integers(vocabulary)] = spoiled
        expected[0, 0] = -1
    (chosen,) = run(operators.GREEDY_TOKEN, {"logits": logits}, ("int64",), provider, native)
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize(("provider", "native", "dtype"), WAYS)
@settings(max_examples=60)
@given(
    inputs=st.one_of(st.integers(1, 70), st.sampled_from([8, 256, 264, 577, 2560, 4096, 4360])),
    outputs=st.one_of(st.integers(1, 40), st.sampled_from([96, 1025])),
    tokens=st.sampled_from([1, 2, 4, 5, 19]),
    seed=st.integers(0, 2**16),
)
def test_linear(provider: str, native: bool, dtype: str, inputs: int, outputs: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, tokens, inputs)).astype(NUMPY_DTYPES[dtype])
    weight = (rng.standard_normal((outputs, inputs)) * inputs**-0.5).astype(NUMPY_DTYPES[dtype])
    (y,) = run(operators.LINEAR, {"x": x, "weight": weight}, (dtype,), provider, native, early=seed % 2)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=0, atol=5 * TOLERANCES[dtype])


@pytest.mark.parametrize(("provider", "native", "dtype"), [*WAYS, pytest.param(CPU, True, "float32", id="cpu")])
@settings(max_examples=60)
@given(
    hidden=st.one_of(st.integers(1, 70), st.sampled_from([8, 577, 1024, 1025, 4096, 8192, 8200, 16384])),
    tokens=st.sampled_from([1, 2, 19]),
    biased=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_add_norm(provider: str, native: bool, dtype: str, hidden: int, tokens: int, biased: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, residual = rng.standard_normal((2, 1, tokens, hidden)).astype(NUMPY_DTYPES[dtype])
    weight, bias = rng.standard_normal((2, hidden)).astype(NUMPY_DTYPES[dtype])
    feeds = {"x": x, "residual": residual, "weight": weight} | ({"bias": bias} if biased else {})
    name = operators.ADD_BIAS_NORM if biased else operators.ADD_NORM
    normed, total = run(name, feeds, (dtype, dtype), provider, native, epsilon=1e-5, early=seed % 2)
    expected = sum(np.asarray(feeds[key], np.float64) for key in feeds if key != "weight")
    np.testing.assert_allclose(total.astype(np.float64), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    root = np.sqrt((expected**2).mean(axis=-1, keepdims=True) + 1e-5)
    scaled = expected / root * weight.astype(np.float64)
    np.testing.assert_allclose(normed.astype(np.float64), scaled, rtol=0, atol=TOLERANCES[dtype] * 8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "feeds", "outputs", "message"),
    [
        (
            operators.LINEAR,
            {"x": (1, 3), "weight": (4, 2)},
            1,
            r"x: expected shape \[.., 2\], as w has 2 columns, got \[1, 3\]",
        ),
        (operators.LINEAR, {"x": (1, 0), "weight": (4, 0)}, 1, r"weight: a product of no inputs, shape \[4, 0\]"),
        (operators.LINEAR, {"x": (1, 3), "weight": (3,)}, 1, r"weight: expected shape \[outputs, inputs\], got \[3\]"),
        (operators.ADD_NORM, {"x": (1, 3), "residual": (1, 3), "weight": (2,)}, 2, r"x: expected shape \[.., 2\]"),
        (
            operators.ADD_NORM,
            {"x": (1, 2), "residual": (2, 2), "weight": (2,)},
            2,
            r"residual: expected shape \[1, 2\]",
        ),
    ],
)
def test_shapes_that_do_not_fit(name: str, feeds: dict[str, tuple], outputs: int, message: str) -> None:
    arrays = {key: np.ones(shape, np.float16) for key, shape in feeds.items()}
    with pytest.raises(Exception, match=f"tda::{name}: {message}"):
        run(name, arrays, ("float16",) * outputs, CUDA, True, **({"epsilon": 1e-5} if outputs == 2 else {}))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": (1, 3), "residual": (1, 3), "weight": (2,)}, r"AddNorm: x: expected shape \[.., 2\], got \[1, 3\]"),
        (
            {"x": (1, 2), "residual": (2, 2), "weight": (2,)},
            r"AddNorm: residual: expected shape \[1, 2\], got \[2, 2\]",
        ),
        (
            {"x": (1, 2), "residual": (1, 2), "weight": (2,), "bias": (3,)},
            r"AddBiasNorm: bias: expected shape \[2\], got \[3\]",
        ),
    ],
)
def test_norms_on_the_cpu_whose_shapes_do_not_fit(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    feeds = {key: np.ones(shape, np.float32) for key, shape in shapes.items()}
    name = operators.ADD_BIAS_NORM if "bias" in shapes else operators.ADD_NORM
    with pytest.raises(Exception, match=f"tda::{message}"):
        run(name, feeds, ("float32", "float32"), CPU, True, epsilon=1e-5)
