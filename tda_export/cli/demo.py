"""`tda-export demo`: show what the project does, with the built-in model on the user's own machine."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import dataclass
from pathlib import Path

import click

from tda_export.cli.help_groups import command, option

MODEL = NAME = "smollm2-135m"  # the commands' MODEL, and the name of the results
CETT = 0.2  # the paper's value
TDA_SEQUENCES = 4  # fewer than the default of `calibrate`, so that the demo takes minutes
QUANTIZE_SEQUENCES, QUANTIZE_KL_SEQUENCES = 16, 4
INT4_SEQUENCES = 8
ABOUT_MINUTES = 5


@dataclass(frozen=True)
class Places:
    """Where the demo keeps its results."""

    tda_calibration: Path
    tda: Path
    int4_model: Path
    int4_calibration: Path
    int4: Path


@dataclass(frozen=True)
class Step:
    """One command of `tda-export`, what it is for, and what it writes."""

    purpose: str
    output: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command line, as a user would type it."""
        return " ".join(("tda-export", *self.arguments))


def places(folder: Path) -> Places:
    """Name the demo's results in a folder."""
    return Places(
        folder / f"{NAME}-tda.calibration.safetensors",
        folder / f"{NAME}-tda",
        folder / f"{NAME}-int4-model",
        folder / f"{NAME}-int4.calibration.safetensors",
        folder / f"{NAME}-int4",
    )


def steps(at: Places) -> list[Step]:
    """List the commands, in order."""

    def step(purpose: str, output: Path, *arguments: object) -> Step:
        command, model, *rest = arguments
        return Step(purpose, output, tuple(map(str, (command, model, "-o", output, *rest))))

    masks = ("--method", "tda")
    return [
        step(
            "The paper's method: thresholds of FFN neurons by CETT, in float32",
            at.tda_calibration,
            *("calibrate", MODEL, *masks, "--curves-only", "--cett", CETT, "--sequences", TDA_SEQUENCES),
        ),
        step(
            "Its graphs: prefill selects the neurons that matter for the prompt, decode reads those",
            at.tda,
            *("build", MODEL, *masks, "--calibration", at.tda_calibration),
        ),
        step(
            "Four bits a weight by GPTQ, on less text than by default",
            at.int4_model,
            *("quantize", MODEL, "--sequences", QUANTIZE_SEQUENCES, "--kl-sequences", QUANTIZE_KL_SEQUENCES),
        ),
        step(
            "How much each row of the four-bit weights matters, and the loss of skipping rows",
            at.int4_calibration,
            *("calibrate", at.int4_model, "--packing", "sites", "--sequences", INT4_SEQUENCES),
        ),
        step("Their graphs", at.int4, "build", at.int4_model, "--calibration", at.int4_calibration),
    ]


@command()
@option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("artifacts"),
    show_default=True,
    help="Folder of the results. Files that exist are used again.",
)
@click.pass_context
def demo(context: click.Context, artifacts: Path) -> None:
    """Compare float32, the paper's method, and four bits at three budgets on the built-in model.

    It calibrates, builds and checks two artifacts, generates an answer to the same prompt in five ways, and shows
    speed, bytes per token, loss and text side by side. An interrupted demo resumes when it is started again.
    """
    from tda_export.cli.demo_comparison import compare_ways, print_comparison
    from tda_export.runtime import load

    artifacts.mkdir(parents=True, exist_ok=True)
    at = places(artifacts)
    started, planned = time.monotonic(), steps(at)
    check_layouts(at)
    if not all(step.output.exists() for step in planned):
        cost = f"about {ABOUT_MINUTES} minutes on two idle cores, and 0.8 GB in {artifacts}"
        click.echo(f"{len(planned)} steps and a comparison: {cost}.")
    for number, step in enumerate(planned, 1):
        click.secho(f"\n[{number}/{len(planned)}] {step.purpose}", bold=True)
        run(context, step)
    click.secho("\nThe same prompt, answered in five ways", bold=True)
    print_comparison(compare_ways(load(at.tda), load(at.int4)))
    click.echo(f"\nDone in {time.monotonic() - started:.0f} s. Try next:")
    for line, about in next_commands(at):
        click.echo(f"  {line}\n      {about}")


def check_layouts(at: Places) -> None:
    """Refuse artifacts in the demo's folder that the demo did not make.

    Raises:
        UsageError: One is of another layout, or has floats in place of integers.
        TdaError: One cannot be opened.
    """
    from tda_export.errors import UsageError
    from tda_export.runtime import open_artifact

    for folder, layout, integers in ((at.tda, "indexed", False), (at.int4, "priced", True)):
        if not folder.exists():
            continue
        artifact = open_artifact(folder)
        if (artifact.layout, artifact.has_integers) != (layout, integers):
            raise UsageError(f"{folder} is not the demo's own artifact. Give another folder with --artifacts.")


def run(context: click.Context, step: Step) -> None:
    """Run a step unless its output exists. Show its progress, and the last line that it prints."""
    if step.output.exists():
        click.echo(f"Using {step.output}")
        return
    click.echo(f"$ {step.command}")
    group = context.find_root().command
    assert isinstance(group, click.Group)
    command, started, printed = group.commands[step.arguments[0]], time.monotonic(), io.StringIO()
    inner = command.make_context(step.arguments[0], list(step.arguments[1:]), parent=context)
    with inner, contextlib.redirect_stdout(printed):
        command.invoke(inner)
    click.echo(f"{printed.getvalue().splitlines()[-1]}, {time.monotonic() - started:.0f} s")


def next_commands(at: Places) -> list[tuple[str, str]]:
    """Return three commands to try next, and what each is for."""
    report = at.int4.parent / f"{NAME}.html"
    return [
        (
            f"tda-export chat {at.int4} --max-kl 0.05",
            "chat with it; --sparsity and --max-kl set how much a token reads",
        ),
        (f"tda-export report {at.int4} -o {report}", "one page: quality against bytes, and which rows are read"),
        (
            "tda-export inspect MODEL",
            "your own model (folder, hub id or .gguf file): its size and largest possible speed-up",
        ),
    ]
