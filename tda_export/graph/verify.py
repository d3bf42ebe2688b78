"""Verify an artifact: its files, its graphs, and its numbers against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from tda_export.errors import TdaError, first_line, shown
from tda_export.files import sha256
from tda_export.graph import contract
from tda_export.graph.comparison import PROMPTS, Check, Comparison
from tda_export.graph.parity import IndexedComparison
from tda_export.graph.priced_parity import PricedComparison
from tda_export.graph.seal import seal_problem
from tda_export.models.source import ModelSource
from tda_export.progress import progress
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.providers import choose_provider


def verify_artifact(
    folder: Path, source: Callable[[str], ModelSource] | None, *, provider: str = "auto", quiet: bool = False
) -> list[Check]:
    """Check everything that can be checked, and return the results.

    Args:
        folder: The artifact.
        source: Finds the model to compare with, given its name in the manifest; None checks files and graphs only.
        provider: `auto`, `cpu` or `cuda`.
        quiet: Show no progress.

    Raises:
        TdaError: The artifact cannot be opened, or the reference is not its model.
    """
    artifact = open_artifact(folder)
    chosen = choose_provider(provider, artifact.shape.dtype)
    checks = [_hashes(artifact, quiet), *_graphs(artifact)]
    if source is None or not all(check.passed for check in checks):
        return checks  # comparing numbers of altered files would not help
    model = source(artifact.name)
    if model.fingerprint != artifact.manifest["model"]["fingerprint"]:
        raise TdaError(
            f"{folder} was built from another model than {model.name} (their fingerprints differ). "
            "Give its own model with --against."
        )
    with progress("Comparing with transformers", 3 * len(PROMPTS) + 1, quiet=quiet) as advance:
        comparison: type[Comparison] = PricedComparison if artifact.layout == "priced" else IndexedComparison
        return checks + comparison(artifact, model, chosen, advance).run()


def _hashes(artifact: Artifact, quiet: bool) -> Check:
    files = artifact.manifest["files"]
    altered = []
    with progress("Checking hashes", sum(entry["size"] for entry in files.values()), quiet=quiet) as advance:
        for name, entry in files.items():
            if sha256(artifact.file(name), advance) != entry["sha256"]:
                altered.append(name)
    problem = f"{', '.join(map(shown, altered))}: altered since the build" if altered else None
    return Check("files match their hashes", problem=problem)


def _graphs(artifact: Artifact) -> list[Check]:
    checks = []
    graphs = {}
    for file in (name for name in contract.GRAPH_FILES if name in artifact.manifest["files"]):
        problem = None
        try:
            onnx.checker.check_model(str(artifact.file(file)))
            model = onnx.load(artifact.file(file), load_external_data=False)
            graphs[file] = model
            problem = _external_data_problem(artifact, model)
        except Exception as error:  # the checker and protobuf raise their own exceptions
            problem = first_line(error)
        checks.append(Check(f"{file} passes onnx.checker", problem=problem))
    if all(check.passed for check in checks):
        checks.append(Check("manifest is that of the graphs", problem=seal_problem(artifact, graphs)))
    return checks


def _external_data_problem(artifact: Artifact, model: onnx.ModelProto) -> str | None:
    size = artifact.file(contract.WEIGHTS_FILE).stat().st_size
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        if entry["location"] != contract.WEIGHTS_FILE:
            return f"{shown(tensor.name)} lies in '{shown(entry['location'])}' instead of {contract.WEIGHTS_FILE}"
        if int(entry["offset"]) + int(entry["length"]) > size:
            return f"{shown(tensor.name)} reaches past the end of {contract.WEIGHTS_FILE}"
    return None
