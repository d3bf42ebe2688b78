"""Assemble a report: choose the sections for a calibration or an artifact."""

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
from tda_export.report.answer import (
    Answer,
    answer_section,
    mask_answer,
    priced_answer,
    unmeasured_masks,
    unmeasured_prices,
)
from tda_export.report.methods_section import methods_section
from tda_export.report.page import Page, Section
from tda_export.report.priced_sections import artifact_prices, budget_prices, calibration_prices
from tda_export.report.results_file import Results
from tda_export.report.sections import (
    allocation_section,
    artifact_provenance,
    calibration_provenance,
    curves_of,
    curves_section,
    sensitivity_section,
    stored_allocation,
    unmet_section,
)
from tda_export.report.speeds import short_name
from tda_export.report.texts import SIMILARITY_PROMPTS
from tda_export.runtime.artifact import Artifact, open_artifact
from tda_export.runtime.deployment import NO_REFRESH, Refresh
from tda_export.runtime.providers import choose_provider
from tda_export.runtime.text import Text

LONGEST = 128  # tokens of the longest of the report's own texts, with room for tokenizers that produce more


def calibration_page(path: Path, results: Results) -> Page:
    """Report on a calibration file.

    Raises:
        TdaError: The file cannot be read.
    """
    calibration = read_calibration(path)
    name = str(calibration.provenance["model"]["name"])
    answers: list[Answer] = []
    sections: list[Section] = []
    if calibration.priced is not None:
        prices = budget_prices(calibration, calibration.priced)
        integers = integers_kl(calibration.provenance["model"].get("quantization"))
        answers.append(priced_answer(list(calibration.priced.tables().values()), prices, integers=integers))
        sections += calibration_prices(calibration, calibration.priced)
    if calibration.curves is not None:
        answer, of_masks = _masks(calibration, calibration.provenance["budget"])
        answers.append(answer)
        sections += of_masks
    return _page(name, "calibration", path.name, answers, sections, results, calibration_provenance(calibration))


def artifact_page(folder: Path, results: Results, provider: str) -> Page:
    """Report on an artifact. For artifacts with prompt masks the graphs are run. Shows progress.

    Args:
        folder: The artifact.
        results: Results of methods to compare, and speeds.
        provider: `auto`, `cpu` or `cuda`.

    Raises:
        UsageError: The provider cannot run the artifact, or is given where nothing is run.
        TdaError: The artifact cannot be opened, read or run, or its model's context is too short.
    """
    artifact = open_artifact(folder)
    if artifact.layout == "priced":
        if provider != "auto":
            raise UsageError(f"{folder} has prices, and its report runs no graph. Leave --provider out.")
        answer, sections = _priced(artifact)
    else:
        chosen = choose_provider(provider, artifact.shape.dtype)
        if artifact.shape.max_positions < LONGEST:
            raise TdaError(
                f"{folder}: the model takes {artifact.shape.max_positions} tokens, and the report's own texts need up "
                f"to {LONGEST}. Report on its calibration file instead."
            )
        answer, sections = _indexed(artifact)
        sections += _activity_sections(artifact, chosen)
    name, where = artifact.name, folder.resolve().name
    return _page(name, "artifact", where, [answer], sections, results, artifact_provenance(artifact))


def _page(
    name: str,
    kind: str,
    where: str,
    answers: Sequence[Answer],
    sections: Sequence[Section],
    results: Results,
    provenance: Section,
) -> Page:
    """Put the sections in order: the answer, the comparison of methods, the details, and the provenance last."""
    compared = [methods_section(results.qualities)] if results.qualities else []
    opening = answer_section(answers, name, results.speeds)
    return Page(f"{short_name(name)}: {kind}", where, [opening, *compared, *sections, provenance])


def _own_calibration(artifact: Artifact) -> Calibration | None:
    if contract.CALIBRATION_FILE not in artifact.manifest["files"]:
        return None
    return read_calibration(artifact.file(contract.CALIBRATION_FILE))


def _priced(artifact: Artifact) -> tuple[Answer, list[Section]]:
    calibration, table, price = _own_calibration(artifact), artifact.price_table, float(artifact.manifest["price"])
    if table is None:
        return unmeasured_prices(price, artifact.linear_bytes), []
    priced = None if calibration is None else calibration.priced
    integers = integers_kl(artifact.manifest["model"].get("quantization"))
    answer = priced_answer([table], {table.packing: price}, integers=integers, linear_bytes=artifact.linear_bytes)
    return answer, artifact_prices(table, price, priced, integers)


def _masks(
    calibration: Calibration, budget: dict[str, Any], refresh: Refresh = NO_REFRESH, ffn_bytes: int | None = None
) -> tuple[Answer, list[Section]]:
    """Make the sections for the budget stored in the file. A budget that cannot be met is reported, and the rest is
    drawn."""
    allocation = stored_allocation(calibration, Budget(**budget), refresh.tokens)
    answer = mask_answer(calibration, allocation, refresh=refresh, ffn_bytes=ffn_bytes)
    chosen = (
        unmet_section(calibration, budget)
        if allocation is None
        else allocation_section(allocation, budget, refresh.tokens)
    )
    curves = curves_section(curves_of(calibration), allocation)
    return answer, [chosen, curves, sensitivity_section(calibration)]


def _indexed(artifact: Artifact) -> tuple[Answer, list[Section]]:
    manifest, calibration, ffn_bytes = artifact.manifest, _own_calibration(artifact), artifact.dense_ffn_bytes
    if manifest["method"]["selection"] == "threshold" and calibration is not None:
        return _masks(calibration, manifest["budget"], Refresh(**manifest["refresh"]), ffn_bytes)
    answer = unmeasured_masks(manifest["budget"].get("sparsity"), ffn_bytes)
    if calibration is None:
        return answer, []
    return answer, [curves_section(curves_of(calibration), None), sensitivity_section(calibration)]


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
