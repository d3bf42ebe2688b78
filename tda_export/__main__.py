"""The command `tda-export`, and `python -m tda_export`. Nothing slow is imported before signals are taken care of."""

from tda_export.signals import end_on_signals
from tda_export.standard_streams import open_standard_streams


def main() -> None:
    """Run the command line."""
    open_standard_streams()
    end_on_signals()
    from tda_export.cli.main import cli

    cli()


if __name__ == "__main__":
    main()
