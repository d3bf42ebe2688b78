"""`tda-export report`: draw a calibration or an artifact as one page of charts."""

from __future__ import annotations

from pathlib import Path

import click

from tda_export.cli.help_groups import command, option
from tda_export.cli.options import PATH, overwrite_option, provider_option


@command()
@click.argument("source", metavar="CALIBRATION|ARTIFACT", type=PATH)
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="HTML file to write.",
)
@option(
    "--results",
    "result_files",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Output of eval --json or bench --json, or rows of benchmarks/quality_table.py or baselines.py (--json), to "
    "compare methods. Repeatable.",
)
@provider_option
@overwrite_option
def report(source: Path, output: Path, result_files: tuple[Path, ...], provider: str, overwrite: bool) -> None:
    """Draw a calibration or an artifact as one self-contained HTML file.

    The page begins with the bytes that a token reads, the loss, and the speed-up. With prices, the rows read by matrix
    and layer and the table of prices follow. With masks, it has the allocation, the curves, and the KL if it was
    measured; for an artifact also the activity of its neurons, measured with its own graphs. How the artifact was made
    comes last.
    """
    from tda_export.errors import TdaError, UsageError
    from tda_export.files import atomic_file, check_output
    from tda_export.report.build import artifact_page, calibration_page
    from tda_export.report.page import is_report, render
    from tda_export.report.results_file import Results, read_results

    if not source.exists():
        raise TdaError(
            f"{source}: no such calibration file or artifact. Make one with 'tda-export calibrate' or "
            "'tda-export build'."
        )
    if provider != "auto" and not source.is_dir():
        raise UsageError(f"{source} is a calibration file, which has no graphs to run. Leave --provider out.")
    check_output(output, overwrite=overwrite, what="a report", is_earlier_output=is_report)
    found = [read_results(path) for path in result_files]
    results = Results([one for of in found for one in of.qualities], [one for of in found for one in of.speeds])
    page = artifact_page(source, results, provider) if source.is_dir() else calibration_page(source, results)
    html = render(page)
    with atomic_file(output) as part:
        part.write_text(html, encoding="utf-8")
    click.echo(f"Wrote {output} ({len(html.encode()) / 2**20:.1f} MiB)")
