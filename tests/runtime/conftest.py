"""Fixtures: the tiny artifact, loaded, and the model that it was built from."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tda_export.ffn_share import GATED
from tda_export.files import sha256
from tda_export.graph import contract
from tda_export.graph.derive import artifact_spec
from tda_export.graph.reference import SecondLevel
from tda_export.models.source import ModelSource, resolve_model
from tda_export.native.library import SWITCH, native_problem
from tda_export.packing import packed_matrices
from tda_export.runtime import Model, load
from tda_export.runtime.deployment import Deployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import PromptMask, prefill
from tda_export.runtime.session import map_weight

PROMPT = "The sea is calm tonight"


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change an artifact's manifest in place."""
    path = folder / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace one of an artifact's files, so that the artifact still opens."""
    (folder / name).write_bytes(content)
    edit_manifest(folder, lambda manifest: manifest["files"][name].update(size=len(content)))


def add_unknown_token(folder: Path) -> None:
    """Add the token `<image>` to an artifact's tokenizer, but not to the model, as in Gemma 3's text models."""
    tokenizer = Tokenizer.from_file(str(folder / contract.TOKENIZER_FILE))
    tokenizer.add_special_tokens(["<image>"])
    replace_file(folder, contract.TOKENIZER_FILE, tokenizer.to_str().encode())


def mask_alone(model: Model) -> Deployment:
    """Return the artifact's own thresholds and prior, without token thresholds."""
    layers = model.artifact.shape.num_layers
    return Deployment(model.artifact.deployment.thresholds, np.zeros(layers, np.float32), ffn_matrices=GATED)


def second_level(model: Model, thresholds: np.ndarray) -> SecondLevel:
    """Return token thresholds [L] for the reference."""
    scales = [map_weight(model.artifact, contract.neuron_scale(layer)) for layer in range(len(thresholds))]
    return SecondLevel([torch.from_numpy(scale.copy()) for scale in scales], thresholds.tolist())


def reference_mask(model: Model, mask: PromptMask) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return a prompt's mask for the reference: L tensors [F] of 0 and 1, and L tails [M]."""
    masks, tails = [], []
    for layer in range(model.artifact.shape.num_layers):
        kept = torch.zeros(model.artifact.shape.ffn_size)
        kept[mask.indices(layer)] = 1
        masks.append(kept)
        tails.append(torch.from_numpy(mask.inputs[contract.tail_mean(layer)].numpy()))
    return masks, tails


@contextlib.contextmanager
def without_native_kernels() -> Iterator[None]:
    """Run as if the library were not built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "0")
        native_problem.cache_clear()
        yield
    native_problem.cache_clear()


@pytest.fixture(scope="session", params=["native", "stock"])
def model(tiny_artifact: Path, request: pytest.FixtureRequest) -> Model:
    """The tiny artifact on the CPU. A generation does not change a Model, so tests share it."""
    with without_native_kernels() if request.param == "stock" else contextlib.nullcontext():
        loaded = load(tiny_artifact, provider="cpu")
    assert loaded.sessions.native == (request.param == "native")
    return loaded


@pytest.fixture(scope="session", params=["native", "stock"])
def priced_model(priced_artifact: Path, request: pytest.FixtureRequest) -> Model:
    """The tiny artifact of priced rows on the CPU, shared by tests."""
    with without_native_kernels() if request.param == "stock" else contextlib.nullcontext():
        loaded = load(priced_artifact, provider="cpu")
    assert loaded.sessions.native == (request.param == "native")
    return loaded


@pytest.fixture(scope="session")
def source(tiny_model: Path) -> ModelSource:
    """The model that the tiny artifact was built from."""
    return resolve_model(str(tiny_model))


@pytest.fixture(scope="session")
def reference(source: ModelSource) -> Any:
    """That model in transformers."""
    return source.reference()


@pytest.fixture
def artifact_copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact, to be damaged."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def row_prices(model: Model) -> dict[str, torch.Tensor]:
    """Return the row prices of a priced artifact, float32 [L, in] by stored matrix, and [1, in] of the head."""
    artifact = model.artifact
    names = [*packed_matrices(artifact_spec(artifact), artifact.manifest["packing"]), contract.HEAD]
    stored = {
        name: [
            map_weight(artifact, contract.row_price(matrix))
            for matrix in contract.weights_of(name, artifact.shape.num_layers)
        ]
        for name in names
    }
    return {name: torch.from_numpy(np.stack(rows)) for name, rows in stored.items()}


def prompt_mask(model: Model, prompt: str) -> PromptMask:
    """Return the mask of a prompt."""
    shape = model.artifact.shape
    cache = KvCache(shape, model.provider, shape.max_positions)
    return prefill(model.sessions, shape, model.text.encode(prompt), cache)[1]


def add_token(artifact: Path, token: str) -> None:
    """Add a token to an artifact's tokenizer that its model does not have."""
    path = artifact / contract.TOKENIZER_FILE
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([token])
    tokenizer.save(str(path))
    entry = {"size": path.stat().st_size, "sha256": sha256(path)}
    edit_manifest(artifact, lambda manifest: manifest["files"].update({path.name: entry}))
