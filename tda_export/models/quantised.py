"""Folders written by `tda-export quantize`: codes of integer formats, and the checkpoint that they represent.

config.json has the format of every matrix under `quantization_config`. model.safetensors holds each integer matrix
separately, as an artifact stores it: `layers.{i}.{part}` [in, out] with heads in the graphs' order, `embedding` [V, M],
and `head` [M, V] or [V, M] (`head_major`), each with its `.scales` and `.zero_points`. All other tensors have the
checkpoint's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from tda_export.errors import TdaError, first_line, shown
from tda_export.models.layout import module_parts, module_weight
from tda_export.models.spec import DecoderSpec
from tda_export.models.weights import SINGLE_FILE, SafetensorsWeights, open_safetensors
from tda_export.packing import linear_parts, linear_shape
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import Codes, CodesByName
from tda_export.weights.matrix import Major
from tda_export.weights.plan import EMBEDDING, HEAD, FormatPlan, matrix_names, part_name

CONFIG_FILE = "config.json"
CONFIG_KEY = "quantization_config"
METHOD = "tda_export"
VERSION = 2
VERSIONS = (1, VERSION)  # the first has no `head_major`: heads lie by output, and tied ones are the embedding
HEAD_MAJOR = "head_major"
NOT_KEPT = ("quant_method", "version", "formats")  # by manifests and calibrations
AGAIN = "Make it again with 'tda-export quantize'."
TORCH_DTYPES = {"U8": "uint8", "F16": "float16"}  # safetensors' names


def read_quantisation(folder: Path) -> dict[str, Any] | None:
    """Return the quantisation entry of a folder's config.json, None where `quantize` did not write the folder.

    Raises:
        TdaError: The entry is of an unknown version.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        content = config.get(CONFIG_KEY)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # a missing or damaged file: transformers reports what is wrong
    if not isinstance(content, dict) or content.get("quant_method") != METHOD:
        return None
    if content.get("version") not in VERSIONS:
        raise TdaError(
            f"{folder / CONFIG_FILE}: {CONFIG_KEY} has version {shown(content.get('version'))}, and this version of "
            f"tda-export reads {' and '.join(map(str, VERSIONS))}. Upgrade tda-export, or make the folder again with "
            "'tda-export quantize'."
        )
    return content


def kept_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a folder's quantisation entry that manifests and calibrations keep: the settings and the
    loss."""
    return {name: value for name, value in content.items() if name not in NOT_KEPT}


def matrix_shape(spec: DecoderSpec, name: str, head_major: Major = "output") -> tuple[int, int]:
    """Return rows and columns of a stored matrix. Matrices of layers are input-major, the embedding output-major, the
    head as `head_major` says."""
    if name == EMBEDDING or (name == HEAD and head_major == "output"):
        return spec.vocab_size, spec.embedding_width
    return linear_shape(spec, name.rpartition(".")[2])


def made_tensors(spec: DecoderSpec, plan: FormatPlan) -> dict[str, tuple[str, ...]]:
    """Name the checkpoint's tensors that contain integer matrices, with all matrices that each is made of."""
    made: dict[str, tuple[str, ...]] = {}
    for layer in range(spec.num_layers):
        for module, parts in module_parts(spec).items():
            matrices = tuple(part_name(layer, part) for part in parts)
            if any(plan.of(name) for name in matrices):
                made[f"{module.format(i=layer)}.weight"] = matrices
    outside = {EMBEDDING: spec.names.embedding, HEAD: spec.names.head}
    return made | {
        f"{module}.weight": (name,) for name, module in outside.items() if name in plan.formats and plan.of(name)
    }


