"""Put a report together: which sections a calibration and an artifact have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import Calibration, read_calibration
from tda_export.errors import TdaError, UsageError
from tda_export.float_kl import integers_kl
from tda_export.graph import contract
from tda_export.progress import progress
from tda_export.report.activity import Reader
from tda_export.report.activity_sections import (
    activity_section,
    activity_steps,
    similarity_section,
    uncertainty_section,
    uncertainty_texts,
)
from tda_export.report.methods_section import methods_section
from tda_export.report.page import Page, Section
from tda_export.report.priced_sections import artifact_prices, calibration_prices
from tda_export.report.results import Result
from tda_export.report.sections import (
    allocation_section,
    artifact_summary,
    calibration_summary,
    curves_of,
    curves_section,
    sensitivity_section,
    stored_allocation,
    unmet_section,
)
from tda_export.report.texts import SIMILARITY_PROMPTS
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.providers import choose_provider
from tda_export.runtime.text import Text

LONGEST = 128  # tokens of the longest of the report's own texts, with room for tokenizers that make more of them


def calibration_page(path: Path, results: Sequence[Result]) -> Page:
    """Report on a calibration file.

    Raises:
        TdaError: It cannot be read.
    """
    calibration = read_calibration(path)
    sections = [calibration_summary(calibration)]
    if calibration.priced is not None:
        sections += calibration_prices(calibration, calibration.priced)
    if calibration.curves is not None:
        sections += _chosen_sections(calibration, calibration.provenance["budget"])
        sections.append(sensitivity_section(calibration))
    if results:
        sections.append(methods_section(results))
    name = calibration.provenance["model"]["name"]
    return Page(f"{name}: calibration", path.name, sections)


def artifact_page(folder: Path, results: Sequence[Result], provider: str) -> Page:
    """Report on an artifact. The graphs of one of masks are run for it; shows progress.

    Args:
        folder: The artifact.
        results: To compare methods by.
        provider: `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: The provider cannot run it, or is chosen where nothing is run.
        TdaError: It cannot be opened, read or run, or its model takes too few tokens.
    """
    artifact = open_artifact(folder)
    if artifact.layout == "priced":
        if provider != "auto":
            raise UsageError(f"{folder} has prices of rows, whose report runs no graph. Leave --provider out.")
        return Page(f"{artifact.name}: artifact", folder.resolve().name, _priced_sections(artifact, results))
    chosen = choose_provider(provider, artifact.shape.dtype)
    if artifact.shape.max_positions < LONGEST:
        raise TdaError(
            f"{folder}: the model takes {artifact.shape.max_positions} tokens, and the report's own texts up to "
            f"{LONGEST}. Report on its calibration file instead."
        )
    calibration = _own_calibration(artifact)
    sections = [artifact_summary(artifact)]
    if calibration is not None:
        sections += _calibration_sections(artifact, calibration)
    if results:
        sections.append(methods_section(results))
    sections += _activity_sections(artifact, chosen)
    return Page(f"{artifact.name}: artifact", folder.resolve().name, sections)


def _own_calibration(artifact: Artifact) -> Calibration | None:
    if contract.CALIBRATION_FILE not in artifact.manifest["files"]:
        return None
    return read_calibration(artifact.file(contract.CALIBRATION_FILE))


def _priced_sections(artifact: Artifact, results: Sequence[Result]) -> list[Section]:
    calibration, sections = _own_calibration(artifact), [artifact_summary(artifact)]
    table = artifact.price_table
    if table is not None:
        priced = None if calibration is None else calibration.priced
        integers = integers_kl(artifact.manifest["model"].get("quantization"))
        sections += artifact_prices(table, float(artifact.manifest["price"]), priced, integers)
    return [*sections, methods_section(results)] if results else sections


def _chosen_sections(calibration: Calibration, budget: dict[str, Any], refresh_tokens: int = 0) -> list[Section]:
    """Curves and allocation by a budget that came with the file; what it cannot meet is said, and the rest drawn."""
    allocation = stored_allocation(calibration, Budget(**budget), refresh_tokens)
    return [
        curves_section(curves_of(calibration), allocation),
        unmet_section(calibration, budget)
        if allocation is None
        else allocation_section(allocation, budget, refresh_tokens),
    ]


def _calibration_sections(artifact: Artifact, calibration: Calibration) -> list[Section]:
    manifest = artifact.manifest
    if manifest["method"]["selection"] == "threshold":
        chosen = _chosen_sections(calibration, manifest["budget"], manifest["refresh"]["tokens"])
        return [*chosen, sensitivity_section(calibration)]
    return [curves_section(curves_of(calibration), None), sensitivity_section(calibration)]


def _activity_sections(artifact: Artifact, provider: str) -> list[Section]:
    text = Text(artifact)
    texts = uncertainty_texts(text, artifact.shape.max_positions)
    reader = Reader(artifact, provider)
    with progress("Reading single tokens", activity_steps(bool(text.encode("")))) as advance:
        sections = [activity_section(reader, text, advance)]
    with progress("Reading prompts", len(SIMILARITY_PROMPTS) + len(texts)) as advance:
        sections.append(similarity_section(reader, text, advance))
        sections.append(uncertainty_section(reader, texts, advance))
    return sections
