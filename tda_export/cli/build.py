"""`tda-export build`: write the artifact of a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tda_export.cli.options import (
    PATH,
    budget_options,
    json_option,
    model_argument,
    overwrite_option,
    provider_option,
)

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule
    from tda_export.graph.method import Tail


@click.command()
@model_argument
@click.option("-o", "--output", type=PATH, required=True, help="Artifact folder to create.")
@click.option("--calibration", "calibration_file", type=PATH, help="File from 'tda-export calibrate' (needed by tda).")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Dtype of weights and arithmetic; CUDA needs fp16 or bf16.",
)
@click.option(
    "--method",
    type=click.Choice(["tda", "griffin"]),
    default="tda",
    show_default=True,
    help="How masks are chosen. griffin needs --sparsity and no calibration.",
)
@click.option(
    "--tail",
    type=click.Choice(["zero", "mean"]),
    help="What stands in for dropped neurons: nothing, or their mean over the prompt.  [default: mean for a budget by "
    "KL, otherwise zero]",
)
@budget_options
@click.option(
    "--refresh",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Read the last N generated tokens again densely after every N, which renews the mask; 0 never.",
)
@overwrite_option
@click.option("--no-verify", is_flag=True, help="Leave the comparison with transformers out.")
@provider_option
@json_option
def build(
    model: str,
    output: Path,
    calibration_file: Path | None,
    dtype: str,
    method: str,
    tail: Tail | None,
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    refresh: int,
    overwrite: bool,
    no_verify: bool,
    provider: str,
    as_json: bool,
) -> None:
    """Write prefill and decode graphs of MODEL with one weights file.

    The budget is the calibration's own unless --sparsity, --max-kl or --cett asks for another. The result is compared
    with transformers before it appears at OUTPUT, unless --no-verify.
    """
    from tda_export.calibration.budgets import Budget
    from tda_export.calibration.file import read_calibration
    from tda_export.cli.options import chosen_budget
    from tda_export.cli.tables import print_checks
    from tda_export.errors import TdaError, UsageError
    from tda_export.files import check_output
    from tda_export.graph.contract import DTYPES
    from tda_export.graph.export import BuildRequest, export_artifact
    from tda_export.graph.method import griffin, tda
    from tda_export.graph.prefill import calibrated_prior
    from tda_export.graph.verify import verify_artifact
    from tda_export.models.source import resolve_model
    from tda_export.runtime.artifact import is_artifact
    from tda_export.runtime.deployment import Refresh
    from tda_export.runtime.providers import choose_provider

    check_output(output, overwrite=overwrite, what="an artifact without other files", is_earlier_output=is_artifact)
    choose_provider(provider, DTYPES[dtype])
    if method == "griffin":
        if sparsity is None or any((cett is not None, max_kl is not None, allocation, calibration_file, tail, refresh)):
            raise UsageError(
                "--method griffin takes --sparsity, and neither --cett, --max-kl, --allocation, --calibration, --tail "
                "nor --refresh."
            )
        source = resolve_model(model, notify=lambda line: click.echo(line, err=True))
        budget = Budget(sparsity=sparsity, allocation="uniform")
        request = BuildRequest(source, DTYPES[dtype], griffin(sparsity), [0.0] * source.spec.num_layers, budget)
    else:
        if calibration_file is None:
            raise UsageError(
                "--method tda needs --calibration FILE. Make one with 'tda-export calibrate --method tda'."
            )
        calibration = read_calibration(calibration_file)
        budget = chosen_budget(cett, sparsity, allocation, max_kl, calibration.provenance["budget"])
        source = resolve_model(model, notify=lambda line: click.echo(line, err=True))
        if calibration.model_fingerprint != source.fingerprint:
            calibrated = calibration.provenance["model"]["name"]
            raise TdaError(
                f"{calibration_file} was calibrated on another model ({calibrated}) than {model}. "
                "Calibrate this one with 'tda-export calibrate'."
            )
        refreshing = Refresh(refresh)
        chosen = calibration.allocate(budget, refreshing.tokens)
        if budget.by_kl and tail == "zero":
            raise UsageError("--tail zero: a budget by KL is calibrated with the tail mean. Leave --tail out.")
        if not as_json:
            predicted = "" if chosen.kl is None else f", predicted KL {chosen.kl:.3f} nats a token"
            click.echo(
                f"{model}, {budget}: expected FFN sparsity {refreshing.sparsity(chosen.sparsity):.3f}{predicted}"
            )
        request = BuildRequest(
            source,
            DTYPES[dtype],
            tda("mean" if chosen.tail_mean else tail or "zero", two_levels=True),
            chosen.thresholds,
            budget,
            chosen,
            calibration_file,
            calibration.provenance,
            calibration.sums.up_rms.float(),
            calibrated_prior(calibration.sums, chosen.prior_tokens) if chosen.prior_tokens else None,
            refreshing,
        )
    checks = []

    def check(folder: Path) -> None:
        if no_verify:
            return
        checks.extend(verify_artifact(folder, lambda name: source, provider=provider, quiet=as_json))
        if not as_json:
            print_checks(checks)
        if failed := [item.name for item in checks if not item.passed]:
            raise TdaError(f"Verification failed ({', '.join(failed)}); {output} was not written.")

    export_artifact(request, output, quiet=as_json, check=check)
    size = sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        expected = {"sparsity": request.expected_sparsity, "kl": request.allocation.kl} if request.allocation else {}
        result = {"output": str(output), "bytes": size, "budget": budget.describe(), "expected": expected}
        click.echo(json.dumps(result | {"checks": [asdict(item) | {"passed": item.passed} for item in checks]}))
    else:
        click.echo(f"Wrote {output} ({size / 2**20:,.0f} MiB{', not verified' if no_verify else ', verified'})")
