"""`tda-export calibrate`: measure what a model loses when rows of its matrices, or neurons, are not read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tda_export.cli.help_groups import command, option
from tda_export.cli.options import (
    budget_options,
    corpus_options,
    device_option,
    json_option,
    model_argument,
    overwrite_option,
)

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule, Budget
    from tda_export.calibration.curves import Estimator
    from tda_export.calibration.file import Calibration
    from tda_export.calibration.run import CalibrationDtype, CalibrationMethod, CalibrationSettings
    from tda_export.packing import HeadRows, Packing

PRICED_BUDGET = {"max_kl": 0.05}
TDA_BUDGET = {"sparsity": 0.5, "allocation": "kl"}
CURVES_BUDGET = {"cett": 0.2}  # the paper's value


@command(
    rare=(
        "text_column",
        "labels",
        "packing",
        "head",
        "refine",
        "estimator",
        "cett",
        "allocation",
        "curves_only",
        "prior_tokens",
        "as_json",
    )
)
@model_argument
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Calibration file to write (.safetensors).",
)
@corpus_options
@option(
    "--method",
    type=click.Choice(["priced", "tda", "all"]),
    default="priced",
    show_default=True,
    help="priced: prices of the rows of all linears and the head. tda: masks of FFN neurons from the prompt. all: "
    "both.",
)
@option(
    "--labels",
    type=click.IntRange(1),
    help="With prices: labels per token, drawn from the model's own distribution.  [default: 2]",
)
@option(
    "--packing",
    type=click.Choice(["separate", "sites"]),
    help="With prices: measure one packing only. separate: one threshold per matrix. sites: one for the matrices "
    "of the same input.  [default: both]",
)
@option(
    "--head",
    type=click.Choice(["priced", "whole"]),
    help="With prices: price the rows of the head too, or let every token read all of them.  [default: priced, if its "
    "format allows]",
)
@option(
    "--refine",
    type=click.IntRange(0),
    metavar="STEPS",
    help="With prices: steps that adjust the price of each row by the KL itself, on 4 sequences each (such as 60). "
    "Loses less where half of the bytes are skipped, and takes a few times as long.  [default: 0]",
)
@option(
    "--estimator",
    type=click.Choice(["prompt", "token"]),
    help="With tda: measure CETT of a prompt's mask on its continuation, or of each token by itself, as in the paper's "
    "text.  [default: prompt]",
)
@budget_options
@option(
    "--curves-only",
    is_flag=True,
    help="With tda: measure CETT curves only, a few times faster. build then takes --cett or --allocation uniform.",
)
@option(
    "--prior-tokens",
    type=click.IntRange(0),
    help="With tda: weight of the calibration prior relative to the prompt's own statistics, in tokens.  [default: 64]",
)
@option(
    "--sequences",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Token sequences to read; at least 2.",
)
@option(
    "--prompt-tokens",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Tokens at the start of a sequence, read densely. Masks are selected from them.",
)
@option(
    "--continuation-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens after those, used to compute prices and to measure losses.",
)
@device_option
@option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Dtype of the model while calibrating.",
)
@overwrite_option
@json_option
def calibrate(
    model: str,
    output: Path,
    dataset: str,
    text_column: str | None,
    method: CalibrationMethod,
    labels: int | None,
    packing: Packing | None,
    head: HeadRows | None,
    refine: int | None,
    estimator: Estimator | None,
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    curves_only: bool,
    prior_tokens: int | None,
    sequences: int,
    prompt_tokens: int,
    continuation_tokens: int,
    seed: int,
    device: str,
    dtype: CalibrationDtype,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure the loss of skipping weight rows of MODEL.

    MODEL is a Hugging Face folder, a hub id, a .gguf file, or smollm2-135m. Half of the sequences estimate, by backward
    passes, how much each row of each linear affects the output. On the other half about ten settings are measured:
    bytes read, and KL to dense. --method tda measures masks of FFN neurons instead, which takes several times as long.
    build can choose any budget from the file. An interrupted run resumes when it is started again. Under torchrun,
    processes share the sequences (docs/large-models.md).
    """
    from tda_export.calibration.budgets import check_priced, check_reach
    from tda_export.calibration.corpus import load_corpus
    from tda_export.calibration.file import is_calibration, write_calibration
    from tda_export.calibration.resume import PartialFile
    from tda_export.calibration.run import CalibrationSettings
    from tda_export.calibration.run import calibrate as run
    from tda_export.cli.options import chosen_budget
    from tda_export.errors import UsageError
    from tda_export.files import check_output
    from tda_export.models.source import resolve_model
    from tda_export.packing import PACKINGS, chosen_head
    from tda_export.progress import progress
    from tda_export.ranks import join

    ranks = join(device)
    _check_options(method, {"--labels": labels, "--packing": packing, "--head": head, "--refine": refine}, "tda")
    of_masks = {"--estimator": estimator, "--curves-only": curves_only or None, "--prior-tokens": prior_tokens}
    _check_options(method, of_masks | {"--cett": cett, "--allocation": allocation}, "priced")
    settings = CalibrationSettings(
        estimator or "prompt",
        sequences,
        prompt_tokens,
        continuation_tokens,
        seed,
        dtype,
        device,
        curves_only,
        64 if prior_tokens is None else prior_tokens,
        method,
        2 if labels is None else labels,
        PACKINGS if packing is None else (packing,),
        head,
        refine or 0,
    )
    default = PRICED_BUDGET if settings.priced else CURVES_BUDGET if curves_only else TDA_BUDGET
    budget = chosen_budget(cett, sparsity, allocation, max_kl, default)
    if settings.priced:
        check_priced(budget)
    if settings.masks:
        if curves_only and budget.by_kl and not settings.priced:
            raise UsageError(
                "--curves-only leaves out what this budget needs. Give --cett, or --sparsity with --allocation uniform."
            )
        check_reach(budget)
    if ranks.first:
        check_output(output, overwrite=overwrite, what="a calibration", is_earlier_output=is_calibration)
    source = ranks.first_here(lambda: resolve_model(model, notify=lambda line: click.echo(line, err=True)))
    if settings.masks and source.quantisation is not None:
        raise UsageError(
            f"--method {method}: masks need a float model, and {model} is quantised. Calibrate the float "
            "model, or with --method priced."
        )
    if settings.priced:
        chosen_head(head, source.formats, model)  # refuses what cannot be, before any text is read
    if settings.length > source.spec.max_positions:
        raise UsageError(
            f"{settings.length} tokens (prompt and continuation) are more than the {source.spec.max_positions} "
            f"positions of {model}. Lower --prompt-tokens or --continuation-tokens."
        )
    corpus = ranks.from_first(
        lambda: load_corpus(
            dataset,
            source.tokenizer,
            text_column=text_column,
            sequences=sequences,
            length=settings.length,
            seed=seed,
            vocab_size=source.spec.vocab_size,
        )
    )
    found = corpus.tokens.shape[0]
    if found < sequences:
        click.echo(f"{dataset} has text for {found} sequences of {settings.length} tokens; using those.", err=True)
    show = partial(progress, quiet=as_json or not ranks.first)
    calibration = run(source, corpus, settings, _describe(budget, settings), show=show, output=output, ranks=ranks)
    if not ranks.first:
        return
    reachable = _reachable(budget, calibration)
    if reachable != budget:
        budget = reachable
        provenance = calibration.provenance | {"budget": _describe(budget, settings)}
        calibration = replace(calibration, provenance=provenance)
    results = _results(calibration, budget, settings)  # may fail, so before writing
    write_calibration(calibration, output)
    PartialFile(output, {}).remove()
    if as_json:
        click.echo(json.dumps({"output": str(output), **calibration.provenance, **results}))
        return
    _print(calibration, budget, settings, model)
    click.echo(f"Calibrated on {found} sequences; wrote {output}")


