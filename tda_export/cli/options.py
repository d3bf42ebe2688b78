"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tda_export.calibration.budgets import AllocationRule, Budget
    from tda_export.runtime.artifact import Artifact
    from tda_export.runtime.deployment import Refresh

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
FRACTION = click.FloatRange(0, 1, max_open=True)

model_argument = click.argument("model")
artifact_argument = click.argument("artifact", type=PATH)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
provider_option = click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to run; auto takes CUDA for float16 artifacts where a GPU is.",
)


def refresh_option(command: F) -> F:
    """Add --refresh."""
    return click.option(
        "--refresh",
        type=click.IntRange(0),
        help="Read the last N tokens again densely after every N, which renews the mask; 0 never.  [default: the "
        "artifact's own]",
    )(command)


def chosen_refresh(artifact: Artifact, tokens: int | None) -> Refresh | None:
    """Return the refresh of the option, with the artifact's own decay; None when it is not given."""
    from tda_export.runtime.deployment import Refresh

    return None if tokens is None else Refresh(tokens, artifact.deployment.refresh.decay)


def budget_options(command: F) -> F:
    """Add --cett, --sparsity, --allocation and --max-kl."""
    for option in reversed(
        (
            click.option(
                "--cett", type=FRACTION, help="Budget: mean CETT that each layer may lose (the paper's; 0.2 there)."
            ),
            click.option("--sparsity", type=FRACTION, help="Budget: share of FFN bytes that decode shall not read."),
            click.option(
                "--allocation",
                type=click.Choice(["kl", "uniform"]),
                help="How --sparsity is spread. kl: where bytes are worth most, over masks and token thresholds of "
                "all layers. uniform: the same share of neurons in every layer's mask.  [default: kl]",
            ),
            click.option(
                "--max-kl",
                type=float,
                help="Budget: the sparsest setting whose predicted KL to dense stays within it, nats a token.",
            ),
        )
    ):
        command = option(command)
    return command


def chosen_budget(
    cett: float | None,
    sparsity: float | None,
    allocation: AllocationRule | None,
    max_kl: float | None,
    default: dict[str, Any],
) -> Budget:
    """Return the budget of the options, or `default` (plain data) when none is given."""
    from tda_export.calibration.budgets import Budget, make_budget

    if (cett, sparsity, allocation, max_kl) == (None, None, None, None):
        return Budget(**default)
    return make_budget(cett, sparsity, allocation, max_kl)
