"""`tda-export build`: write the artifact of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tda_export.cli.help_groups import WEIGHTS, command, option
from tda_export.cli.options import (
    PATH,
    budget_options,
    json_option,
    model_argument,
    overwrite_option,
    price_option,
    provider_option,
    weight_options,
)

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule
    from tda_export.deployments import Asked
    from tda_export.graph.export import BuildRequest
    from tda_export.graph.method import Tail
    from tda_export.graph.storage import Storage
    from tda_export.packing import Packing


@command(
    rare=(
        "cett",
        "allocation",
        "packing",
        "tail",
        "refresh",
        "group",
        "weights_for",
        "no_verify",
        "provider",
        "as_json",
    )
)
@model_argument
@option("-o", "--output", type=PATH, required=True, help="Artifact folder to create.")
@option("--calibration", "calibration_file", type=PATH, help="File that calibrate wrote. griffin needs none.")
@option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Weights and arithmetic. CUDA needs fp16 or bf16.",
)
@option(
    "--method",
    type=click.Choice(["priced", "tda", "griffin"]),
    default="priced",
    show_default=True,
    help="priced: each token skips the rows of linears and head that affect the output least. tda: decode reads only "
    "the FFN neurons that matter for the prompt, by CETT. griffin: by Griffin's score; needs --sparsity.",
)
@price_option
@budget_options
@option(
    "--packing",
    type=click.Choice(["separate", "sites"]),
    help="With priced: one threshold per matrix, or one for all matrices of the same input.  [default: separate for "
    "fp32, sites for fp16 and bf16]",
)
@option(
    "--tail",
    type=click.Choice(["zero", "mean"]),
    help="With tda: what replaces dropped neurons: zero, or their mean over the prompt.  [default: mean for a budget "
    "by KL, otherwise zero]",
)
@option(
    "--refresh",
    type=click.IntRange(0),
    help="With tda: after every N tokens, read them again densely and renew the mask; 0 is off.  [default: 0]",
)
@weight_options("float", "int8", "int4")
@option(
    "--kv",
    type=click.Choice(["float", "float16", "int8"]),
    default="float",
    show_default=True,
    group=WEIGHTS,
    help="How keys and values are stored: as --dtype says; float16, for --dtype fp32; or in 8 bits with a scale for "
    "each token and head.",
)
@overwrite_option
@option("--no-verify", is_flag=True, help="Skip the comparison with transformers.")
@provider_option
@json_option
def build(
    model: str,
    output: Path,
    calibration_file: Path | None,
    dtype: str,
    method: str,
    price: float | None,
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    packing: Packing | None,
    tail: Tail | None,
    refresh: int | None,
    weights: str,
    group: int | None,
    weights_for: tuple[str, ...],
    kv: str,
    overwrite: bool,
    no_verify: bool,
    provider: str,
    as_json: bool,
) -> None:
    """Write an artifact of MODEL: a prefill and a decode graph that share one weights file.

    MODEL is a Hugging Face folder, a hub id, a .gguf file, or smollm2-135m. The budget is the calibration file's own
    unless an option gives another; generate, chat and serve can still change it. The result is compared with
    transformers before it appears at OUTPUT.

    A float model is rounded to nearest by --weights int4. A folder from 'tda-export quantize' loses less, and keeps its
    formats.
    """
    from tda_export.cli.tables import print_checks
    from tda_export.deployments import Asked
    from tda_export.errors import TdaError
    from tda_export.files import check_output
    from tda_export.graph.contract import DTYPES
    from tda_export.graph.export import check_kv, export_artifact
    from tda_export.graph.storage import read_plan, storage_of
    from tda_export.graph.verify import verify_artifact
    from tda_export.models.source import resolve_model
    from tda_export.runtime.artifact import is_artifact
    from tda_export.runtime.deployment import Refresh
    from tda_export.runtime.providers import choose_provider

    check_output(output, overwrite=overwrite, what="an artifact without other files", is_earlier_output=is_artifact)
    asked = Asked(
        price=price,
        sparsity=sparsity,
        max_kl=max_kl,
        cett=cett,
        allocation=allocation,
        refresh=None if refresh is None else Refresh(refresh),
    )
    check_kv(kv, DTYPES[dtype])
    choose_provider(provider, DTYPES[dtype])
    _refuse_foreign(method, asked, calibration_file, {"--packing": packing, "--tail": tail})
    source = resolve_model(model, notify=lambda line: click.echo(line, err=True))
    plan = read_plan(source, weights, group, weights_for)
    if plan is not None and not as_json:
        click.echo("Weights are rounded to the nearest integers; 'tda-export quantize' loses less.", err=True)
    storage = storage_of(source, DTYPES[dtype], plan)
    request = replace(_request(source, storage, method, asked, calibration_file, packing, tail), kv=kv)
    if not as_json and request.design.expected:
        click.echo(_expectation(model, request))
    checks = []

    def check(folder: Path) -> None:
        if no_verify:
            return
        try:
            checks.extend(verify_artifact(folder, lambda name: source, provider=provider, quiet=as_json))
        except TdaError as error:  # it names the temporary folder, and may advise building again
            told = str(error).replace(str(folder), str(output))
            problem = told.removesuffix(" Build the artifact again.")
            if problem != told:
                files = "configuration, tokenizer and chat template"
                problem += f" {output} was not written. Check the model's own files: {files}."
            raise TdaError(problem) from error
        if not as_json:
            print_checks(checks)
        if failed := [item.name for item in checks if not item.passed]:
            raise TdaError(f"Verification failed ({', '.join(failed)}); {output} was not written.")

    export_artifact(request, output, quiet=as_json, check=check)
    size = sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        expected = {name: value for name, value in request.design.expected.items() if name in ("sparsity", "kl")}
        result = {"output": str(output), "bytes": size, "budget": request.budget, "expected": expected}
        click.echo(json.dumps(result | {"checks": [asdict(item) | {"passed": item.passed} for item in checks]}))
    else:
        click.echo(f"Wrote {output} ({size / 2**20:,.0f} MiB{', not verified' if no_verify else ', verified'})")


def _refuse_foreign(method: str, asked: Asked, calibration: Path | None, options: dict[str, Any]) -> None:
    """Refuse options that have no effect with a method."""
    from tda_export.errors import UsageError

    given = options | {
        "--price": asked.price,
        "--cett": asked.cett,
        "--allocation": asked.allocation,
        "--max-kl": asked.max_kl,
        "--refresh": asked.refresh,
        "--calibration": calibration,
    }
    if method == "griffin":
        if asked.sparsity is None or any(value is not None for value in given.values()):
            raise UsageError(
                "--method griffin takes --sparsity, and neither another budget nor --allocation, --calibration, "
                "--packing, --tail, --refresh."
            )
        return
    if calibration is None:
        raise UsageError(f"--method {method} needs --calibration FILE. Make one with 'tda-export calibrate'.")
    foreign = {"priced": ("--cett", "--allocation", "--refresh", "--tail"), "tda": ("--price", "--packing")}[method]
    other = {"priced": "tda", "tda": "priced"}[method]
    for name in foreign:
        if given[name] is not None:
            raise UsageError(
                f"{name} has no effect with --method {method}. Leave it out, or build with --method {other}."
            )


def _request(
    source: Any,
    storage: Storage,
    method: str,
    asked: Asked,
    calibration: Path | None,
    packing: Packing | None,
    tail: Tail | None,
) -> BuildRequest:
    from tda_export.errors import UsageError
    from tda_export.graph.requests import griffin_request, mask_request, priced_request

    if method == "priced":
        assert calibration is not None
        return priced_request(source, storage, calibration, asked, packing)
    if storage.has_integers:
        raise UsageError(f"--method {method} needs a float model. Give one, or build with --method priced.")
    if method == "griffin":
        assert asked.sparsity is not None
        return griffin_request(source, storage.dtype, asked.sparsity)
    assert calibration is not None
    return mask_request(source, storage.dtype, calibration, asked, tail)


def _expectation(model: str, request: BuildRequest) -> str:
    from tda_export.float_kl import float_kl_text, integers_kl

    expected, budget = request.design.expected, ", ".join(f"{name} {value}" for name, value in request.budget.items())
    what = "the layers' linears" if request.design.layout == "priced" else "the FFN"
    kl = expected.get("kl")
    predicted = "" if kl is None else f", predicted KL {kl:.3f} nats a token"
    integers = integers_kl(request.source.quantisation)
    if kl is not None and integers is not None:
        predicted += f"; {float_kl_text(integers, kl)}"
    return f"{model}, {budget}: expected sparsity {expected['sparsity']:.3f} of {what}{predicted}"