def _check_options(method: CalibrationMethod, options: dict[str, Any], useless_with: CalibrationMethod) -> None:
    from tda_export.errors import UsageError

    given = [name for name, value in options.items() if value is not None]
    if given and method == useless_with:
        other = "tda" if method == "priced" else "priced"
        raise UsageError(
            f"{given[0]} has no effect with --method {method}. Leave it out, or give --method {other}, or all."
        )


def _describe(budget: Budget, settings: CalibrationSettings) -> dict[str, Any]:
    """Return the budget as plain data, without an allocation rule where only prices are measured."""
    content = budget.describe()
    return content if settings.masks else {name: value for name, value in content.items() if name != "allocation"}


def _reachable(budget: Budget, calibration: Calibration) -> Budget:
    """Return the nearest budget that every measured table can meet, and tell the user where it is another one."""
    from tda_export.calibration.budgets import nearest_priced, nearest_reachable

    by_path = nearest_reachable(budget, calibration.kl)
    reachable = nearest_priced(by_path, calibration.priced.tables().values() if calibration.priced else ())
    what = "The KL path reaches" if reachable == by_path else "The measured prices reach"
    if reachable.sparsity != budget.sparsity:
        click.echo(
            f"{what} sparsity {reachable.sparsity}, not {budget.sparsity}: that is the file's budget.",
            err=True,
        )
    elif reachable.max_kl != budget.max_kl:
        click.echo(f"{what} KL {reachable.max_kl:.3f}, not {budget.max_kl}: that is the file's budget.", err=True)
    return reachable


