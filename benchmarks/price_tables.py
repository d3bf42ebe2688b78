"""Measure the bytes and KL of a calibration's prices on other text and after other prompts, beside its own table.

    python benchmarks/price_tables.py MODEL --calibration FILE [--dataset builtin] [--prompt-tokens 256 32]

The price for each --sparsity comes from the calibration's table, as in an artifact. On the built-in text, prices are
measured on the sequences that they were not estimated on; of another --dataset, on all sequences. The same tokens are
scored after every prompt length: a shorter prompt is the end of the longer one. In PyTorch, by the strict protocol.

It prints one row for each prompt length and sparsity: bytes asked for and read, KL predicted and measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import Row, print_rows

from tda_export.calibration.corpus import BUILTIN, load_corpus
from tda_export.calibration.file import Calibration, read_calibration
from tda_export.calibration.price_table import Measured, measure_sequence, shortened
from tda_export.errors import UsageError
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import PACKINGS
from tda_export.progress import progress


def sequences(source: ModelSource, found: Calibration, options: argparse.Namespace) -> torch.Tensor:
    """Return sequences that no price was estimated on, int64 [N, P + C]. P is at least the longest prompt's length."""
    settings, builtin = found.provenance["settings"], options.dataset == BUILTIN
    if builtin and max(options.prompt_tokens) > settings["prompt_tokens"]:
        raise UsageError(
            f"{options.calibration} was calibrated after prompts of {settings['prompt_tokens']} tokens, and its own "
            "text has no longer ones. Give shorter --prompt-tokens, or another --dataset."
        )
    prompt = settings["prompt_tokens"] if builtin else max(options.prompt_tokens)
    corpus = load_corpus(
        options.dataset,
        source.tokenizer,
        text_column=options.text_column,
        sequences=settings["sequences"] if builtin else options.sequences,
        length=prompt + settings["continuation_tokens"],
        seed=settings["seed"],
        vocab_size=source.spec.vocab_size,
    )
    if not builtin:
        return corpus.tokens
    if corpus.sha256 != found.provenance["dataset"]["tokens_sha256"]:
        raise UsageError(f"{options.calibration} is of other text than the built-in one. Give another --dataset.")
    return corpus.tokens[1::2][: options.sequences]


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each prompt length and sparsity."""
    source = resolve_model(options.model, notify=lambda line: print(line, file=sys.stderr))
    found, spec = read_calibration(options.calibration), source.spec
    if found.model_fingerprint != source.fingerprint:
        raise UsageError(f"{options.calibration} is of another model than {source.name}. Calibrate this one.")
    priced, packing = found.priced, options.packing
    if priced is None or packing not in priced.measured:
        raise UsageError(f"{options.calibration} has no table of prices with packing {packing}. Calibrate with it.")
    table = priced.table(packing)
    prices = [table.price_for(sparsity=sparsity) for sparsity in sorted(options.sparsity)]
    row_prices = {packing: priced.row_prices(spec, packing)}
    tokens, continuation = sequences(source, found, options), priced.continuation_tokens
    prefix = len(source.tokenizer("").input_ids)
    model = source.reference().requires_grad_(False)
    for prompt in options.prompt_tokens:
        here = {packing: Measured.begin(spec, prices)}
        passes = len(tokens) * len(here[packing].prices)
        with progress(f"Prompts of {prompt}", passes, quiet=not sys.stderr.isatty()) as advance:
            for sequence in tokens:
                short = shortened(sequence, prompt + continuation, prefix)
                measure_sequence(model, spec, short, prompt, row_prices, here, advance)
        rows = here[packing].table(priced.linears, packing, priced.row_bytes, continuation).rows
        for sparsity, row in zip(sorted(options.sparsity), rows[1:], strict=True):
            predicted = table.after(prompt).predicted(row.price)
            yield {
                "text": options.dataset if options.dataset == BUILTIN else Path(options.dataset).stem,
                "sequences": len(tokens),
                "prompt_tokens": prompt,
                "sparsity": sparsity,
                "price": row.price,
                "share": row.share,
                "missed": row.share - (1 - sparsity),
                "ffn_share": row.ffn_share,
                "attention_share": row.attention_share,
                "predicted_kl": predicted.kl,
                "kl": row.kl,
                "kl_stderr": row.kl_stderr,
                "kl_more": row.kl / predicted.kl - 1,
            }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a calibration's prices on other text and other prompts.")
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dataset", default=BUILTIN, help="As for calibrate.  [default: builtin]")
    parser.add_argument("--text-column")
    parser.add_argument("--packing", choices=PACKINGS, default="separate")
    parser.add_argument("--sequences", type=int, default=32, help="Most sequences.  [default: 32]")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[256, 32])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.15, 0.3, 0.5])
    return parser.parse_args()


def main() -> int:
    return print_rows(measured(arguments()), json.dumps)


if __name__ == "__main__":
    sys.exit(main())
