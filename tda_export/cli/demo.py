"""`tda-export demo`: the whole pipeline on the built-in model."""

from __future__ import annotations

from pathlib import Path

import click

from tda_export.cli.help_groups import command, option

MODEL = "smollm2-135m"
PROMPT = (
    "Here is a note from a small museum. The clock in the entrance hall was built in 1871 by a watchmaker who had "
    "never made anything larger than a pocket watch. He cast the wheels in the yard behind his shop, and neighbours "
    "complained of the smoke for two years. When it was finished it lost eleven minutes a day, and nobody could say "
    "why. His daughter, who kept the accounts, noticed that it lost more in summer than in winter, and proposed that "
    "the pendulum rod was growing longer in the heat. They replaced the iron rod by one of seasoned fir, which hardly "
    "changes its length, and since that day the clock has been right to half a minute a week. The daughter wrote the "
    "repair into the account book under sundries, at a cost of nine pence. What does this story teach us about "
    "solving problems?"
)
NEW_TOKENS = 64
SEQUENCES = 12  # fewer than by default: minutes count more here than the last of the quality
MAX_KL = 0.05  # nats a token
SPARSITY = 0.5


@command()
@option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("artifacts"),
    show_default=True,
    help="Folder of the results. Files that exist are used again.",
)
def demo(artifacts: Path) -> None:
    """Calibrate, build, verify and generate with the built-in model."""
    from tda_export.cli.build import build
    from tda_export.cli.calibrate import calibrate
    from tda_export.cli.generate import summary
    from tda_export.cli.tables import print_table
    from tda_export.errors import UsageError
    from tda_export.runtime import load, open_artifact
    from tda_export.runtime.scoring import compare, continuation_logits

    artifacts.mkdir(parents=True, exist_ok=True)
    calibration, artifact = artifacts / f"{MODEL}.calibration.safetensors", artifacts / MODEL
    context = click.get_current_context()
    if artifact.exists() and open_artifact(artifact).layout != "priced":
        raise UsageError(f"{artifact} has masks, and the demo is of prices. Give another folder with --artifacts.")
    if calibration.exists():
        click.echo(f"Using {calibration}")
    else:
        click.echo(f"$ tda-export calibrate {MODEL} -o {calibration} --sequences {SEQUENCES}")
        context.invoke(calibrate, model=MODEL, output=calibration, sequences=SEQUENCES)
    if artifact.exists():
        click.echo(f"Using {artifact}")
    else:
        click.echo(f"$ tda-export build {MODEL} --calibration {calibration} -o {artifact}")
        context.invoke(build, model=MODEL, calibration_file=calibration, output=artifact)

    model = load(artifact)
    settings = {
        "dense": model.at(price=0.0),
        f"KL {MAX_KL}": model.at(max_kl=MAX_KL),
        f"sparsity {SPARSITY}": model.at(sparsity=SPARSITY),
    }
    prompt = model.text.encode(model.text.chat([{"role": "user", "content": PROMPT}]), special_tokens=False)
    rows: list[list[str]] = []
    dense_tokens: list[int] = []
    dense_logits = None
    for name, deployment in settings.items():
        click.secho(f"\n{name}", bold=True)
        generation = model.generate(prompt, max_new_tokens=NEW_TOKENS, deployment=deployment)
        tokens = []
        for token in generation:
            tokens.append(token.id)
            click.echo(token.text, nl=False)
        click.echo(f"\n{summary(generation.metrics)}")
        dense_tokens = dense_tokens or tokens
        logits = continuation_logits(model, prompt, dense_tokens, deployment=deployment)
        dense_logits = logits if dense_logits is None else dense_logits
        fidelity, metrics = compare(dense_logits, logits), generation.metrics
        rate = metrics.decode_tokens_per_second
        rows.append(
            [
                name,
                f"{deployment.price:.3g}",
                f"{metrics.sparsity:.3f}",
                f"{metrics.bytes_per_token / 2**20:.1f}",
                f"{fidelity.kl:.3f}",
                f"{fidelity.agreement:.2f}",
                f"{rate:.1f}" if rate else "",
            ]
        )
    click.echo()
    columns = ["decode", "price", "sparsity", "MiB", "KL", "agreement", "tokens/s"]
    print_table(
        "What a token reads of all linears, as calibrated, and KL (nats) and top-1 agreement to dense over its "
        f"{len(dense_tokens)} tokens",
        columns,
        rows,
    )
    if not model.sessions.native:
        click.echo("Without native kernels every row is read, and what is not worth its bytes counts as zero.")
