"""`python -m tda_export` is `tda-export`."""

from tda_export.cli.main import main

if __name__ == "__main__":
    main()
