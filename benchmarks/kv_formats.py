"""Compare ways to round keys and values to 8 bits, in transformers: the KL of each to float keys and values.

    python benchmarks/kv_formats.py MODEL --text valid.txt --windows 3

Every token of a window attends to rounded keys and values. KL is over the last tokens of each window.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from tda_export.graph.cache_formats import hadamard
from tda_export.graph.stored_cache import kept_of
from tda_export.models.source import resolve_model

Rounding = Callable[[torch.Tensor], torch.Tensor]
GROUP = 32


def as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def with_zero_points(x: torch.Tensor) -> torch.Tensor:
    least, most = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    scale = torch.where(most > least, (most - least) / 255, 1.0)
    return ((x - least) / scale).round() * scale + least


def in_groups(x: torch.Tensor) -> torch.Tensor:
    return kept_of(x.unflatten(-1, (-1, GROUP))).flatten(-2)


def spread(x: torch.Tensor) -> torch.Tensor:
    turn = torch.from_numpy(hadamard(x.shape[-1]))
    return kept_of(x @ turn) @ turn


WAYS: dict[str, tuple[Rounding, Rounding]] = {
    "one scale": (kept_of, kept_of),
    "one scale, keys alone": (kept_of, as_it_is),
    "one scale, values alone": (as_it_is, kept_of),
    "zero points": (with_zero_points, with_zero_points),
    "groups": (in_groups, in_groups),
    "keys and values spread": (spread, spread),
    "keys spread": (spread, kept_of),
}


class Rounded(DynamicCache):
    """A cache that returns rounded keys and values."""

    def __init__(self, model: Any, keys: Rounding, values: Rounding) -> None:
        super().__init__(config=model.config)
        self._keys, self._values = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **settings: Any) -> Any:
        return super().update(self._keys(key_states), self._values(value_states), *args, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window-tokens", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each window that KL is taken over")
    options = parser.parse_args()
    source = resolve_model(options.model)
    model, size = source.reference(), options.window_tokens
    text = source.tokenizer(options.text.read_text(encoding="utf-8")[: 40 * size * options.windows])["input_ids"]
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with torch.inference_mode():
        for start in range(0, size * options.windows, size):
            window = torch.tensor([text[start : start + size]])

            def log_probabilities(cache: DynamicCache | None, window: torch.Tensor = window) -> torch.Tensor:
                logits = model(window, past_key_values=cache, use_cache=True).logits[0, -options.tokens :]
                return logits.double().log_softmax(dim=-1)

            dense = log_probabilities(None)
            for name, ways in WAYS.items():
                rounded = log_probabilities(Rounded(model, *ways))
                found[name].append(float((dense.exp() * (dense - rounded)).sum(dim=-1).mean()))
    for name, of_windows in found.items():
        print(json.dumps({"way": name, "kl": sum(of_windows) / len(of_windows), "windows": len(of_windows)}))


if __name__ == "__main__":
    main()
