"""lm-eval's own command line with the model `tda` registered: `python -m tda_export.evaluation --model tda …`."""

import tda_export.evaluation.harness  # noqa: F401 (registers the model)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