class QuantisedWeights:
    """The checkpoint of a quantised folder: integer tensors are returned de-quantised, in float32, all others
    unchanged."""

    def __init__(self, folder: Path, spec: DecoderSpec, content: dict[str, Any]) -> None:
        """Open the folder and check that it is whole.

        Args:
            folder: The folder, with config.json and model.safetensors.
            spec: The spec of its configuration. The formats determine whether the head is tied.
            content: The result of `read_quantisation`.

        Raises:
            TdaError: A tensor or entry is missing, of the wrong shape, or unknown.
        """
        self._folder, self._spec = folder, spec
        self._stored: SafetensorsWeights = open_safetensors(folder)
        self.files = self._stored.files
        self.plan = _read_plan(folder, spec, content)
        self._made = made_tensors(spec, self.plan)
        self._inside = {matrix for matrices in self._made.values() for matrix in matrices}
        for name in self._inside:
            self._check(name)

    @property
    def names(self) -> list[str]:
        """The checkpoint's names."""
        inside = {
            tensor.name
            for name, format in self.plan.integers.items()
            for tensor in format.tensors(name, *self._matrix_shape(name))
        }
        return [*self._made, *(name for name in self._stored.names if name not in inside | self._inside)]

    @property
    def codes(self) -> Mapping[str, Codes]:
        """The integer matrices by name, each read on access."""
        return CodesByName({name: partial(self.read_codes, name) for name in self.plan.integers})

    def __contains__(self, name: str) -> bool:
        return name in self._made or name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._made:
            return self._stored.shape(name)
        if self._made[name][0] in (EMBEDDING, HEAD):
            return self._spec.vocab_size, self._spec.embedding_width
        shapes = [self._matrix_shape(matrix) for matrix in self._made[name]]
        inputs, outputs = shapes[0][0], sum(columns for _, columns in shapes)
        return (inputs, outputs) if self._spec.transposed_linears else (outputs, inputs)

    def load(self, name: str) -> torch.Tensor:
        if name not in self._made:
            return self._stored.load(name)
        matrices = self._made[name]
        if matrices[0] in (EMBEDDING, HEAD):
            weight = self._matrix(matrices[0])
            return weight.T.contiguous() if matrices[0] == HEAD and self.plan.head_major == "input" else weight
        parts = {matrix.rpartition(".")[2]: self._matrix(matrix) for matrix in matrices}
        return module_weight(self._spec, parts)

    def read_codes(self, name: str) -> Codes:
        """Read an integer matrix.

        Raises:
            TdaError: A scale is not finite.
        """
        format = self.plan.integers[name]
        tensors = format.tensors(name, *self._matrix_shape(name))
        packed, scales, zero_points = (self._stored.load(tensor.name).numpy() for tensor in tensors)
        if not np.isfinite(scales).all():
            raise TdaError(f"{self._file}: {tensors[1].name} has scales that are not numbers. {AGAIN}")
        return Codes.unpack(format, self._matrix_shape(name)[1], packed, scales, zero_points)

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        return matrix_shape(self._spec, name, self.plan.head_major)

    def _matrix(self, name: str) -> torch.Tensor:
        if self.plan.of(name) is None:  # floats that share a tensor of the checkpoint with integers
            return self._stored.load(name).float()
        return torch.from_numpy(self.read_codes(name).decode())

    def _check(self, name: str) -> None:
        format, shape = self.plan.of(name), self._matrix_shape(name)
        if not isinstance(format, IntegerFormat):
            self._check_tensor(name, shape, None)
            return
        for tensor in format.tensors(name, *shape):
            self._check_tensor(tensor.name, tensor.shape, tensor.dtype)

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtype: str | None) -> None:
        if name not in self._stored.names:
            raise TdaError(f"{self._file}: {name} is missing. {AGAIN}")
        found = TORCH_DTYPES.get(self._stored.dtype(name), self._stored.dtype(name))
        if self._stored.shape(name) != shape or dtype not in (None, found):
            raise TdaError(
                f"{self._file}: {name} should be {dtype or 'a float'} {list(shape)} and is {found} "
                f"{list(self._stored.shape(name))}. {AGAIN}"
            )

    @property
    def _file(self) -> Path:
        return self._folder / SINGLE_FILE


def _read_plan(folder: Path, spec: DecoderSpec, content: dict[str, Any]) -> FormatPlan:
    major = content.get(HEAD_MAJOR, "output")
    if major not in get_args(Major):
        raise TdaError(f"{folder / CONFIG_FILE}: {CONFIG_KEY}: {HEAD_MAJOR} is {shown(major)}. {AGAIN}")
    try:
        plan = FormatPlan.from_dict(content["formats"], major)
    except (KeyError, ValueError) as error:
        reason = "formats are missing" if isinstance(error, KeyError) else first_line(error)
        raise TdaError(f"{folder / CONFIG_FILE}: {CONFIG_KEY}: {reason}. {AGAIN}") from error
    tied = HEAD not in plan.formats
    expected = set(matrix_names(spec.num_layers, linear_parts(spec), tied_head=tied))
    if wrong := sorted(expected ^ set(plan.formats)):
        what = "has no format" if wrong[0] in expected else "is no matrix of this model"
        raise TdaError(f"{folder / CONFIG_FILE}: {CONFIG_KEY}: {shown(wrong[0])} {what}. {AGAIN}")
    return plan
