"""KL to the float model that each matrix alone costs in four bits: which ones are worth eight.

    python benchmarks/sensitivity.py MODEL INT4_FOLDER --results FILE.json [--sequences 6] [--length 384]

MODEL is the float model, INT4_FOLDER what `tda-export quantize` made of it. Each linear in turn takes its de-quantised
weights, all others stay float, and the model reads sequences of the built-in text. Losses of single matrices nearly add
up. The file has nats a token by matrix; `stored_models.py` chooses by it. What the file has is not measured again.
SmolLM2-135M: 210 matrices, about 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tda_export.calibration.corpus import load_corpus
from tda_export.models.linear_modules import layer_linears
from tda_export.models.source import resolve_model
from tda_export.weights.plan import part_name


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("quantised")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=6)
    parser.add_argument("--length", type=int, default=384)
    options = parser.parse_args()
    source = resolve_model(options.model)
    model, fours, spec = source.reference(), resolve_model(options.quantised).reference(), source.spec
    size = {"sequences": options.sequences, "length": options.length, "vocab_size": spec.vocab_size}
    tokens = load_corpus("builtin", source.tokenizer, text_column=None, seed=0, **size).tokens

    def log_probs() -> torch.Tensor:
        return model(tokens).logits.float().log_softmax(dim=-1)

    exact = log_probs()
    found: dict[str, float] = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for layer in range(spec.num_layers):
        rounded = layer_linears(fours, spec, layer)
        for part, linear in layer_linears(model, spec, layer).items():
            name = part_name(layer, part)
            if name in found:
                continue
            own = linear.weight.clone()
            linear.set_weight(rounded[part].weight)
            changed = log_probs()
            linear.set_weight(own)
            found[name] = float((exact.exp() * (exact - changed)).sum(dim=-1).mean())
            print(f"{name} {found[name]:.6f}", flush=True)
            options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
