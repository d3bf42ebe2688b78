"""Gemma 3 270M in float32 on the CPU: a second real architecture, with its own norms, windows and vocabulary.

Collected if TDA_EXPORT_GEMMA3 names its GGUF file (conftest.py). The Gemma terms do not let this project ship it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tda_export.calibration.corpus import builtin_folder
from tda_export.models.source import ModelSource, resolve_model
from tda_export.runtime import Model, load
from tests.conftest import build_tda, run_ok
from tests.test_end_to_end import LOGIT_CHECKS

pytestmark = pytest.mark.timeout(3600)  # calibrating takes long on two cores

GREEDY_TOKENS = 64
WINDOW = 512
LARGEST_LOGIT_DIFFERENCE = 2e-3
SHORT = "The history of the lighthouse began in the year"


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve_model(os.environ["TDA_EXPORT_GEMMA3"])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified artifact, calibrated with prompts longer than the window."""
    folder, model = tmp_path_factory.mktemp("gemma3"), os.environ["TDA_EXPORT_GEMMA3"]
    lengths = ("--method", "tda", "--sequences", 4, "--prompt-tokens", 600, "--continuation-tokens", 32)
    run_ok("calibrate", model, "-o", folder / "calibration", *lengths)
    result = run_ok(*build_tda(model, folder / "calibration"), "-o", folder / "artifact", "--json")
    (folder / "built.json").write_text(result.stdout)
    return folder / "artifact"


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    loaded = load(artifact, provider="cpu")
    assert loaded.sessions.native
    return loaded


def test_every_check_of_the_build_passes(artifact: Path) -> None:
    checks = json.loads((artifact.parent / "built.json").read_text())["checks"]
    assert all(check["passed"] for check in checks)
    differences = {check["name"]: check["difference"] for check in checks}
    assert all(differences[name] <= LARGEST_LOGIT_DIFFERENCE for name in LOGIT_CHECKS)


@pytest.mark.parametrize("length", ["short", "longer than the window"])
def test_dense_greedy_text_is_that_of_transformers(length: str, model: Model, source: ModelSource) -> None:
    text = SHORT if length == "short" else sorted(builtin_folder().glob("*.txt"))[0].read_text(encoding="utf-8")
    tokens = model.text.encode(text)[: WINDOW + 100]
    assert (len(tokens) > WINDOW) == (length != "short")
    ours = [token.id for token in model.generate(tokens, mask="dense", max_new_tokens=GREEDY_TOKENS)]
    inputs = torch.tensor([tokens])
    theirs = source.reference().generate(inputs, max_new_tokens=GREEDY_TOKENS, do_sample=False)[0, len(tokens) :]
    assert ours == theirs.tolist()[: len(ours)]
    assert len(ours) == GREEDY_TOKENS


def test_mask_reads_fewer_bytes(model: Model) -> None:
    generation = model.generate(SHORT, max_new_tokens=8)
    assert len(list(generation)) == 8
    assert 0.3 < generation.metrics.sparsity < 0.7
    assert generation.metrics.dense_ffn_bytes_per_token == 18 * 3 * 640 * 2048 * 4
