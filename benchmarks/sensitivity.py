"""KL to the float model that each matrix alone costs in four bits: which ones are worth eight.

    python benchmarks/sensitivity.py MODEL INT4_FOLDER --results FILE.json [--megabytes 16]

MODEL is the float model, INT4_FOLDER what `tda-export quantize MODEL --weights int4` made of it. Each linear in turn
takes its de-quantised weights, all others stay float, and the model reads sequences of the built-in text. The file has
the KL in nats a token by matrix; what it has is not measured again. SmolLM2-135M: 210 matrices, about 15 minutes on one
core.

--megabytes prints the rules for `tda-export quantize MODEL --weights int4 --weights-for RULES`: which matrices to store
in eight bits for so many megabytes more. Those come first that lose most per byte that int8 adds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tda_export.calibration.corpus import load_corpus
from tda_export.graph.storage import read_plan
from tda_export.models.linear_modules import layer_linears
from tda_export.models.source import resolve_model
from tda_export.packing import linear_outputs, linear_shape
from tda_export.weights.plan import FormatPlan, part_name


def worth_eight_bits(
    losses: dict[str, float], spec: Any, fours: FormatPlan, eights: FormatPlan, most_bytes: float
) -> list[str]:
    """Return the matrices that lose most in four bits per byte that eight add, up to so many bytes in all."""
    more = {}
    for layer in range(spec.num_layers):
        for part, columns in linear_outputs(spec).items():
            name = part_name(layer, part)
            wide, narrow = (plan.integers[name].row_bytes(columns) for plan in (eights, fours))
            more[name] = linear_shape(spec, part)[0] * (wide - narrow)
    chosen, taken = [], 0
    for name in sorted(losses, key=lambda name: losses[name] / more[name], reverse=True):
        if taken + more[name] <= most_bytes:
            chosen.append(name)
            taken += more[name]
    return chosen


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("quantised")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=3, help="of built-in text (3)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (256)")
    parser.add_argument("--megabytes", type=float, help="print rules for so many MB more")
    options = parser.parse_args()
    source = resolve_model(options.model)
    quantised, spec = resolve_model(options.quantised), source.spec
    model, fours = source.reference(), quantised.reference()
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
            print(f"{name} {found[name]:.6f}", file=sys.stderr, flush=True)
            options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.megabytes is not None:
        assert quantised.formats is not None
        eights = read_plan(source, "int8", None, [])
        names = worth_eight_bits(found, spec, quantised.formats, eights, 1e6 * options.megabytes)
        print(",".join(f"{name}=int8" for name in names))


if __name__ == "__main__":
    main()
