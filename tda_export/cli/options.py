"""Options and arguments that several commands share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from tda_export.cli.help_groups import BUDGET, SAMPLING, TEXT, WEIGHTS, option

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule, Budget
    from tda_export.runtime.artifact import Artifact
    from tda_export.runtime.deployment import Refresh
    from tda_export.runtime.generate import MaskMode
    from tda_export.runtime.sampling import Sampling

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
FRACTION = click.FloatRange(0, 1, max_open=True)

model_argument = click.argument("model")
artifact_argument = click.argument("artifact", type=PATH)
overwrite_option = option("--overwrite", is_flag=True, help="Replace an existing output.")
json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
provider_option = option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to run. auto: CUDA for fp16 and bf16 artifacts if there is a GPU.",
)

context_option = option(
    "--context", type=int, help="Maximum tokens of prompt and answer.  [default: the model's maximum]"
)
mask_option = option(
    "--mask",
    type=click.Choice(["tda", "dense"]),
    group=BUDGET,
    help="dense: read every row. tda: use the prompt's mask.  [default: the artifact's method]",
)
price_option = option(
    "--price", type=float, group=BUDGET, help="Skip rows whose estimated effect per byte is below this; 0 is dense."
)
device_option = option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where PyTorch runs the model: cpu, cuda, cuda:N, or auto (all GPUs, then the CPU's memory).",
)
keep_answers_option = option(
    "--keep-answers/--reread-answers",
    default=False,
    help="Keep the keys and values of an answer as sparse steps wrote them, or compute them again, densely, with the "
    "next message. Keeping needs an artifact of prices.  [default: reread]",
)
lookup_option = option(
    "--lookup",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Draft up to N tokens (15 at most) from repeated text and check them in one step; 0 is off.",
)
ANSWER_OPTIONS = (
    lookup_option,
    option("--stop", multiple=True, help="Stop before this text. Repeatable."),
    option("--stop-token-id", multiple=True, type=int, help="Stop at this token id. Repeatable."),
    option("--ignore-eos", is_flag=True, help="Do not stop at the model's end tokens."),
    option("--temperature", type=float, default=0.0, show_default=True, group=SAMPLING, help="0 is greedy."),
    option(
        "--top-k", type=int, default=0, show_default=True, group=SAMPLING, help="Sample from the k likeliest; 0 is off."
    ),
    option(
        "--top-p",
        type=float,
        default=1.0,
        show_default=True,
        group=SAMPLING,
        help="Sample from the likeliest tokens up to this total probability; 1 is off.",
    ),
    option(
        "--min-p",
        type=float,
        default=0.0,
        show_default=True,
        group=SAMPLING,
        help="Minimum probability of a token, as a fraction of the likeliest one's; 0 is off.",
    ),
    option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        group=SAMPLING,
        help="Make tokens of the prompt and the answer less likely; 1 is off.",
    ),
    option("--seed", type=int, group=SAMPLING, help="Seed, which makes sampling repeatable."),
    option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Variables for the chat template, such as '{\"enable_thinking\": false}'.",
    ),
)
RARE_ANSWER_OPTIONS = ("stop_token_id", "ignore_eos", "min_p", "repetition_penalty", "chat_template_kwargs")
RARE_DEPLOYMENT_OPTIONS = ("cett", "allocation", "refresh")


def refresh_option(command: F) -> F:
    """Add --refresh."""
    return option(
        "--refresh",
        type=click.IntRange(0),
        group=BUDGET,
        help="With masks: every N tokens, read them again densely and renew the mask; 0 is off.  [default: as built]",
    )(command)


def chosen_refresh(artifact: Artifact, tokens: int | None) -> Refresh | None:
    """Return the refresh that --refresh asks for, with the artifact's own decay; None if the option is not given."""
    from tda_export.runtime.deployment import Refresh

    return None if tokens is None else Refresh(tokens, artifact.deployment.refresh.decay)


def check_mask(artifact: Artifact, mask: MaskMode | None) -> None:
    """Refuse --mask tda for an artifact without masks."""
    from tda_export.errors import UsageError

    if mask == "tda" and artifact.layout == "priced":
        raise UsageError(
            f"--mask tda: {artifact.folder} has prices and no masks. Leave it out, or build an artifact with "
            "'tda-export build MODEL --method tda'."
        )


def corpus_options(command: F) -> F:
    """Add --dataset, --text-column and --seed, which choose the text for calibration or quantising."""
    for add in reversed(
        (
            option(
                "--dataset",
                default="builtin",
                show_default=True,
                group=TEXT,
                help="builtin, a .txt, .jsonl, .json, .csv or .parquet file, or a hub data set (NAME[:CONFIG:SPLIT]).",
            ),
            option("--text-column", group=TEXT, help="Column of the text.  [default: text]"),
            option(
                "--seed", type=click.IntRange(0), default=0, show_default=True, group=TEXT, help="Order of documents."
            ),
        )
    ):
        command = add(command)
    return command


