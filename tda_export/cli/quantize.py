"""`tda-export quantize`: write a model with integers of 4 or 8 bits, and measure the loss."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tda_export.cli.help_groups import WEIGHTS, command, option
from tda_export.cli.options import (
    corpus_options,
    device_option,
    json_option,
    model_argument,
    overwrite_option,
    refuse_given,
    weight_options,
)
from tda_export.float_kl import integers_kl

if TYPE_CHECKING:
    from tda_export.packing import HeadRows
    from tda_export.quantization.settings import Quantizer


OF_GPTQ = ("sequences",)
OF_TEXT = ("dataset", "text_column", "seed", "prompt_tokens", "continuation_tokens")


@command(
    rare=(
        "text_column",
        "seed",
        "head",
        "symmetric",
        "kl_sequences",
        "prompt_tokens",
        "continuation_tokens",
        "group",
        "weights_for",
        "quiet",
        "as_json",
    )
)
@click.pass_context
@model_argument
@option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Model folder to write."
)
@weight_options("int4", "int8")
@option(
    "--bits-per-weight",
    type=float,
    metavar="BITS",
    group=WEIGHTS,
    help="Mean bits of a weight of all linears, scales and zero points included: from int4's to int8's. The linears "
    "that lose most in int4 are stored in int8, as many as fit.  [default: all int4]",
)
@option(
    "--quantizer",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="gptq: each row corrects the errors of those before it, on calibration text. rtn: round to nearest; text "
    "only measures the loss.",
)
@option(
    "--head",
    type=click.Choice(["priced", "whole"]),
    default="priced",
    show_default=True,
    help="priced: store the head by input channel, apart from an embedding that it is tied to, so that calibrate can "
    "price its rows; gptq rounds it too. whole: store it by token, rounded to nearest; a tied one stays the embedding.",
)
@option("--symmetric", is_flag=True, help="Use the middle code as the zero point of every group.")
@corpus_options
@option(
    "--sequences",
    type=click.IntRange(1),
    default=60,
    show_default=True,
    help="Token sequences that GPTQ reads. More, and text like that of your use, loses less.",
)
@option(
    "--kl-sequences",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Further sequences to measure the KL to the float model on; 0 is off.",
)
@option(
    "--prompt-tokens",
    type=click.IntRange(2),
    default=256,
    show_default=True,
    help="Tokens of a sequence before those that KL is measured on.",
)
@option(
    "--continuation-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens of a sequence that KL is measured on.",
)
@device_option
@overwrite_option
@option("--quiet", is_flag=True, help="Show no progress.")
@json_option
def quantize(
    context: click.Context,
    model: str,
    output: Path,
    weights: str,
    group: int | None,
    weights_for: tuple[str, ...],
    bits_per_weight: float | None,
    quantizer: Quantizer,
    head: HeadRows,
    symmetric: bool,
    dataset: str,
    text_column: str | None,
    sequences: int,
    kl_sequences: int,
    prompt_tokens: int,
    continuation_tokens: int,
    seed: int,
    device: str,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL with integers of 4 or 8 bits, as a folder.

    Every other command takes the folder as a MODEL. Elements that share a scale lie along the outputs, so each input
    channel is still one row, which decode can skip. config.json in the folder records how the integers were made, and
    the KL to the float model, measured on text that GPTQ did not read. An interrupted run resumes when it is started
    again. Under torchrun, processes share the work (docs/large-models.md).
    """
    from tda_export.calibration.corpus import load_corpus
    from tda_export.errors import UsageError
    from tda_export.files import check_output
    from tda_export.models.quantised import HEAD_MAJOR
    from tda_export.models.source import resolve_model
    from tda_export.progress import progress
    from tda_export.quantization.folder import is_quantised_folder, write_quantised
    from tda_export.quantization.resume import PartialLayers
    from tda_export.quantization.run import quantize as run
    from tda_export.quantization.settings import QuantizeSettings
    from tda_export.ranks import join
    from tda_export.weights.formats import DEFAULT_GROUP
    from tda_export.weights.plan import read_rules

    if quantizer == "rtn":
        refuse_given(context, OF_GPTQ, "--quantizer rtn")
        if not kl_sequences and bits_per_weight is None:
            refuse_given(context, OF_TEXT, "--quantizer rtn --kl-sequences 0, which reads no text")
    ranks = join(device)
    chosen_group = DEFAULT_GROUP if group is None else group
    settings = QuantizeSettings(
        weights,
        chosen_group,
        read_rules(weights_for, chosen_group),
        quantizer,
        symmetric,
        sequences,
        kl_sequences,
        prompt_tokens,
        continuation_tokens,
        seed,
        device,
        bits_per_weight,
        head,
    )
    finished = PartialLayers(output.absolute(), {})
    if ranks.first:
        check_output(output, overwrite=overwrite, what="a quantised model", is_earlier_output=is_quantised_folder)
        finished.check()
    source = ranks.first_here(lambda: resolve_model(model, notify=lambda line: click.echo(line, err=True)))
    if source.quantisation is not None:
        raise UsageError(f"{model} is quantised already. Give the float model that it was made from.")
    settings.plan(source.spec)  # rules and bits are refused before any text is read
    settings.mixture(source.spec)
    corpus = None
    if settings.all_sequences:
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
                sequences=settings.all_sequences,
                length=settings.length,
                seed=seed,
                vocab_size=source.spec.vocab_size,
            )
        )
        found = len(corpus.tokens)
        if found < settings.all_sequences:
            click.echo(f"{dataset} has text for {found} sequences of {settings.length} tokens; using those.", err=True)
    show = partial(progress, quiet=quiet or as_json or not ranks.first)
    say = partial(click.echo, err=True)  # only the first rank has a standard error (`ranks.join`)
    quantised = run(source, corpus, settings, show=show, output=output.absolute(), ranks=ranks, notify=say)
    if not ranks.first:
        return
    write_quantised(source, output, quantised.codes, quantised.plan, quantised.about)
    finished.remove()
    content = quantised.about | {HEAD_MAJOR: quantised.plan.head_major, "formats": quantised.plan.to_dict()}
    if as_json:
        click.echo(json.dumps({"output": str(output), **content}, allow_nan=False))
        return
    click.echo(describe_quantisation(content))
    if settings.bits_per_weight is not None:
        click.echo(_int8_linears(quantised.plan.to_dict()))
    click.echo(f"Wrote {output}")


