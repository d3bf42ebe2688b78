"""Compare a loaded graph's inputs and outputs with the contract, before anything is bound to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from tda_export.errors import TdaError, shown
from tda_export.graph.contract import IoTensor

ORT_TYPES = {name: f"tensor({name})" for name in ("int8", "int32", "int64", "float16", "bfloat16")} | {
    "float32": "tensor(float)"
}


def check_graph(
    session: ort.InferenceSession, path: Path, inputs: Sequence[IoTensor], outputs: Sequence[IoTensor]
) -> None:
    """Check a session of an artifact's own graph.

    Args:
        session: A session of the graph.
        path: Its file, for the message.
        inputs: The inputs that the contract lists; the graph may have more if they have a default.
        outputs: The outputs that the contract lists; the graph may have more.

    Raises:
        TdaError: An input or output is missing or has the wrong dtype or size, or an unknown input has no default.
    """
    required = {value.name: value for value in session.get_inputs()}
    given = required | {value.name: value for value in session.get_overridable_initializers()}
    for expected in inputs:
        _check(path, "input", expected, given.get(expected.name))
    for name in sorted(required.keys() - {expected.name for expected in inputs}):
        raise TdaError(_message(path, f"an input '{shown(name)}' that this format does not know"))
    found = {value.name: value for value in session.get_outputs()}
    for expected in outputs:
        _check(path, "output", expected, found.get(expected.name))


def _check(path: Path, kind: str, expected: IoTensor, found: Any) -> None:
    if found is None:
        raise TdaError(_message(path, f"no {kind} {expected.name}"))
    sizes = [size for size in expected.axes if isinstance(size, int)]
    same = len(found.shape) == len(expected.axes) and all(
        one == other for one, other in zip(expected.axes, found.shape, strict=True) if isinstance(one, int)
    )
    if found.type != ORT_TYPES[expected.dtype] or (sizes and not same):
        wanted = f"{expected.dtype} [{', '.join(map(str, expected.axes))}]"
        actual = f"{found.type} {shown(found.shape)}"
        raise TdaError(_message(path, f"an {kind} {expected.name} of {actual} instead of {wanted}"))


def _message(path: Path, problem: str) -> str:
    return f"{path}: the graph has {problem}. Copy or build the artifact again."
