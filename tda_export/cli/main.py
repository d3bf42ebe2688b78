"""The `tda-export` command group, and the messages and exit codes of failures."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from tda_export import __version__, ranks
from tda_export.cli.bench import bench
from tda_export.cli.build import build
from tda_export.cli.calibrate import calibrate
from tda_export.cli.chat import chat
from tda_export.cli.demo import demo
from tda_export.cli.eval import evaluate
from tda_export.cli.eval_data import eval_data
from tda_export.cli.generate import generate
from tda_export.cli.help_groups import WIDTH
from tda_export.cli.inspect import inspect
from tda_export.cli.quantize import quantize
from tda_export.cli.report import report
from tda_export.cli.serve import serve
from tda_export.cli.verify import verify
from tda_export.errors import TdaError, UsageError
from tda_export.signals import end_on_signals
from tda_export.standard_streams import drop_unwritable, open_standard_streams

INTERRUPTED = 130  # 128 + SIGINT
OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # Python's and PyTorch's, which is not imported here


class ErrorMappingGroup(click.Group):
    """Shows a TdaError as one line. Exit codes: 2 for wrong usage, 1 for a failure, 130 for Ctrl-C."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # help or an error message cannot be printed
            with contextlib.suppress(OSError):
                click.echo(f"Error: {_os_message(error)}", err=True)
            sys.exit(1)
        finally:
            drop_unwritable()

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command. Of several ranks, one shows the error that ends all of them."""
        try:
            result = self._invoke(ctx)
        except click.exceptions.Exit:
            raise
        except Exception as error:
            if ranks.speaks():
                raise
            ctx.exit(error.exit_code if isinstance(error, click.ClickException) else 1)
        ranks.leave()
        return result

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise click.UsageError(str(error)) from error
        except TdaError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:  # the reader of standard output has ended, as `head` does
            ctx.exit(1)
        except OSError as error:  # a file or folder cannot be read
            raise click.ClickException(_os_message(error)) from error
        except KeyboardInterrupt:  # where the handler of `signals` is not installed
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if type(error).__name__ not in OUT_OF_MEMORY:
                raise
            raise click.ClickException(
                "Out of memory. Use --provider cpu or --device cpu, a smaller dtype, or build with --no-verify."
            ) from error


def _os_message(error: OSError) -> str:
    return f"{error.filename or 'Input or output'}: {error.strerror or error}."


@click.group(
    cls=ErrorMappingGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}
)
@click.version_option(__version__, prog_name="tda-export")
def cli() -> None:
    """Generate text with language models in ONNX Runtime, reading only the weights a token needs.

    \b
    First:   demo, or: calibrate MODEL, build MODEL, generate ARTIFACT
    Look:    inspect describes a model, report draws a calibration as a page
    Check:   verify compares with transformers, eval measures loss, bench measures speed
    Run:     generate, chat, serve
    Smaller: quantize writes a model with integers of 4 or 8 bits
    """


for command in (inspect, quantize, calibrate, build, verify, generate, chat, serve, evaluate, eval_data, bench):
    cli.add_command(command)
for command in (report, demo):
    cli.add_command(command)


def main() -> None:
    """Run the command line, as `tda_export.__main__` does."""
    open_standard_streams()
    end_on_signals()
    cli()
