"""KL of quantised models to their float model on windows of a text, with every row and with priced rows.

    python benchmarks/quantised_kl.py FLOAT QUANTISED [QUANTISED ...] --text valid.txt --windows 24
        [--calibration QUANTISED=FILE ...] [--sparsity 0.3 0.5]

Each model reads the prompts itself, densely. With a model's calibration (`tda-export calibrate QUANTISED`), it decodes
the continuations at the prices of the calibration's table for each sparsity. It prints the KL to the float model, the
KL to the model's own dense output, that of the dense output to the float model, and the ratio of the first to the sum
of the other two. Windows follow one another in the text. Each begins with the token that the tokenizer puts before a
text (BOS), if there is one, and counts it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tda_export.calibration.file import read_calibration
from tda_export.calibration.prices import read_prompt
from tda_export.models.row_dropping import dropping
from tda_export.models.source import ModelSource, resolve_model
from tda_export.packing import Packing
from tda_export.quantization.kl import continuations, loss


def text_windows(tokenizer: Any, text: str, length: int) -> torch.Tensor:
    """Cut a text into windows int64 [N, length], each with the tokens that the tokenizer puts before a text."""
    before = torch.tensor(tokenizer("").input_ids, dtype=torch.int64)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)
    size = length - len(before)
    cut = tokens[: len(tokens) // size * size].view(-1, size)
    return torch.cat([before.expand(len(cut), -1), cut], dim=1)


def at_price(
    model: Any, source: ModelSource, windows: torch.Tensor, prompt_tokens: int, prices: Any, price: float
) -> Iterator[torch.Tensor]:
    """Yield the log-probabilities of each continuation at a price after a dense prompt, float32 [C, V]."""
    for window in windows:
        cache = read_prompt(model, window[:prompt_tokens])
        with torch.no_grad(), dropping(model, source.spec, prices, price):
            logits = model(window[None, prompt_tokens:].to(model.device), past_key_values=cache, use_cache=True).logits
        yield logits[0].float().log_softmax(dim=-1).cpu()


def priced(
    name: str, path: Path, packing: Packing, dense: list[torch.Tensor], windows: torch.Tensor, options: Any
) -> Iterator[dict[str, Any]]:
    source, calibration = resolve_model(name), read_calibration(path)
    model, found = source.reference(device=options.device), calibration.priced
    if found is None or calibration.model_fingerprint != source.fingerprint:
        raise SystemExit(f"{path} has no prices of {name}.")
    own = list(continuations(model, windows, options.prompt_tokens))
    integers = loss(dense, iter(own))
    prices, table = found.row_prices(source.spec, packing), found.table(packing)
    for sparsity in options.sparsity:
        price = table.price_for(sparsity=sparsity)
        sparse = list(at_price(model, source, windows, options.prompt_tokens, prices, price))
        rows, both = loss(own, iter(sparse)), loss(dense, iter(sparse))
        yield {
            "model": name,
            "sparsity": sparsity,
            "packing": packing,
            "kl_of_both": both.describe(),
            "kl_of_integers": integers.kl,
            "kl_of_rows": rows.kl,
            "predicted_kl_of_rows": table.predicted(price).kl,
            "both_over_sum": both.kl / (integers.kl + rows.kl),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the float model")
    parser.add_argument("quantised", nargs="+", help="models of the same vocabulary")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--calibration", action="append", default=[], metavar="MODEL=FILE")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--packing", choices=["separate", "sites"], default="sites")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    source = resolve_model(options.model)
    length = options.prompt_tokens + options.continuation_tokens
    text = options.text.read_text(encoding="utf-8")[: 16 * length * options.windows]
    windows = text_windows(source.tokenizer, text, length)[: options.windows]
    if len(windows) < options.windows:
        parser.error(f"{options.text} has {len(windows)} windows of {length} tokens.")
    dense = list(continuations(source.reference(device=options.device), windows, options.prompt_tokens))
    calibrations = dict(given.split("=", 1) for given in options.calibration)
    for name in options.quantised:
        if name in calibrations:
            for row in priced(name, Path(calibrations[name]), options.packing, dense, windows, options):
                print(json.dumps(row), flush=True)
            continue
        model = resolve_model(name).reference(device=options.device)
        found = loss(dense, continuations(model, windows, options.prompt_tokens))
        print(json.dumps({"model": name, **found.describe()}), flush=True)


if __name__ == "__main__":
    main()
