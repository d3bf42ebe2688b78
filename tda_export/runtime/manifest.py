"""Check what a manifest holds, so that later code does not fail on, or compute with, impossible values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tda_export.ffn_share import FFN_MATRICES, GATED
from tda_export.graph import contract
from tda_export.graph.contract import DTYPES, ModelShape
from tda_export.graph.kv_formats import KV_FLOAT, KV_FLOAT16, KV_FORMATS
from tda_export.packing import PACKINGS
from tda_export.pricing import PriceTable
from tda_export.runtime.deployment import Refresh
from tda_export.weights.matrix import Matrix, read_matrix

LARGEST_SIZE = 2**31  # of any count
LARGEST_NUMBER = 3e38  # about the largest float32
ROUNDING = 1e-3
RECORDS = ("versions", "model", "spec", "method", "budget", "expected", "calibration", "io", "matrices")


def check_manifest(manifest: dict[str, Any]) -> tuple[ModelShape, dict[str, Matrix]]:
    """Check the fields that the runtime, verify, eval and inspect read later, and return sizes and matrices.

    Raises:
        KeyError: A field is missing; the message names it.
        ValueError: A value is impossible or does not fit the others; the message names it.
        TypeError: A value is of the wrong type, which may also raise AttributeError or ArithmeticError.
    """
    shape = ModelShape(**manifest["shape"], kv=manifest.get("kv", KV_FLOAT))
    for name, value in asdict(shape).items():
        if name not in ("dtype", "kv"):
            _require(_is_size(value) and value > 0, f"shape.{name}")
    _require(shape.dtype in DTYPES.values(), "shape.dtype")
    _require(shape.kv in KV_FORMATS and (shape.kv != KV_FLOAT16 or shape.dtype == "float32"), "kv")
    for name in RECORDS:
        _require(isinstance(manifest[name], dict), name)
    model = manifest["model"]
    _require(all(isinstance(model[key], str) for key in ("name", "fingerprint")), "model.name or model.fingerprint")
    eos = model["eos_token_ids"]
    _require(isinstance(eos, list) and all(_is_size(token) for token in eos), "model.eos_token_ids")
    matrices = {name: read_matrix(name, entry) for name, entry in manifest["matrices"].items()}
    checks = {"indexed": _check_indexed, "priced": _check_priced}
    _require(isinstance(manifest["layout"], str) and manifest["layout"] in checks, "layout")
    _check_budget(manifest["budget"])
    _require(isinstance(model.get("quantization"), dict | None), "model.quantization")
    sparsity, kl = manifest["expected"].get("sparsity"), manifest["expected"].get("kl")
    _require(sparsity is None or _is_number(abs(sparsity), 1), "expected.sparsity")
    _require(kl is None or _is_number(abs(kl), LARGEST_NUMBER), "expected.kl")
    _check_weights(manifest, shape, matrices)
    checks[manifest["layout"]](manifest, shape, matrices)
    # A wrong value would give a wrong figure in every report.
    gated = any(contract.linear_weight(0, stored) in matrices for stored in ("gate", "gate_up"))
    _require(type(model["ffn_matrices"]) is int, "model.ffn_matrices")
    _require(model["ffn_matrices"] == (GATED if gated else min(FFN_MATRICES)), "model.ffn_matrices")
    return shape, matrices


def _check_indexed(manifest: dict[str, Any], shape: ModelShape, matrices: dict[str, Matrix]) -> None:
    _check_method(manifest["method"])
    for name, largest in (("thresholds", LARGEST_NUMBER), ("token_thresholds", LARGEST_NUMBER), ("survivors", 1.0)):
        values = manifest[name]
        fits = isinstance(values, list) and len(values) == shape.num_layers
        _require(fits and all(_is_number(value, largest + ROUNDING) for value in values), name)
    _require(_is_number(manifest["prior_tokens"], LARGEST_SIZE), "prior_tokens")
    refresh = Refresh(**manifest["refresh"])
    _require(_is_size(refresh.tokens) and _is_number(refresh.decay, 1), "refresh")
    head = matrices.get(contract.HEAD)
    _require(head is None or head.major == "output", f"matrices.{contract.HEAD}.major")
    last = contract.ffn_weight(shape.num_layers - 1, "up")
    _require(manifest["weights"][last]["shape"] == [shape.ffn_size, shape.hidden_size], "shape.ffn_size")


def _check_priced(manifest: dict[str, Any], shape: ModelShape, matrices: dict[str, Matrix]) -> None:
    _require(manifest["method"] == {"name": "priced"}, "method")
    _require(manifest["packing"] in PACKINGS, "packing")
    _require(_is_number(manifest["price"], LARGEST_NUMBER), "price")
    if manifest["price_table"] is not None:
        _require(PriceTable.from_dict(manifest["price_table"]).packing == manifest["packing"], "price_table.packing")
    for name, matrix in matrices.items():
        if contract.in_a_layer(name) or (name == contract.HEAD and matrix.major == "input"):
            entry = manifest["weights"][contract.row_price(name)]
            _require(matrix.major == "input", f"matrices.{name}.major")
            _require((entry["shape"], entry["dtype"]) == ([matrix.rows], "float32"), _of(contract.row_price(name)))
        elif contract.row_price(name) in manifest["weights"]:
            _require(False, _of(contract.row_price(name)))


def _check_budget(budget: dict[str, Any]) -> None:
    kinds = {"cett": 1.0, "sparsity": 1.0, "max_kl": LARGEST_NUMBER, "price": LARGEST_NUMBER}
    given = [name for name in kinds if budget.get(name) is not None]
    _require(len(given) == 1 and budget.keys() <= {*kinds, "allocation"}, "budget")
    value = budget[given[0]]
    _require(_is_number(value, kinds[given[0]]) and value < kinds[given[0]], f"budget.{given[0]}")
    _require(given != ["max_kl"] or value > 0, "budget.max_kl")
    _require(budget.get("allocation", "kl") in ("kl", "uniform"), "budget.allocation")


def _check_method(method: dict[str, Any]) -> None:
    _require(isinstance(method["name"], str), "method.name")
    _require(method.get("statistic") in ("magnitude", "activation"), "method.statistic")
    _require(method.get("selection") in ("threshold", "topk"), "method.selection")
    _require(method.get("tail", "zero") in ("zero", "mean"), "method.tail")
    _require(type(method["two_levels"]) is bool, "method.two_levels")
    density = method.get("density")
    if method["selection"] == "topk":
        _require(isinstance(density, float) and 0 < density <= 1, "method.density")
    else:
        _require(density is None, "method.density")


def _check_weights(manifest: dict[str, Any], shape: ModelShape, matrices: dict[str, Matrix]) -> None:
    weights, size = manifest["weights"], manifest["files"][contract.WEIGHTS_FILE]["size"]
    for name, entry in weights.items():
        _require(_is_size(entry["offset"], 2**63) and all(_is_size(n) and n > 0 for n in entry["shape"]), _of(name))
        _require(entry["offset"] + contract.tensor_bytes(entry["shape"], entry["dtype"]) <= size, _of(name))
    for file in (contract.PREFILL_FILE, contract.DECODE_FILE):
        _require(set(manifest["graph_weights"][file]) <= weights.keys(), f"graph_weights.{file}")
    # Embeddings whose width is not M come with a projection.
    width = weights[contract.PROJECT_IN]["shape"][1] if contract.PROJECT_IN in weights else shape.hidden_size
    _require(matrices[contract.EMBEDDING].shape == (shape.vocab_size, width), "shape.vocab_size")
    head = matrices.get(contract.HEAD)
    _require(head is None or (head.outputs, head.inputs) == (shape.vocab_size, width), f"matrices.{contract.HEAD}")
    for name, matrix in matrices.items():
        for stored in matrix.tensors:
            entry = weights[stored.name]
            fits = (entry["dtype"], entry["shape"]) == (stored.dtype, list(stored.shape))
            _require(fits, f"matrices.{name}")
    for layer in range(shape.num_layers):
        down = contract.ffn_weight(layer, "down")
        _require(down in matrices and matrices[down].shape == (shape.ffn_size, shape.hidden_size), f"matrices.{down}")
    _require(contract.ffn_weight(shape.num_layers, "down") not in weights, "shape.num_layers")


def _of(name: str) -> str:
    return f"weights.{name}"


def _is_size(value: object, below: int = LARGEST_SIZE) -> bool:
    return type(value) is int and 0 <= value < below


def _is_number(value: object, largest: float) -> bool:
    """Return whether a value is a number in [0, largest]; NaN is not."""
    return type(value) in (int, float) and 0 <= value <= largest  # type: ignore[operator]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
