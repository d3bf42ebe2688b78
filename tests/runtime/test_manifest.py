"""Manifests with impossible numbers and names give one short line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.runtime.artifact import open_artifact
from tests.runtime.conftest import edit_manifest

LARGE = 10**400


@pytest.mark.parametrize(
    ("change", "what"),
    [
        *(
            (lambda manifest, key=key, bad=bad: manifest.update({key: [bad] * 3}), key)
            for key in ("thresholds", "token_thresholds", "survivors")
            for bad in (LARGE, 1e39, -1.0, math.nan, True, "0.1", None, [])
        ),
        *(
            (lambda manifest, bad=bad: manifest.update(prior_tokens=bad), "prior_tokens")
            for bad in (LARGE, 1e39, -1, math.nan, None, "64")
        ),
        *(
            (lambda manifest, key=key, bad=bad: manifest["shape"].update({key: bad}), rf"shape\.{key}")
            for key in ("max_positions", "num_kv_heads", "head_size")
            for bad in (LARGE, 2**31)
        ),
        *(
            (lambda manifest, bad=bad: manifest["model"].update(ffn_matrices=bad), r"model\.ffn_matrices")
            for bad in (0, -1, 1, 2, 4, LARGE, True)
        ),
        *(
            (lambda manifest, bad=bad: manifest["model"].update(eos_token_ids=[bad]), r"model\.eos_token_ids")
            for bad in (-1, LARGE)
        ),
        *(
            (lambda manifest, bad=bad: manifest.update(refresh=bad), "")
            for bad in (
                {"tokens": LARGE},
                {"tokens": 2.5},
                {"tokens": math.nan},
                {"decay": math.nan},
                {"decay": True},
                {"decay": LARGE},
                [],
                None,
            )
        ),
        *(
            (lambda manifest, key=key, bad=bad: manifest["method"].update({key: bad}), rf"method\.{key}")
            for key, bad in (("name", 5), ("tail", "median"), ("density", 0.5), ("density", LARGE), ("two_levels", 1))
        ),
        *(
            (lambda manifest, key=key, bad=bad: manifest.update({key: bad}), key)
            for key in ("versions", "spec", "budget", "expected", "calibration", "io")
            for bad in (None, [], "text", LARGE)
        ),
        *((lambda manifest, key=key: manifest.pop(key), key) for key in ("budget", "expected", "io", "prior_tokens")),
        (lambda manifest: manifest.update(expected={"sparsity": LARGE}), r"expected\.sparsity"),
        (lambda manifest: manifest.update(expected={"sparsity": "much"}), ""),
        *(
            (lambda manifest, bad=bad: manifest.update(expected={"kl": bad}), r"expected\.kl")
            for bad in (LARGE, math.nan)
        ),
        (lambda manifest: manifest.update(expected={"kl": "much"}), ""),
        *(
            (lambda manifest, bad=bad: manifest["model"].update(quantization=bad), r"model\.quantization")
            for bad in ("int4", [], 4)
        ),
        (lambda manifest: manifest["weights"][contract.EMBEDDING].update(offset=LARGE), r"weights\.embedding"),
        (lambda manifest: manifest["weights"][contract.EMBEDDING].update(shape=[0, 64]), r"weights\.embedding"),
    ],
)
def test_numbers_that_cannot_be(artifact_copy: Path, change: Callable[[dict[str, Any]], object], what: str) -> None:
    edit_manifest(artifact_copy, change)
    with pytest.raises(TdaError, match=rf"incomplete manifest \(.*{what}.*Build the artifact again") as raised:
        open_artifact(artifact_copy)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("version", [LARGE, -LARGE])
def test_a_version_of_many_digits_is_cut(artifact_copy: Path, version: int) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest.update(format_version=version))
    with pytest.raises(TdaError, match=r"artifact format -?10+….* than this tda-export") as raised:
        open_artifact(artifact_copy)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "name",
    ["a\nb", "\x1b[2J", "\u202egpj.exe", "\ud800", "x" * 300, "x" * 100_000, "a\0b"],
    ids=lambda name: repr(name[:9]),
)
def test_names_of_files_are_escaped_and_cut(artifact_copy: Path, name: str) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].update({name: {"size": 6, "sha256": ""}}))
    with pytest.raises(TdaError, match=r"(Do not use this artifact|is missing. Build the artifact again)\.$") as raised:
        open_artifact(artifact_copy)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400
