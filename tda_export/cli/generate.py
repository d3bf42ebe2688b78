"""`tda-export generate`: run an artifact."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tda_export.cli.options import (
    artifact_argument,
    budget_options,
    chosen_budget,
    chosen_refresh,
    json_option,
    provider_option,
    refresh_option,
)

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule
    from tda_export.runtime.generate import MaskMode, Metrics

FINISHED = {"stop": "end of text", "length": "as many as asked for", "context": "context full", "": "interrupted"}


@click.command()
@artifact_argument
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option(
    "--mask",
    type=click.Choice(["tda", "dense"]),
    default="tda",
    show_default=True,
    help="tda: decode with the prompt's mask. dense: with every neuron.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Stop after this many tokens."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample from the k likeliest tokens; 0 is off.")
@click.option(
    "--top-p",
    type=float,
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens that reach this probability; 1 is off.",
)
@click.option("--seed", type=int, help="Make sampling repeatable.")
@click.option("--context", type=int, help="Most tokens of prompt and answer.  [default: the model's maximum]")
@budget_options
@refresh_option
@provider_option
@json_option
def generate(
    artifact: Path,
    prompt: str | None,
    chat: bool,
    mask: MaskMode,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    context: int | None,
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    refresh: int | None,
    provider: str,
    as_json: bool,
) -> None:
    """Generate text from PROMPT (or standard input) with ARTIFACT.

    --sparsity, --max-kl or --cett choose another budget from the artifact's own calibration, without another
    build. Text goes to standard output, what it cost to standard error.
    """
    from tda_export.errors import TdaError, UsageError
    from tda_export.runtime import Sampling, load

    budget = None
    given = (cett, sparsity, allocation, max_kl) != (None, None, None, None)
    if mask == "dense" and (given or refresh is not None):
        raise UsageError("--mask dense reads every neuron, so a budget means nothing. Leave one of them out.")
    if given:
        budget = chosen_budget(cett, sparsity, allocation, max_kl, {})
    sampling = Sampling(temperature, top_k, top_p, seed)
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError("No prompt. Give one as an argument or on standard input.")
        try:
            prompt = sys.stdin.read().removesuffix("\n")  # echo's own
        except UnicodeDecodeError as error:
            raise TdaError("The prompt on standard input is not valid UTF-8 text. Convert it to UTF-8.") from error
    model = load(artifact, provider=provider)
    deployment = model.artifact.deployment
    if budget:
        from tda_export.evaluation.methods import budget_deployment

        deployment = budget_deployment(model.artifact, budget)
    chosen = chosen_refresh(model.artifact, refresh)
    if chosen is not None:
        deployment = deployment.with_refresh(chosen)
    generation = model.generate(
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        mask=mask,
        sampling=sampling,
        context=context,
        deployment=deployment,
    )
    tokens, shown = [], 0
    for token in generation:
        tokens.append(token.id)
        shown += len(token.text)
        if not as_json:
            click.echo(token.text, nl=False)
    if as_json:
        click.echo(json.dumps({"text": generation.text, "tokens": tokens, "metrics": asdict(generation.metrics)}))
    else:
        click.echo(generation.text[shown:])  # what an end of text left unfinished
        click.echo(summary(generation.metrics), err=True)


def summary(metrics: Metrics) -> str:
    """Say in one paragraph what a generation cost."""
    rate = metrics.decode_tokens_per_second
    lines = [
        f"{metrics.prompt_tokens} prompt tokens, {metrics.new_tokens} new ({FINISHED[metrics.finish_reason]}), "
        f"{metrics.mask} on {metrics.provider}, FFN sparsity {metrics.sparsity:.3f}"
        + (f", {metrics.refreshes} refreshes" if metrics.refreshes else ""),
        f"{metrics.time_to_first_token:.3f} s to the first token, "
        + (f"{rate:.1f} tokens/s after it, " if rate else "")
        + f"{metrics.ffn_bytes_per_token / 2**20:,.1f} of {metrics.dense_ffn_bytes_per_token / 2**20:,.1f} MiB of "
        "FFN weights a token",
    ]
    return "\n".join(lines)
