"""`tda-export eval`: compare a method with the dense model, on a text or on tasks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tda_export.cli.eval_tasks import DATA_VARIABLE, evaluate_tasks
from tda_export.cli.help_groups import command, option
from tda_export.cli.options import (
    PATH,
    artifact_argument,
    budget_options,
    chosen_refresh,
    json_option,
    price_option,
    provider_option,
    refresh_option,
    refuse_given,
)

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule
    from tda_export.packing import Parts

TEXT_OPTIONS = ("prompts", "prompt_tokens", "continuation_tokens", "free", "refresh")
TASK_OPTIONS = ("data", "limit", "protocol", "reference")


@command(
    "eval",
    rare=(
        "cett",
        "allocation",
        "parts",
        "densities",
        "refresh",
        "calibration",
        "protocol",
        "reference",
        "provider",
        "as_json",
    ),
)
@click.pass_context
@artifact_argument
@option("--text", "text_file", type=PATH, help="UTF-8 text file, other than the calibration text.")
@option("--tasks", help="Instead of a text: comma-separated tasks of lm-evaluation-harness, or all.")
@option(
    "--method",
    type=click.Choice(["priced", "teal", "wina", "tda", "paper", "griffin", "tt", "dense"]),
    help="With prices: priced, teal or wina. With masks: tda, paper, griffin or tt. See docs/methods.md.  [default: "
    "the artifact's own]",
)
@price_option
@budget_options
@option(
    "--parts",
    type=click.Choice(["all", "layers", "ffn", "attention"]),
    help="With priced, teal and wina: what may skip rows; --sparsity is of the bytes of its layers' linears. layers: "
    "all but the head, which teal and wina always read whole.  [default: all]",
)
@option(
    "--densities",
    type=PATH,
    help="With teal: greedy densities that benchmarks/teal_densities.py wrote.  [default: uniform]",
)
@refresh_option
@option("--calibration", type=PATH, help="Choose the budget from this file instead of the artifact's own.")
@option("--prompts", type=click.IntRange(2), default=32, show_default=True, help="With --text: prompts.")
@option(
    "--prompt-tokens",
    type=click.IntRange(2),
    default=384,
    show_default=True,
    help="With --text: tokens of each prompt.",
)
@option(
    "--continuation-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="With --text: tokens scored after it.",
)
@option(
    "--free",
    type=click.IntRange(2),
    metavar="TOKENS",
    help="With --text: generate this many tokens, beside the dense model: when they first differ, and KL along the "
    "dense model's text.",
)
@option("--data", type=PATH, envvar=DATA_VARIABLE, help="With --tasks: folder that eval-data wrote.")
@option("--limit", type=click.IntRange(2), help="With --tasks: maximum questions per task.  [default: all]")
@option(
    "--protocol",
    type=click.Choice(["strict", "griffin"]),
    default="strict",
    show_default=True,
    help="With --tasks. strict: all scored tokens come from sparse steps. griffin: only an answer's last.",
)
@option("--reference", metavar="MODEL", help="With --tasks: run MODEL in transformers too.")
@provider_option
@json_option
def evaluate(
    context: click.Context,
    artifact: Path,
    text_file: Path | None,
    tasks: str | None,
    method: str | None,
    price: float | None,
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    parts: Parts | None,
    densities: Path | None,
    refresh: int | None,
    calibration: Path | None,
    prompts: int,
    prompt_tokens: int,
    continuation_tokens: int,
    free: int | None,
    data: Path | None,
    limit: int | None,
    protocol: str,
    reference: str | None,
    provider: str,
    as_json: bool,
) -> None:
    """Compare a method with the dense model of ARTIFACT.

    On a text: KL, perplexity, agreement of the likeliest token, and the bytes read. On tasks: accuracy, or the
    likelihood of the answers. The prompt is read densely; every token after it comes from a sparse step. Standard
    errors are over prompts or questions. Under torchrun, processes share a text's prompts.
    """
    from tda_export.errors import UsageError
    from tda_export.evaluation.free import evaluate_free
    from tda_export.evaluation.methods import Request, check_request, open_setting
    from tda_export.evaluation.text import TextSettings, cut_windows, evaluate_text
    from tda_export.progress import progress
    from tda_export.ranks import join
    from tda_export.runtime.artifact import open_artifact
    from tda_export.runtime.providers import choose_provider
    from tda_export.runtime.session import Sessions
    from tda_export.runtime.text import Text

    ranks = join("cpu")
    ranks.take_own_gpu(provider)
    _refuse_foreign_options(context, text_file, tasks)
    if tasks is not None and ranks.count > 1:
        raise UsageError("--tasks runs in one process. Start it without torchrun.")
    opened = open_artifact(artifact)
    chosen = chosen_refresh(opened, refresh)
    request = Request(
        method,
        price=price,
        sparsity=sparsity,
        max_kl=max_kl,
        cett=cett,
        allocation=allocation,
        refresh=chosen,
        calibration=calibration,
        parts=parts,
        densities=densities,
    )
    if tasks is not None:
        evaluate_tasks(
            artifact,
            request,
            tasks=tasks,
            limit=limit,
            protocol=protocol,
            data=data,
            reference=reference,
            provider=provider,
            as_json=as_json,
        )
        return
    assert text_file is not None
    check_request(opened, request)
    settings = TextSettings(prompts, prompt_tokens, continuation_tokens if free is None else 1)
    text = Text(opened)
    windows = cut_windows(text.encode(_read(text_file), special_tokens=False), text.encode(""), settings)
    sessions = Sessions(opened, choose_provider(provider, opened.shape.dtype))
    setting = open_setting(opened, sessions, request)
    result = {
        "model": opened.manifest["model"]["name"],
        "dtype": opened.shape.dtype,
        "provider": sessions.provider,
        "method": setting.method,
        "budget": setting.budget,
        "text": text_file.name,
        "prompt_tokens": prompt_tokens,
    }
    with progress("Evaluating", len(windows), quiet=as_json or not ranks.first) as advance:
        if free is None:
            quality = evaluate_text(opened, setting, windows, settings, advance=advance, ranks=ranks)
            result |= {"continuation_tokens": continuation_tokens, **asdict(quality)}
        else:
            starts = [window[:prompt_tokens] for window in windows]
            result |= asdict(evaluate_free(opened, setting, starts, free, advance=advance, ranks=ranks))
    click.echo(json.dumps(result) if as_json else (_summary if free is None else _free_summary)(result))


def _refuse_foreign_options(context: click.Context, text_file: Path | None, tasks: str | None) -> None:
    from tda_export.errors import UsageError

    if (text_file is None) == (tasks is None):
        raise UsageError("eval measures on a text or on tasks. Give either --text or --tasks.")
    given, foreign = ("--tasks", TEXT_OPTIONS) if text_file is None else ("--text", TASK_OPTIONS)
    refuse_given(context, foreign, given)
    if context.params["free"] is not None:
        refuse_given(context, ["continuation_tokens"], "--free")


def _read(path: Path) -> str:
    from tda_export.errors import TdaError, UsageError

    if not path.is_file():
        raise UsageError(f"{path}: no such file. Give a UTF-8 text file with --text.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TdaError(f"{path}: not valid UTF-8 text. Convert it to UTF-8.") from error


def _title(result: dict[str, Any], new_tokens: int) -> str:
    budget = ", ".join(f"{name} {value}" for name, value in result["budget"].items())
    return (
        f"{result['model']}, {result['method']}{f' ({budget})' if budget else ''} on {result['text']}, "
        f"{result['prompts']} prompts of {result['prompt_tokens']} + {new_tokens} tokens"
    )


def _bytes_read(result: dict[str, Any]) -> str:
    more = result["refresh_ffn_bytes"]
    of_them = f", {more / 2**20:,.1f} of them because of refreshes" if more else ""
    density = f" (density {result['density']:.3f})" if "density" in result else ""
    return f"{_of_dense(result['ffn_bytes'], result['dense_ffn_bytes'])}{density}{of_them}"


def _linear_bytes(result: dict[str, Any]) -> str:
    """Describe the bytes read of the layers' linears, and the fraction read of those of attention."""
    dense = result["dense_linear_bytes"] - result["dense_ffn_bytes"]
    attention = (result["linear_bytes"] - result["ffn_bytes"]) / dense
    return f"{_of_dense(result['linear_bytes'], result['dense_linear_bytes'])}, attention's {attention:.3f}"


