"""If graphs cannot be derived from a manifest, one line names the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from tda_export.errors import TdaError
from tda_export.graph.derive import artifact_method, artifact_spec, derived_counting, derived_prefill
from tda_export.graph.method import griffin
from tda_export.runtime import Model
from tda_export.runtime.artifact import Artifact

LARGE = 10**400


def with_spec(model: Model, **changes: Any) -> Artifact:
    manifest = model.artifact.manifest
    return dataclasses.replace(model.artifact, manifest=manifest | {"spec": manifest["spec"] | changes})


def derived_griffin(artifact: Artifact) -> bytes:
    return derived_prefill(artifact, griffin(0.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**9},
        {"num_kv_heads": 0},
        {"head_size": LARGE},
        {"hidden_size": -1},
        {"vocab_size": "259"},
        {"names": None},
        {"names": {"x" * 10_000: 1}},
        {"rope": 5},
        {"sliding_windows": None},
        {"colour\x1b[2J": 1},
    ],
    ids=lambda changes: repr(changes)[:30],
)
@pytest.mark.parametrize("read", [artifact_spec, derived_counting, derived_griffin])
def test_spec_that_describes_no_graph(model: Model, read: Callable[[Artifact], Any], changes: dict[str, Any]) -> None:
    with pytest.raises(TdaError, match=r"Build the artifact again\.$") as raised:
        read(with_spec(model, **changes))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("changes", [{"sliding_windows": []}, {"sliding_windows": [None]}], ids=repr)
def test_spec_that_cannot_be_built(model: Model, changes: dict[str, Any]) -> None:
    with pytest.raises(TdaError, match="its spec describes no graph of this artifact"):
        derived_counting(with_spec(model, **changes))


def test_a_method_of_a_later_version(model: Model) -> None:
    manifest = model.artifact.manifest
    artifact = dataclasses.replace(model.artifact, manifest=manifest | {"method": manifest["method"] | {"later": 1}})
    assert artifact_method(artifact) == artifact_method(model.artifact)
