"""benchmarks/peer_quality.py: bytes, de-quantised weights of peers, and the comparison."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tda_export.packing import RowBytes
from tda_export.weights.formats import integer_format

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS, COLUMNS, BLOCK = 6, 64, 32


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name: str) -> ModuleType:
        return importlib.import_module(name)

    return by_name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_matrices_of_genai_are_those_that_onnx_runtime_multiplies_by(
    bits: int, zero_points: bool, tmp_path: Path, load: Any
) -> None:
    random = np.random.default_rng(bits)
    blocks = COLUMNS // BLOCK
    arrays = {
        "codes": random.integers(0, 256, (ROWS, blocks, BLOCK * bits // 8), np.uint8),
        "scales": random.uniform(0.5, 2, (ROWS, blocks)).astype(np.float32),
    }
    if zero_points:
        arrays["zeros"] = random.integers(0, 256, (ROWS, blocks * bits // 8), np.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], name="/lm_head/MatMul_Q4", domain="com.microsoft",
        K=COLUMNS, N=ROWS, bits=bits, block_size=BLOCK, accuracy_level=1,
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [COLUMNS, COLUMNS]), ("y", [COLUMNS, ROWS]))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "graph", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    (multiplied,) = onnxruntime.InferenceSession(path).run(None, {"x": np.eye(COLUMNS, dtype=np.float32)})
    ((name, matrix, size),) = load("stored_models").onnx_matrices(path)
    assert name == "lm_head"
    assert size == sum(array.nbytes for array in arrays.values())
    np.testing.assert_allclose(matrix.numpy(), multiplied.T, rtol=1e-6)


def test_bytes_of_rows_are_those_of_their_formats(load: Any) -> None:
    script = load("peer_quality")

    class Spec:
        num_layers, hidden_size, ffn_size, num_heads, num_kv_heads, head_size = 2, 64, 96, 2, 1, 32
        embedding_width, vocab_size = 64, 32
        ffn_parts = ("gate", "up", "down")

    formats = {f"layers.{i}.{part}": integer_format(4) for i in range(2) for part in "qkvo"}
    half = {part: torch.full((2,), 0.5) for part in ("q", "k", "v", "o", "gate", "up", "down")}
    row = {64: 32 + 2 * 2 + 1, 32: 16 + 2 + 1}  # codes, float16 scales, zero points
    attention = 64 * (2 * row[64] + 2 * row[32])
    ffn = 2 * (64 * 96 * 2 + 96 * 64)
    assert script.linear_bytes(RowBytes(2, formats), Spec, half) == 0.5 * 2 * (attention + ffn)


def test_a_peer_is_compared_with_the_best_of_ours_that_reads_no_more(load: Any) -> None:
    script = load("peer_quality")

    def row(name: str, megabytes: float, kl: float, series: str) -> dict[str, Any]:
        ours = {"name": name, "label": name, "series": series, "ours": name.startswith("ours")}
        return {**ours, "megabytes": megabytes, "head_megabytes": 1.0, "kl": kl, "stderr": 0.01, "agreement": 0.9}

    rows = [
        row("peer", 8.0, 0.2, "peer"),
        row("ours int4", 7.0, 0.1, "ours int4"),
        row("ours, half", 4.0, 0.3, "ours int4"),
        row("ours int8", 9.0, 0.01, "ours int8"),
        row("small peer", 2.0, 0.5, "peer"),
    ]
    lines = list(script.table(rows))
    assert lines[2].endswith("| ours int4: 7.0 MB, 0.1000 |")
    assert lines[6].endswith("| none |")
    drawn = script.chart(rows)
    assert drawn.count("prefers-color-scheme:dark") == 1
    assert drawn.count("<circle") + drawn.count("<rect") + drawn.count("<polygon") >= len(rows)
