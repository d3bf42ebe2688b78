"""Checkpoint weights, read one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from tda_export.errors import TdaError
from tda_export.models.spec import DecoderSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NOT_READ = "Download the index again from a place that you trust."
OTHER_FILES = "Take config.json and the weights from the same place."
FORMER_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX


class Weights(Protocol):
    """Named tensors of a checkpoint."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor onto the CPU in the checkpoint's dtype."""
        ...


class SafetensorsWeights:
    """The tensors of a folder's safetensors `files`, memory-mapped and read only on request."""

    def __init__(self, folder: Path) -> None:
        self.files = self._paths(folder)
        opened = [safe_open(path, framework="pt") for path in self.files]
        self._owner = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)

    @staticmethod
    def _paths(folder: Path) -> list[Path]:
        if (folder / SINGLE_FILE).is_file():  # where both exist, transformers reads this one
            return [folder / SINGLE_FILE]
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        return [_shard(folder, shard) for shard in shards]

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._owner)

    def _key(self, name: str) -> str:
        """Find a tensor by its name, or by its name in checkpoints without a head or of older versions."""
        shorter = name.partition(".")[2]
        return next((key for key in (name, FORMER_NAMES.get(name, name), shorter) if key in self._owner), name)

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._owner

    def shape(self, name: str) -> tuple[int, ...]:
        key = self._key(name)
        return tuple(self._owner[key].get_slice(key).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype by safetensors' name, such as F16."""
        key = self._key(name)
        return str(self._owner[key].get_slice(key).get_dtype())

    def load(self, name: str) -> torch.Tensor:
        key = self._key(name)
        return self._owner[key].get_tensor(key)


class StateDictWeights:
    """The tensors of a model that transformers has loaded (GGUF files, which it de-quantises)."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def load(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().cpu()


def has_safetensors(folder: Path) -> bool:
    """Return whether a folder has readable weights."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def has_own_head(spec: DecoderSpec, weights: Weights) -> bool:
    """Return whether a checkpoint holds an output head that differs from its embedding, whatever the configuration
    says.

    In that case transformers keeps both.

    Raises:
        TdaError: The head has the wrong shape.
    """
    embedding = f"{spec.names.embedding}.weight"
    head = f"{spec.names.head}.weight"
    if head not in weights or embedding not in weights:
        return False
    if weights.shape(head) != weights.shape(embedding):
        raise TdaError(
            f"{head} has shape {list(weights.shape(head))} and {embedding}, which config.json ties it to, "
            f"{list(weights.shape(embedding))}. {OTHER_FILES}"
        )
    return not torch.equal(weights.load(head).float(), weights.load(embedding).float())


def open_safetensors(folder: Path) -> SafetensorsWeights:
    """Open the safetensors files of a Hugging Face folder.

    Raises:
        TdaError: There are none (pickled `.bin` checkpoints are never read), or one is damaged.
    """
    if not has_safetensors(folder):
        raise TdaError(
            f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}. Only safetensors and GGUF weights are read; pickled .bin "
            "files are not. Convert the model with transformers' save_pretrained()."
        )
    try:
        return SafetensorsWeights(folder)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TdaError(
            f"{folder}: the safetensors weights cannot be read ({error}). Download the weights again."
        ) from error


def _shard(folder: Path, name: str) -> Path:
    """Return the path of a shard that an index names.

    Raises:
        TdaError: The file is missing or outside the folder. A link into the hub cache of which the folder is part
            counts as inside.
    """
    path, root = folder / name, folder.resolve()
    if root.parent.name == "snapshots":  # a folder of the hub's cache, where files are links into blobs/
        root = root.parent.parent
    if not path.absolute().is_relative_to(folder.absolute()) or ".." in Path(name).parts:
        raise TdaError(f"{folder}: {INDEX_FILE} names a file outside the folder ({name[:100]!r}). {NOT_READ}")
    if not path.is_file():
        raise TdaError(f"{folder}: {INDEX_FILE} names {name[:100]!r}, which is missing. Download that file.")
    if not path.resolve().is_relative_to(root):
        raise TdaError(f"{folder}: {name[:100]!r} is a link to a file outside the folder. Copy that file into it.")
    return path