def _int8_linears(formats: dict[str, str]) -> str:
    """Describe how many linears of each part are in int8."""
    from tda_export.weights.plan import EMBEDDING, HEAD

    linears = {name: format for name, format in formats.items() if name not in (EMBEDDING, HEAD)}
    parts = [(name.rpartition(".")[2], format) for name, format in linears.items()]
    every, wide = Counter(part for part, _ in parts), Counter(part for part, format in parts if "int8" in format)
    return "Linears in int8: " + ", ".join(f"{part} {wide[part]} of {count}" for part, count in every.items())


def describe_quantisation(content: dict[str, Any]) -> str:
    """Describe in one line how a model was quantised and the loss, from the entry in its config.json."""
    counts = Counter(content["formats"].values())
    formats = ", ".join(f"{count} {'matrix' if count == 1 else 'matrices'} {name}" for name, count in counts.items())
    try:
        quantizer = content["quantizer"]
        how = quantizer["name"] + (", symmetric" if quantizer["symmetric"] else "")
        mixture = content.get("mixture")
        mean = f" ({mixture['bits_per_weight']:.2f} bits a weight of the linears)" if mixture else ""
        head = ", the head by input channel" if content.get("head_major") == "input" else ""
        text = f"quantised by {how}: {formats}{mean}{head}"
        loss = content.get("loss")
        if loss is None:
            return f"{text}; KL to the float model not measured"
        kl = integers_kl(content)
        return (
            f"{text}; KL to the float model {kl:.4f} ± {loss['stderr']:.4f} nats a token over "
            f"{loss['tokens']:,} tokens, {loss['agreement']:.1%} of the likeliest tokens the same"
        )
    except (KeyError, TypeError, ValueError, OverflowError):  # config.json was changed by hand
        return f"quantised: {formats}; config.json does not say how, or not what was lost"
