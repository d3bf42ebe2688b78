"""`tda-export generate`: generate text with an artifact."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tda_export.cli.deployment_options import Deployed, deployment_options
from tda_export.cli.help_groups import command, option
from tda_export.cli.options import (
    RARE_ANSWER_OPTIONS,
    RARE_DEPLOYMENT_OPTIONS,
    Answering,
    answer_options,
    artifact_argument,
    context_option,
    json_option,
)

if TYPE_CHECKING:
    from tda_export.runtime.generate import Metrics

MATRICES = {"ffn": "FFN", "linears": "linear"}
SHORTEST = 1  # the tokens of the shortest prompt
FINISHED = {"stop": "end of text", "length": "token limit reached", "context": "context full", "": "interrupted"}


@command(rare=(*RARE_ANSWER_OPTIONS, *RARE_DEPLOYMENT_OPTIONS))
@artifact_argument
@click.argument("prompt", metavar="[PROMPT|-]", required=False)
@option("--chat", is_flag=True, help="Put the prompt into the chat template.")
@answer_options(128)
@context_option
@deployment_options
@json_option
def generate(
    artifact: Path,
    prompt: str | None,
    chat: bool,
    answering: Answering,
    context: int | None,
    deployed: Deployed,
    as_json: bool,
) -> None:
    """Generate text from PROMPT with ARTIFACT.

    Without PROMPT, or if it is -, the prompt is all of standard input, without one line end at its end. A budget
    applies to this run; the artifact need not be built again. Text goes to standard output, its cost to standard error.
    """
    from tda_export.errors import TdaError, UsageError
    from tda_export.runtime.deployment import PriceDeployment

    if answering.chat_template_kwargs and not chat:
        raise UsageError("--chat-template-kwargs has no effect without --chat. Give both, or neither.")
    if prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise UsageError("No prompt. Give one as an argument or on standard input.")
        try:
            prompt = sys.stdin.read().removesuffix("\n")  # which `echo` adds
        except UnicodeDecodeError as error:
            raise TdaError("The prompt on standard input is not valid UTF-8 text. Convert it to UTF-8.") from error
    # The table of the shortest prompt allows the largest KL. A larger one is refused before the model is loaded.
    model, deployment = deployed.load(artifact, prompt_tokens=SHORTEST)
    tokens = model.tokenize(prompt, chat=chat, chat_template_kwargs=answering.chat_template_kwargs)
    if deployed.max_kl is not None and isinstance(deployment, PriceDeployment):
        deployment = model.at(max_kl=deployed.max_kl, prompt_tokens=len(tokens))
    generation = model.generate(
        tokens,
        max_new_tokens=answering.max_new_tokens,
        mask=deployed.mask,
        sampling=answering.sampling,
        context=context,
        deployment=deployment,
        stop=answering.stop,
        stop_token_ids=answering.stop_token_ids,
        ignore_eos=answering.ignore_eos,
        lookup=answering.lookup,
    )
    written, shown = [], 0
    for token in generation:
        written.append(token.id)
        shown += len(token.text)
        if not as_json:
            click.echo(token.text, nl=False)
    if as_json:
        click.echo(json.dumps({"text": generation.text, "tokens": written, "metrics": asdict(generation.metrics)}))
    else:
        click.echo(generation.text[shown:])  # text that was held back until the end
        click.echo(summary(generation.metrics), err=True)


def looked_up(metrics: Metrics) -> str:
    """Describe how many drafted tokens were accepted."""
    return f"{metrics.accepted} of {metrics.drafted} drafted tokens accepted, {metrics.decode_steps} steps"


def summary(metrics: Metrics) -> str:
    """Describe the time and bytes of a generation, in two lines."""
    rate = metrics.decode_tokens_per_second
    lines = [
        f"{metrics.prompt_tokens} prompt tokens, {metrics.new_tokens} new ({FINISHED[metrics.finish_reason]}), "
        f"{metrics.mask} on {metrics.provider}, {MATRICES[metrics.matrices]} sparsity {metrics.sparsity:.3f}"
        + (f", {metrics.refreshes} refreshes" if metrics.refreshes else "")
        + (f", {looked_up(metrics)}" if metrics.drafted else ""),
        f"{metrics.time_to_first_token:.3f} s to the first token, "
        + (f"{rate:.1f} tokens/s after it, " if rate else "")
        + f"{metrics.bytes_per_token / 2**20:,.1f} of {metrics.dense_bytes_per_token / 2**20:,.1f} MiB of "
        f"{MATRICES[metrics.matrices]} weights a token",
    ]
    return "\n".join(lines)