def _results(calibration: Calibration, budget: Budget, settings: CalibrationSettings) -> dict[str, Any]:
    """Return the measurements and what the budget chooses from them, as plain data."""
    results: dict[str, Any] = {}
    if calibration.priced is not None:
        tables = calibration.priced.tables()
        prices = {
            name: table.price_for(sparsity=budget.sparsity, max_kl=budget.max_kl) for name, table in tables.items()
        }
        results["prices"] = {name: asdict(table.predicted(prices[name])) for name, table in tables.items()}
        results["price_tables"] = {name: table.to_dict() for name, table in tables.items()}
    if settings.masks and _of_masks(calibration, budget):
        chosen = calibration.allocate(budget)
        results["allocation"] = asdict(chosen) | {"sparsity": chosen.sparsity}
        results["predicted_kl"] = calibration.kl.measurements() if calibration.kl else []
    return results


def _of_masks(calibration: Calibration, budget: Budget) -> bool:
    """Return whether the budget can choose masks: a KL can do so only where the KL of masks was measured."""
    return calibration.kl is not None or not budget.by_kl


def _print(calibration: Calibration, budget: Budget, settings: CalibrationSettings, model: str) -> None:
    from tda_export.cli.tables import print_allocation, print_measurements, print_prices
    from tda_export.float_kl import integers_kl

    if calibration.priced is not None:
        for name, table in calibration.priced.tables().items():
            print_prices(table, integers_kl(calibration.provenance["model"].get("quantization")))
            price = table.price_for(sparsity=budget.sparsity, max_kl=budget.max_kl)
            row = table.predicted(price)
            head = f" and {row.head_share:.3f} of the head's" if table.prices_head else ""
            reads = f"price {price:.4g} reads {row.share:.3f} of the linears' bytes{head} at KL {row.kl:.4f}"
            click.echo(f"{model}, {_text(budget)}, {name}: {reads}")
    if settings.masks and _of_masks(calibration, budget):
        chosen = calibration.allocate(budget)
        print_allocation(chosen, f"{model}, {settings.estimator} estimator, {budget}")
        if calibration.kl:
            print_measurements(calibration.kl.measurements())
        click.echo(f"FFN sparsity {chosen.sparsity:.3f}")


def _text(budget: Budget) -> str:
    """Describe the budget of a price, which has no allocation rule."""
    return f"KL {budget.max_kl}" if budget.max_kl is not None else f"sparsity {budget.sparsity}"
