"""The kernel of Subgraph: what it is told, its threads, and the memory between its nodes."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_export.graph import operators
from tda_export.graph.ops import DTYPES, IR_VERSION, OPSET
from tda_export.graph.subgraph import KERNELS, NODES
from tests.sessions import CPU, small_session

ATTRIBUTES = (
    "columns=32 group=32 early=0 epsilon=1e-05 activation=silu num_heads=2 kv_num_heads=1 local_window_size=-1 "
    "scale=0.0 softcap=0.0 do_rotary=0 rotary_interleaved=0 width=32"
)


def session(
    text: str, inputs: Sequence[str], outputs: Sequence[str], threads: int | None = None
) -> ort.InferenceSession:
    """Make a session of one Subgraph, with inputs and outputs of these dtypes."""
    taken = [ir.Value(name=f"i{place}", type=ir.TensorType(DTYPES[dtype])) for place, dtype in enumerate(inputs)]
    node = ir.Node(
        operators.FUNCTION_DOMAIN, operators.SUBGRAPH, taken, [ir.AttrString(NODES, text)], num_outputs=len(outputs)
    )
    for place, (value, dtype) in enumerate(zip(node.outputs, outputs, strict=True)):
        value.name, value.type = f"o{place}", ir.TensorType(DTYPES[dtype])
    imports = {"": OPSET, operators.FUNCTION_DOMAIN: 1}
    graph = ir.Graph(taken, node.outputs, nodes=[node], opset_imports=imports, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return small_session(model, CPU, threads=threads)


# The dtypes of inputs, by operator; those of products come from their forms.
INPUTS = {
    operators.CALL_START: ("int64", "int64", "float32"),
    operators.GATED_ACTIVATION: ("float32",),
    operators.ADD_NORM: ("float32",) * 3,
    operators.ADD_BIAS_NORM: ("float32",) * 4,
    operators.ATTENTION: (*("float32",) * 5, "int32", "int32"),
    operators.ATTENTION_16: (*("float32",) * 3, "float16", "float16", "int32", "int32"),
    operators.ATTENTION_8: (*("float32",) * 3, "int8", "int8", "float32", "float32", "int32", "int32"),
    operators.GREEDY_TOKEN: ("float32",),
}


def inputs_of(name: str) -> tuple[str, ...]:
    if name in INPUTS:
        return INPUTS[name]
    ahead = 3 if name.startswith(operators.NORM_ROW_LINEAR) else 1
    weight = ("float32",) if name[-1] not in "48" else ("uint8", "float16", "uint8")
    after = ("float32",) * 2 if operators.ROW_LINEAR in name else ()
    left_out = ("",) if name.startswith(operators.GATED_ROW_LINEAR) else ()
    return (*("float32",) * ahead, *left_out, *weight, *after)


def outputs_of(name: str) -> tuple[str, ...]:
    names = {dtype: text for text, dtype in DTYPES.items()}
    count = {operators.CALL_START: 3, operators.ATTENTION_8: 5}
    pair = name.startswith(operators.NORM_ROW_LINEAR) or name in (operators.ADD_NORM, operators.ADD_BIAS_NORM)
    number = count.get(name, 3 if name in (operators.ATTENTION, operators.ATTENTION_16) else 1 + pair)
    return tuple(names[KERNELS[name][min(place, len(KERNELS[name]) - 1)]] for place in range(number))


@pytest.mark.parametrize("name", KERNELS)
def test_every_operator_has_a_kernel(name: str) -> None:
    """Those that `group` takes are those that the library knows, with these inputs and as many outputs."""
    inputs, outputs = inputs_of(name), outputs_of(name)
    given = [dtype for dtype in inputs if dtype]
    numbers = itertools.count()
    taken = ",".join(f"i{next(numbers)}" if dtype else "-" for dtype in inputs)
    places = ",".join(f"o{place}" for place in range(len(outputs)))
    session(f"{name} {taken} {places} {ATTRIBUTES}", given, outputs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GreedyToken", "nodes: 'GreedyToken' is no operator with inputs and outputs"),
        ("Nothing i0 o0", "nodes: there is no kernel Nothing on the CPU"),
        ("GreedyToken i0 o0 early", "nodes: 'early' is no attribute with a value"),
        ("GreedyToken i0 o0,v0", "nodes: GreedyToken: outputs: expected 1, got 2"),
        ("GreedyToken i0,i0 o0", "nodes: GreedyToken: inputs: expected at most 1, got 2"),
        ("GreedyToken v0 o0", "nodes: GreedyToken reads what no node before it gives"),
        ("GreedyToken o0 o0", "nodes: GreedyToken reads what no node before it gives"),
        ("GreedyToken i0 i0", "nodes: GreedyToken cannot give what is an input, or nothing"),
        ("GreedyToken i0 -", "nodes: GreedyToken cannot give what is an input, or nothing"),
        ("GreedyToken x0 o0", "nodes: there is no tensor 'x0'"),
        ("GreedyToken i o0", "nodes: there is no tensor 'i'"),
        ("GreedyToken i1x o0", "nodes: there is no tensor 'i1x'"),
        ("GreedyToken i9999999 o0", "nodes: there is no tensor 'i9999999'"),
        ("AddNorm i0,i0,i0 o0,v0", "AddNorm: AddNorm has no attribute 'epsilon'"),
        ("AddNorm i0,i0,i0 o0,v0 epsilon=1e-05x", "AddNorm: attribute 'epsilon': '1e-05x' is no number"),
        ("AddNorm i0,i0 o0,v0 epsilon=1", "nodes: AddNorm: input 2 is missing"),
        ("AddNorm i0,-,i0 o0,v0 epsilon=1", "nodes: AddNorm: input 1 is missing"),
        ("GreedyToken i0 v0\nGreedyToken i0 v0", "nodes: GreedyToken gives what a node before it gives"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(Exception, match="tda::Subgraph: ") as raised:
        session(text, ["float32"], ["int64"])
    assert f"tda::Subgraph: {message}" in str(raised.value)


def test_an_error_names_the_node() -> None:
    made = session("AddNorm i0,i1,i2 o0,v0 epsilon=1e-05", ["float32"] * 3, ["float32"])
    feeds = {"i0": np.ones((1, 4), "f4"), "i1": np.ones((1, 5), "f4"), "i2": np.ones(4, "f4")}
    with pytest.raises(Exception, match="tda::Subgraph: AddNorm: residual: "):
        made.run(None, feeds)
    # The threads of a call that failed have left, and the next call works.
    (found,) = made.run(None, feeds | {"i1": np.ones((1, 4), "f4")})
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("text", "inputs", "message"),
    [
        ("GreedyToken i0 o0", ["int64"], "GreedyToken: input 0: expected element type 1, got 7"),
        ("GreedyToken i3 o0", ["float32"], "GreedyToken: input 0 is missing"),
        ("GreedyToken i0 v0\nGreedyToken v0 o0", ["float32"], "GreedyToken: input 0: expected element type 1, got 7"),
        ("GreedyToken i0 o3", ["float32"], "GreedyToken: the node has no output 3"),
    ],
)
def test_tensors_of_a_call(text: str, inputs: list[str], message: str) -> None:
    """ONNX Runtime takes any tensors."""
    made = session(text, inputs, ["int64"])
    with pytest.raises(Exception, match=f"tda::Subgraph: {message}"):
        made.run(None, {"i0": np.ones((1, 1, 4), inputs[0])})


# Products of a square matrix, one after another: x @ w, n times.
WIDTH = 96


def chain(length: int) -> str:
    names = ["i0", *(f"v{number}" for number in range(length - 1)), "o0"]
    return "\n".join(f"RowLinear {x},i1,i2,i3 {y}" for x, y in itertools.pairwise(names))


def chain_feeds(tokens: int, seed: int) -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    w = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0].astype("f4")
    return {
        "i0": rng.standard_normal((1, tokens, WIDTH)).astype("f4"),
        "i1": w,
        "i2": np.ones(WIDTH, "f4"),
        "i3": np.zeros(1, "f4"),
    }


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 40),
    calls=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    threads=st.sampled_from([1, 2, 3, 8]),
)
def test_calls_of_any_size(length: int, calls: list[int], threads: int) -> None:
    """Tensors between nodes share memory, which grows with the tokens of a call; any number of threads helps."""
    made, single = (session(chain(n), ["float32"] * 4, ["float32"], threads) for n in (length, 1))
    for seed, tokens in enumerate(calls):
        feeds = chain_feeds(tokens, seed)
        (found,) = made.run(None, feeds)
        expected = feeds["i0"]
        for _ in range(length):
            (expected,) = single.run(None, {**feeds, "i0": expected})
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_calls_at_the_same_time(threads: int) -> None:
    """Each has tensors of its own, and a team of its own."""
    made = session(chain(30), ["float32"] * 4, ["float32"], threads)
    cases = [chain_feeds(tokens, tokens) for tokens in (1, 2, 3, 9)]
    expected = [made.run(None, feeds)[0] for feeds in cases]

    def repeat(case: int) -> None:
        for _ in range(100):
            np.testing.assert_array_equal(made.run(None, cases[case])[0], expected[case])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(repeat, range(4)))


def test_a_tensor_inside_of_another_dtype() -> None:
    """A token from logits that a product gives, and those logits as well."""
    text = "RowLinear i0,i1,i2,i3 o0\nGreedyToken o0 o1"
    made = session(text, ["float32"] * 4, ["float32", "int64"])
    logits, tokens = made.run(None, chain_feeds(3, 0))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_inputs_that_are_left_out() -> None:
    """Gate and up side by side: `up` is left out."""
    made = session("GatedActivation i0,- o0 activation=relu", ["float32"], ["float32"])
    both = np.array([[[1.0, -2.0, 3.0, 4.0]]], "f4")
    np.testing.assert_array_equal(made.run(None, {"i0": both})[0], np.array([[[3.0, 0.0]]], "f4"))
