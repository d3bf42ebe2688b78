"""Write a quantised model as a folder that every command accepts (`models.quantised` describes its content)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tda_export.files import as_os_error, atomic_folder
from tda_export.models.layout import Layout
from tda_export.models.quantised import (
    CONFIG_FILE,
    CONFIG_KEY,
    HEAD_MAJOR,
    METHOD,
    VERSION,
    made_tensors,
    read_quantisation,
)
from tda_export.models.skeleton import skeleton_shapes
from tda_export.models.source import GENERATION_CONFIG_FILE, ModelSource
from tda_export.models.weights import SINGLE_FILE
from tda_export.weights.integers import Codes
from tda_export.weights.plan import HEAD, FormatPlan

COPIED = ("tokenizer*", "*.jinja", "*.json", "merges.txt", "vocab.txt", "spiece.model", "LICEN[CS]E*", "NOTICE*")
TIED = "tie_word_embeddings"  # in config.json; a head with codes of its own is not tied any more
NOT_COPIED = (CONFIG_FILE, "*.index.json")


def is_quantised_folder(path: Path) -> bool:
    """Return whether `quantize` wrote this folder, in any version."""
    try:
        return path.is_dir() and read_quantisation(path) is not None
    except Exception:
        return True  # written by another version


def write_quantised(
    source: ModelSource, output: Path, codes: Mapping[str, Codes], plan: FormatPlan, about: dict[str, Any]
) -> None:
    """Write the folder atomically, replacing an earlier one.

    Args:
        source: The float model.
        output: The folder.
        codes: All integer matrices of the plan.
        plan: The format of each matrix.
        about: How the model was quantised and what that costs, as plain data, for config.json.

    Raises:
        TdaError: The operating system refused to write.
    """
    content = {"quant_method": METHOD, "version": VERSION, **about, HEAD_MAJOR: plan.head_major}
    content["formats"] = plan.to_dict()
    config = _config(source) | ({TIED: False} if HEAD in plan.formats else {}) | {CONFIG_KEY: content}
    with atomic_folder(output) as folder:
        tensors = dict(_codes(codes, plan)) | dict(_floats(source, plan))
        try:
            save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise as_os_error(error) from error
        _write_json(folder / CONFIG_FILE, config)
        if source.gguf:
            source.tokenizer.save_pretrained(folder)
            for path in folder.iterdir():
                if path.is_dir():  # further chat templates
                    shutil.rmtree(path)
            _write_json(folder / GENERATION_CONFIG_FILE, source.generation_config)
        else:
            for path in _copied(source.folder):
                shutil.copyfile(path, folder / path.name)


def _codes(codes: Mapping[str, Codes], plan: FormatPlan) -> Iterator[tuple[str, torch.Tensor]]:
    for name, format in plan.integers.items():
        found = codes[name]
        tensors = format.tensors(name, *found.codes.shape)
        for tensor, stored in zip(tensors, found.pack(), strict=True):
            yield tensor.name, torch.from_numpy(stored)


def _floats(source: ModelSource, plan: FormatPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all float tensors by transformers' names, and floats that share a tensor with integers by their own
    names."""
    spec, weights = source.spec, source.weights()
    made, layout = made_tensors(spec, plan), Layout(spec, weights)
    for matrices in made.values():
        for name in matrices:
            if plan.of(name) is None:
                _, layer, part = name.split(".")
                yield name, layout.part(int(layer), part).load().T.contiguous()
    if spec.tied_head and HEAD in plan.formats and plan.of(HEAD) is None:  # it is no longer the embedding
        yield f"{spec.names.head}.weight", weights.load(f"{spec.names.embedding}.weight").contiguous()
    names = dict.fromkeys(skeleton_shapes(source.config))
    if not spec.tied_head:  # a configuration with a tied head says nothing about it
        names[f"{spec.names.head}.weight"] = None
    for name in names:
        if name not in made and not (spec.tied_head and name == f"{spec.names.head}.weight"):
            yield name, weights.load(name).contiguous()


def _config(source: ModelSource) -> dict[str, Any]:
    if not source.gguf:
        content: dict[str, Any] = json.loads((source.folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return content
    content = json.loads(source.config.to_json_string(use_diff=False))
    content.pop(CONFIG_KEY, None)
    return content | {"architectures": [source.spec.architecture]}


def _copied(folder: Path) -> list[Path]:
    left_out = {path for pattern in NOT_COPIED for path in folder.glob(pattern)}
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - left_out)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
