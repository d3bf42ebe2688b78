"""Search TEAL's block-wise greedy densities (arXiv 2408.14690, Algorithm 1), for `tda-export eval --method teal`.

    python benchmarks/teal_densities.py MODEL --calibration FILE -o OUTPUT [--packing separate] [--parts all]

FILE comes from `tda-export calibrate --method priced`; its counts of inputs give the thresholds. Errors of blocks are
measured on --sequences of the built-in text, on 64 tokens after dense prompts of 64. In PyTorch, float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tda_export.calibration.corpus import BUILTIN, load_corpus
from tda_export.calibration.file import read_calibration
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.greedy_densities import GreedyDensities, greedy_densities, write_densities
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import PACKINGS, Packing, Parts
from tda_export.progress import progress

TOKENS = 64  # tokens of a prompt, and tokens after it
SEQUENCES = 8


def search(
    source: ModelSource,
    calibration: Path,
    packing: Packing,
    parts: Parts,
    sequences: int = SEQUENCES,
    device: str = "cpu",
) -> GreedyDensities:
    """Search the densities of a model on a PyTorch device.

    Raises:
        UsageError: The calibration is of another model, or has no prices.
        TdaError: It cannot be read.
    """
    found = read_calibration(calibration)
    if found.model_fingerprint != source.fingerprint:
        raise UsageError(f"{calibration} was calibrated on another model than {source.name}. Calibrate this one.")
    if found.priced is None:
        raise UsageError(
            f"{calibration} contains no sizes of inputs. Make one with 'tda-export calibrate --method priced'."
        )
    corpus = load_corpus(
        BUILTIN,
        source.tokenizer,
        text_column=None,
        sequences=sequences,
        length=2 * TOKENS,
        seed=0,
        vocab_size=source.spec.vocab_size,
    )
    model = source.reference(device=device).requires_grad_(False)
    with progress(f"Densities of {parts}", source.spec.num_layers, quiet=not sys.stderr.isatty()) as advance:
        return greedy_densities(
            model, source.spec, found.priced, corpus.tokens, TOKENS, packing, parts, source.fingerprint, advance
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search TEAL's block-wise greedy densities.")
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--packing", choices=PACKINGS, default="separate")
    parser.add_argument("--parts", choices=("all", "ffn", "attention"), default="all")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--device", default="cpu", help="PyTorch's device.  [default: cpu]")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    try:
        source = resolve_model(options.model, notify=lambda line: print(line, file=sys.stderr))
        found = search(source, options.calibration, options.packing, options.parts, options.sequences, options.device)
        write_densities(found, options.output)
    except TdaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
