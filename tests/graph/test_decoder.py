"""The arithmetic of a decoder's parts in half precision is exactly PyTorch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator

from tda_export.graph.contract import IoTensor
from tda_export.graph.decoder import GraphBuilder
from tda_export.graph.weights_file import WeightTable
from tda_export.models.source import resolve_model
from tests.tiny import save_tiny_model

Y, SCALED = IoTensor("y", "float16", (1, 9, 64)), IoTensor("scaled", "float16", (1, 9, 64))


def test_a_residual_scale_is_not_rounded_to_half_precision(tmp_path: Path) -> None:
    scale = 0.22  # Granite's; float16 would make it 0.21997
    spec = resolve_model(str(save_tiny_model("granite", tmp_path / "model", residual_multiplier=scale))).spec
    graph = GraphBuilder(spec, WeightTable({}, {}), "float16", [Y])
    graph.outputs[SCALED.name], bias = graph.branch(graph.inputs[Y.name], None, "no norm")
    assert bias is None
    # Not in ONNX Runtime, which computes half precision in float32 on the CPU and drops casts.
    evaluator = ReferenceEvaluator(ir.to_proto(graph.model("branch", [SCALED], {})))
    y = np.random.default_rng(0).standard_normal((1, 9, 64)).astype(np.float16)
    found = evaluator.run(None, {Y.name: y})[0]
    np.testing.assert_array_equal(found, (torch.from_numpy(y) * scale).numpy())
    assert not np.array_equal(found, (torch.from_numpy(y) * torch.tensor(scale, dtype=torch.float16)).numpy())
