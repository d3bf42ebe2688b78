"""`tda-export verify`: check an artifact."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from tda_export.cli.help_groups import command, option
from tda_export.cli.options import artifact_argument, json_option, provider_option


@command()
@artifact_argument
@option("--against", "model", help="Model to compare with.  [default: the one it was built from]")
@option("--files-only", is_flag=True, help="Check hashes and graphs only.")
@provider_option
@json_option
def verify(artifact: Path, model: str | None, files_only: bool, provider: str, as_json: bool) -> None:
    """Check ARTIFACT's files and graphs, and compare its numbers with transformers.

    Every failure is shown; the exit code is 1 if there is one.
    """
    from tda_export.cli.tables import print_checks
    from tda_export.errors import TdaError, UsageError
    from tda_export.graph.verify import verify_artifact
    from tda_export.models.source import ModelSource, resolve_model

    if files_only and model:
        raise UsageError("--files-only compares with no model. Leave --against out.")

    def source(name: str) -> ModelSource:
        try:
            return resolve_model(model or name, notify=lambda line: click.echo(line, err=True))
        except TdaError as error:
            if model:
                raise
            raise TdaError(
                f"The model it was built from cannot be loaded ({error}) Use --against MODEL or --files-only."
            ) from error

    checks = verify_artifact(artifact, None if files_only else source, provider=provider, quiet=as_json)
    if as_json:
        click.echo(json.dumps({"checks": [asdict(check) | {"passed": check.passed} for check in checks]}))
    else:
        print_checks(checks)
    if failed := [check.name for check in checks if not check.passed]:
        raise TdaError(f"{artifact}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}.")
