"""Helpers of the tests of several commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import run_ok

PROMPT = "The sea is calm tonight"
CHECK_NAMES = [
    "files match their hashes",
    "prefill.onnx passes onnx.checker",
    "decode.onnx passes onnx.checker",
    "decode_explicit.onnx passes onnx.checker",
    "manifest is that of the graphs",
    "prefill logits",
    "neuron scores",
    "selection of the mask",
    "tail mean",
    "decode with the prompt's mask",
    "decode token by token",
    "decode with token thresholds",
    "keys and values after chunked prefill",
    "mask after chunked prefill",
    "decode with all neurons",
    "decode with every second neuron",
    "statistics with the prior",
]


def result_of(*arguments: object) -> Any:
    """Run with --json, and require that standard output is only JSON."""
    result = run_ok(*arguments, "--json")
    assert result.stderr == ""
    return json.loads(result.stdout)


def generated(artifact: Path, *options: object) -> Any:
    return result_of("generate", artifact, PROMPT, "--max-new-tokens", 24, *options)