def refuse_given(context: click.Context, names: Iterable[str], with_what: str) -> None:
    """Refuse options that have no effect with other options.

    Args:
        context: The command's context.
        names: The names of the parameters to refuse.
        with_what: The other options, for the message.

    Raises:
        UsageError: One of the parameters is on the command line.
    """
    from tda_export.errors import UsageError

    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with {with_what}. Leave one of them out.")


def weight_options(*formats: str) -> Callable[[F], F]:
    """Return a decorator that adds --weights (one of `formats`, by default the first), --group and --weights-for."""
    options = (
        option(
            "--weights",
            type=click.Choice(formats),
            default=formats[0],
            show_default=True,
            group=WEIGHTS,
            help="Format of all linears. With integers, embedding and head are int8.",
        ),
        option(
            "--group",
            type=click.Choice(["32", "64", "128"]),
            group=WEIGHTS,
            callback=lambda context, parameter, given: None if given is None else int(given),
            help="Elements of a row that share a scale.  [default: 32]",
        ),
        option(
            "--weights-for",
            metavar="RULES",
            multiple=True,
            group=WEIGHTS,
            help="Formats of single matrices, such as 'layers.*.v=int8,head=int4,layers.0.*=float'. The last rule "
            "that matches applies. Repeatable.",
        ),
    )

    def add(command: F) -> F:
        for one in reversed(options):
            command = one(command)
        return command

    return add


def budget_options(command: F) -> F:
    """Add --cett, --sparsity, --allocation and --max-kl."""
    for add in reversed(
        (
            option(
                "--sparsity",
                type=FRACTION,
                group=BUDGET,
                help="Fraction of weight bytes to skip: of the layers' linears with prices, of the FFN with masks.",
            ),
            option(
                "--max-kl",
                type=float,
                group=BUDGET,
                help="Skip as many bytes as the predicted KL to dense allows, in nats per token.",
            ),
            option(
                "--cett",
                type=FRACTION,
                group=BUDGET,
                help="With masks: mean relative error (CETT) allowed in each layer, as in the paper (0.2 there).",
            ),
            option(
                "--allocation",
                type=click.Choice(["kl", "uniform"]),
                group=BUDGET,
                help="With masks: how --sparsity is spread. kl: masks and token thresholds of all layers where bytes "
                "matter least. uniform: the same fraction of neurons in each layer's mask.  [default: kl]",
            ),
        )
    ):
        command = add(command)
    return command


def chosen_budget(
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    default: dict[str, Any],
) -> Budget:
    """Return the budget that the options ask for, or `default` (plain data) if none is given."""
    from tda_export.calibration.budgets import Budget, make_budget

    if (cett, sparsity, allocation, max_kl) == (None, None, None, None):
        return Budget(**default)
    return make_budget(cett, sparsity, allocation, max_kl)


@dataclass(frozen=True)
class Answering:
    """The values of `answer_options`: sampling, when to stop, and variables of the chat template."""

    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    lookup: int
    chat_template_kwargs: dict[str, Any]


def answer_options(new_tokens: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds --max-new-tokens, with this default, and `ANSWER_OPTIONS`. The command gets their
    values as `answering`."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def grouped(
            *,
            max_new_tokens: int,
            stop: tuple[str, ...],
            stop_token_id: tuple[int, ...],
            ignore_eos: bool,
            temperature: float,
            top_k: int,
            top_p: float,
            min_p: float,
            repetition_penalty: float,
            seed: int | None,
            lookup: int,
            chat_template_kwargs: str | None,
            **others: Any,
        ) -> None:
            from tda_export.runtime import Sampling
            from tda_export.runtime.lookup import check_lookup
            from tda_export.runtime.stop_strings import StopStrings

            StopStrings(stop)  # wrong stop strings are refused before a model is loaded
            check_lookup(lookup)
            sampling = Sampling(temperature, top_k, top_p, seed, repetition_penalty, min_p)
            variables = _template_kwargs(chat_template_kwargs)
            answering = Answering(max_new_tokens, sampling, stop, stop_token_id, ignore_eos, lookup, variables)
            command(answering=answering, **others)

        wrapped: Callable[..., None] = grouped
        for one in reversed(ANSWER_OPTIONS):
            wrapped = one(wrapped)
        return option(
            "--max-new-tokens",
            type=click.IntRange(1),
            default=new_tokens,
            show_default=True,
            help="Stop after this many tokens.",
        )(wrapped)

    return add


def _template_kwargs(given: str | None) -> dict[str, Any]:
    from tda_export.errors import UsageError
    from tda_export.runtime.chat_template import check_template_kwargs

    try:
        variables = json.loads(given or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--chat-template-kwargs is not valid JSON ({error}).") from error
    if not isinstance(variables, dict):
        raise UsageError("--chat-template-kwargs is not a JSON object. Give names and values: '{\"name\": value}'.")
    check_template_kwargs(variables)
    return variables
