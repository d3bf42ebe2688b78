"""KL of quantised models to their float model, on windows of a text: prompt and continuation read by each model.

    python benchmarks/quantised_kl.py FLOAT QUANTISED [QUANTISED ...] --text valid.txt --windows 24

Windows follow one another in the text, without a token that the tokenizer would put before each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tda_export.models.source import resolve_model
from tda_export.quantization.kl import continuations, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the float model")
    parser.add_argument("quantised", nargs="+", help="models of the same vocabulary")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--continuation-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    source = resolve_model(options.model)
    length = options.prompt_tokens + options.continuation_tokens
    text = options.text.read_text(encoding="utf-8")[: 16 * length * options.windows]
    tokens = torch.tensor(source.tokenizer(text, add_special_tokens=False).input_ids)
    windows = tokens[: len(tokens) // length * length].view(-1, length)[: options.windows]
    if len(windows) < options.windows:
        parser.error(f"{options.text} has {len(windows)} windows of {length} tokens.")
    dense = list(continuations(source.reference(device=options.device), windows, options.prompt_tokens))
    for name in options.quantised:
        model = resolve_model(name).reference(device=options.device)
        found = loss(dense, continuations(model, windows, options.prompt_tokens))
        print(json.dumps({"model": name, **found.describe()}))


if __name__ == "__main__":
    main()
