"""`tda-export calibrate`: measure the CETT curves of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tda_export.cli.options import budget_options, json_option, model_argument, overwrite_option

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule
    from tda_export.calibration.curves import Estimator
    from tda_export.calibration.run import CalibrationDtype

DEFAULT_BUDGET = {"sparsity": 0.5, "allocation": "kl"}
CURVES_BUDGET = {"cett": 0.2}  # the paper's


@click.command()
@model_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Calibration file to write (.safetensors).",
)
@click.option(
    "--dataset",
    default="builtin",
    show_default=True,
    help="builtin, a .txt, .jsonl, .json, .csv or .parquet file, or a hub dataset (name or name:config:split).",
)
@click.option("--text-column", help="Column that holds the text.  [default: text]")
@click.option(
    "--estimator",
    type=click.Choice(["prompt", "token"]),
    default="prompt",
    show_default=True,
    help="prompt: mask from a prompt, CETT on its continuation. token: the paper's literal reading, per token.",
)
@budget_options
@click.option(
    "--curves-only",
    is_flag=True,
    help="Measure CETT curves alone, a few times faster; build then takes --cett, or --allocation uniform.",
)
@click.option(
    "--prior-tokens",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Tokens that what is known of all texts counts for beside a prompt's own, so that short prompts lean on it.",
)
@click.option(
    "--sequences",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Token sequences to read; at least 2 without --curves-only.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Tokens of a sequence that the mask is taken from.",
)
@click.option(
    "--continuation-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens of a sequence that CETT is measured on.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Order of the documents.")
@click.option("--device", default="cpu", show_default=True, help="Where PyTorch runs the model: cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Dtype of the model while calibrating; curves are float32.",
)
@overwrite_option
@json_option
def calibrate(
    model: str,
    output: Path,
    dataset: str,
    text_column: str | None,
    estimator: Estimator,
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    curves_only: bool,
    prior_tokens: int,
    sequences: int,
    prompt_tokens: int,
    continuation_tokens: int,
    seed: int,
    device: str,
    dtype: CalibrationDtype,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Measure what MODEL loses when neurons are dropped.

    MODEL is a Hugging Face folder, a hub id, a .gguf file, or smollm2-135m. One pass over the data gives the CETT
    curves of every layer; a sweep from dense to sparse then finds where bytes are worth most by KL, at the cost of
    about twenty forward passes for each sequence. Build can choose any budget from the file. A run that was
    interrupted goes on where it was when it is started again.
    """
    from tda_export.calibration.budgets import check_reach, nearest_reachable
    from tda_export.calibration.corpus import load_corpus
    from tda_export.calibration.file import is_calibration, write_calibration
    from tda_export.calibration.resume import PartialFile
    from tda_export.calibration.run import CalibrationSettings
    from tda_export.calibration.run import calibrate as run
    from tda_export.cli.options import chosen_budget
    from tda_export.cli.tables import print_allocation, print_measurements
    from tda_export.errors import UsageError
    from tda_export.files import check_output
    from tda_export.models.source import resolve_model
    from tda_export.progress import progress

    settings = CalibrationSettings(
        estimator, sequences, prompt_tokens, continuation_tokens, seed, dtype, device, curves_only, prior_tokens
    )
    default = CURVES_BUDGET if curves_only else DEFAULT_BUDGET
    budget = chosen_budget(cett, sparsity, allocation, max_kl, default)
    if curves_only and budget.by_kl:
        raise UsageError(
            "--curves-only leaves out what this budget needs. Give --cett, or --sparsity with --allocation uniform."
        )
    check_reach(budget)
    check_output(output, overwrite=overwrite, what="a calibration", is_earlier_output=is_calibration)
    source = resolve_model(model, notify=lambda line: click.echo(line, err=True))
    if settings.length > source.spec.max_positions:
        raise UsageError(
            f"{settings.length} tokens (prompt and continuation) are more than the {source.spec.max_positions} "
            f"positions of {model}. Lower --prompt-tokens or --continuation-tokens."
        )
    corpus = load_corpus(
        dataset,
        source.tokenizer,
        text_column=text_column,
        sequences=sequences,
        length=settings.length,
        seed=seed,
        vocab_size=source.spec.vocab_size,
    )
    found = corpus.tokens.shape[0]
    if found < sequences:
        click.echo(
            f"{dataset} holds text for {found} sequences of {settings.length} tokens; calibrating on those.", err=True
        )
    show = partial(progress, quiet=as_json)
    calibration = run(source, corpus, settings, budget.describe(), show=show, output=output)
    reachable = nearest_reachable(budget, calibration.kl)
    if reachable != budget:
        click.echo(
            f"The KL path reaches sparsity {reachable.sparsity}, not {budget.sparsity}: that is the file's budget.",
            err=True,
        )
        budget = reachable
        calibration = replace(calibration, provenance=calibration.provenance | {"budget": budget.describe()})
    chosen = calibration.allocate(budget)
    write_calibration(calibration, output)
    PartialFile(output, {}).remove()
    measurements = calibration.kl.measurements() if calibration.kl else []
    if as_json:
        click.echo(
            json.dumps(
                {
                    "output": str(output),
                    **calibration.provenance,
                    "allocation": asdict(chosen) | {"sparsity": chosen.sparsity},
                    "predicted_kl": measurements,
                }
            )
        )
        return
    print_allocation(chosen, f"{model}, {estimator} estimator, {budget}")
    if measurements:
        print_measurements(measurements)
    click.echo(f"FFN sparsity {chosen.sparsity:.3f} on {found} sequences; wrote {output}")
