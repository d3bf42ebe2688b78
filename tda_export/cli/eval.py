"""`tda-export eval`: what a method keeps of the dense model, on a text."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tda_export.cli.options import (
    PATH,
    artifact_argument,
    budget_options,
    budget_thresholds,
    chosen_budget,
    json_option,
    provider_option,
)

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule


@click.command("eval")
@artifact_argument
@click.option("--text", "text_file", type=PATH, required=True, help="A UTF-8 text file that calibration has not seen.")
@click.option(
    "--method",
    type=click.Choice(["tda", "griffin", "dense"]),
    default="tda",
    show_default=True,
    help="tda: the artifact's thresholds, or those of a budget. griffin: the same number of neurons in every layer by "
    "Griffin's score; takes --sparsity. dense: every neuron.",
)
@budget_options
@click.option("--prompts", type=click.IntRange(2), default=32, show_default=True, help="Windows of the text.")
@click.option(
    "--prompt-tokens", type=click.IntRange(2), default=384, show_default=True, help="Length of a window's prompt."
)
@click.option(
    "--continuation-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens that are decoded and scored after it.",
)
@provider_option
@json_option
def evaluate(
    artifact: Path,
    text_file: Path,
    method: str,
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    prompts: int,
    prompt_tokens: int,
    continuation_tokens: int,
    provider: str,
    as_json: bool,
) -> None:
    """Measure what a method keeps of the dense model on a text: KL, perplexity, agreement, and the bytes it reads.

    Strict protocol: the prompt is read densely and gives the mask, every token after it is decoded under the mask.
    Standard errors are over the prompts.
    """
    from tda_export.errors import UsageError
    from tda_export.evaluation.text import TextSettings, cut_windows, evaluate_text
    from tda_export.graph.derive import artifact_method, derived_sessions
    from tda_export.graph.method import griffin
    from tda_export.progress import progress
    from tda_export.runtime.artifact import open_artifact
    from tda_export.runtime.providers import choose_provider
    from tda_export.runtime.session import Sessions
    from tda_export.runtime.text import Text

    given = (cett, sparsity, allocation) != (None, None, None)
    if method == "dense" and given:
        raise UsageError("--method dense reads every neuron, so a budget means nothing. Leave one of them out.")
    if method == "griffin" and (sparsity is None or cett is not None or allocation is not None):
        raise UsageError("--method griffin takes --sparsity, and no other budget.")
    opened = open_artifact(artifact)
    own = artifact_method(opened)
    if method == "tda" and own.selection != "threshold":
        raise UsageError(
            f"{artifact} was built with --method {own.name}, so tda cannot be measured with it. "
            "Give an artifact of --method tda."
        )
    budget = chosen_budget(cett, sparsity, allocation, {}) if given and method == "tda" else None
    settings = TextSettings(prompts, prompt_tokens, continuation_tokens)
    text = Text(opened)
    windows = cut_windows(text.encode(_read(text_file), special_tokens=False), text.encode(""), settings)
    thresholds = budget_thresholds(opened, budget) if budget else None
    sessions = Sessions(opened, choose_provider(provider, opened.shape.dtype))
    if method == "griffin":
        assert sparsity is not None
        sessions = derived_sessions(opened, sessions, griffin(sparsity))
    with progress("Evaluating", len(windows), quiet=as_json) as advance:
        quality = evaluate_text(
            opened, sessions, windows, settings, thresholds, masked=method != "dense", advance=advance
        )
    result = {
        "model": opened.manifest["model"]["name"],
        "dtype": opened.shape.dtype,
        "provider": sessions.provider,
        "method": method,
        "budget": _budget(method, budget, sparsity, opened.manifest),
        "text": text_file.name,
        "prompt_tokens": prompt_tokens,
        "continuation_tokens": continuation_tokens,
        **asdict(quality),
    }
    click.echo(json.dumps(result) if as_json else _summary(result))


def _budget(method: str, budget: Any, sparsity: float | None, manifest: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, as plain data."""
    if method == "dense":
        return {}
    if method == "griffin":
        return {"sparsity": sparsity}
    described: dict[str, Any] = budget.describe() if budget else manifest["budget"]
    return described


def _read(path: Path) -> str:
    from tda_export.errors import TdaError, UsageError

    if not path.is_file():
        raise UsageError(f"{path}: no such file. Give a UTF-8 text file with --text.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TdaError(f"{path}: not valid UTF-8 text. Convert it to UTF-8.") from error


def _summary(result: dict[str, Any]) -> str:
    budget = ", ".join(f"{name} {value}" for name, value in result["budget"].items())
    return "\n".join(
        [
            f"{result['model']}, {result['method']}{f' ({budget})' if budget else ''} on {result['text']}, "
            f"{result['prompts']} prompts of {result['prompt_tokens']} + {result['continuation_tokens']} tokens",
            f"KL to dense         {result['kl']:.4f} ± {result['kl_stderr']:.4f} nats a token",
            f"perplexity          {result['perplexity']:.3f} ± {result['perplexity_stderr']:.3f}",
            f"dense perplexity    {result['dense_perplexity']:.3f} ± {result['dense_perplexity_stderr']:.3f}",
            f"top-1 agreement     {result['agreement']:.4f} ± {result['agreement_stderr']:.4f}",
            f"FFN bytes a token   {result['ffn_bytes'] / 2**20:,.1f} of {result['dense_ffn_bytes'] / 2**20:,.1f} MiB "
            f"(density {result['density']:.3f})",
        ]
    )