def _head_bytes(result: dict[str, Any]) -> list[str]:
    """Describe the share of the head's bytes, where a token did not read all of them."""
    return [] if result["head_share"] == 1.0 else [f"of the head         {result['head_share']:.3f}"]


def _of_dense(read: float, dense: float) -> str:
    return f"{read / dense:.3f}: {read / 2**20:,.1f} of {dense / 2**20:,.1f} MiB"


def _summary(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            _title(result, result["continuation_tokens"]),
            f"KL to dense         {result['kl']:.4f} ± {result['kl_stderr']:.4f} nats a token",
            f"perplexity          {result['perplexity']:.3f} ± {result['perplexity_stderr']:.3f}",
            f"dense perplexity    {result['dense_perplexity']:.3f} ± {result['dense_perplexity_stderr']:.3f}",
            f"top-1 agreement     {result['agreement']:.4f} ± {result['agreement_stderr']:.4f}",
            f"FFN bytes a token   {_bytes_read(result)}",
            f"of layers' linears  {_linear_bytes(result)}",
            *_head_bytes(result),
        ]
    )


def _free_summary(result: dict[str, Any]) -> str:
    block, last = result["block_tokens"], result["new_tokens"] - 1
    return "\n".join(
        [
            _title(result, result["new_tokens"]),
            f"same text as dense  {result['divergence']:.1f} ± {result['divergence_stderr']:.1f} tokens (median "
            f"{result['divergence_median']:g}; all of them for {result['identical']:.0%} of the prompts)",
            "KL to dense, nats a token, along the dense model's text",
            *[
                f"  tokens {start * block + 1:>4} to {min((start + 1) * block, last):>4}  {kl:.4f} ± {error:.4f}"
                for start, (kl, error) in enumerate(zip(result["kl"], result["kl_stderr"], strict=True))
            ],
            f"FFN bytes a token   {_bytes_read(result)}",
            f"of layers' linears  {_linear_bytes(result)}",
            *_head_bytes(result),
        ]
    )
