"""Measure what it gives to drop rows of the head too, by prices and by TEAL's thresholds.

    python benchmarks/head_rows.py MODEL --calibration FILE --text wikitext2_valid.txt [--densities FILE]
        [--prompts 16] [--device cuda]

In PyTorch, float32. FILE comes from `tda-export calibrate MODEL`, with prices for the head's rows. Ways:

- `priced`: one price for the rows of the layers' linears and of the head. `priced, head whole`: all of the head is
  read.
- `TEAL, head whole`, with --densities (`teal_densities.py MODEL --calibration FILE`): thresholds of the greedy
  densities for the layers' linears. `TEAL`: the head has a threshold too, which TEAL's paper does not give it: a row of
  the head is read if its input reaches the quantile of a density. Every layer sparsity is measured with every density
  of the head, KL is interpolated between densities, and at each fraction of bytes the best density counts, chosen on
  the text that is measured. So that is the least that TEAL with such a threshold could lose.

Bytes are those of floats, or of linears in int4 and the head in int8, in groups of 32. The weights themselves are the
model's own, so KL is that of dropped rows alone. KL is to the dense model, over the 128 tokens after prompts that are
read densely.

It prints a JSON object for each setting: the KL, and the fraction read of the linears, of the head and of both. Then
for each kind of weights and fraction of both's bytes it prints every way's KL there, interpolated, and the geometric
mean over windows of its ratio to the first's, with the standard error of its logarithm.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rows import Row, print_rows
from same_bytes import kl_at
from token_prices import price_sequences, ratio

from tda_export.calibration.corpus import BUILTIN
from tda_export.calibration.divergence import mean_kl
from tda_export.calibration.file import read_calibration
from tda_export.calibration.prices import read_prompt
from tda_export.errors import UsageError
from tda_export.evaluation.greedy_densities import read_densities
from tda_export.evaluation.row_methods import threshold_prices
from tda_export.evaluation.text import TextSettings, cut_windows
from tda_export.graph.storage import read_plan
from tda_export.models.linear_modules import Linear
from tda_export.models.row_dropping import dropping
from tda_export.models.source import ModelSource, resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, RowBytes, linear_outputs, linear_shape, row_bytes_of
from tda_export.weights.plan import HEAD

PACKING: Packing = "separate"
CONTINUATION = 128  # tokens
FLOAT_BYTES = 4
SMALLEST_PRICE = 2.5e-10  # for floats; a byte of int4 holds eight times as much
SMALLEST_KL = 1e-12  # of a window, so that its logarithm exists
SHARES = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)  # of all bytes of linears and head
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of every layer's linears, for TEAL
HEAD_DENSITIES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
BETWEEN = (0.25, 0.5, 0.75)  # of two densities of the head, for which KL is interpolated
PRICED, WHOLE, TEAL, TEAL_WHOLE = "priced", "priced, head whole", "TEAL", "TEAL, head whole"


class Windows:
    """Windows of a text, whose prompts have been read."""

    def __init__(self, source: ModelSource, model: Any, text: Path, settings: TextSettings) -> None:
        tokens = source.tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        windows = torch.tensor(cut_windows(tokens, source.tokenizer("")["input_ids"], settings))
        self._model, self._spec = model, source.spec
        self._rest = windows[:, settings.prompt_tokens :].to(model.device)
        self._caches = [read_prompt(model, window[: settings.prompt_tokens]) for window in windows]
        self._dense = [self._log_probs(i) for i in range(len(windows))]
        self.count = len(windows)

    def _log_probs(self, window: int) -> torch.Tensor:
        cache = copy.deepcopy(self._caches[window])
        with torch.no_grad():
            logits = self._model(self._rest[window, None], past_key_values=cache, use_cache=True).logits[0]
        found: torch.Tensor = logits.float().log_softmax(dim=-1)
        return found

    def measure(self, row_prices: Mapping[str, torch.Tensor], price: float) -> Row:
        """Return the KL of each window, and the densities of each part, float64 [L], and of a head with prices, [1]."""
        with dropping(self._model, self._spec, row_prices, price) as count:
            kl = [float(mean_kl(dense, self._log_probs(window))) for window, dense in enumerate(self._dense)]
        return {"windows": kl, "parts": count.densities(self._spec)}


def head_sizes(model: Any, spec: DecoderSpec, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the sorted sizes of the head's inputs after the prompts of sequences int64 [N, P + C], float32 [N C M]."""
    sizes: list[torch.Tensor] = []
    handle = Linear(model, spec, 0, HEAD).on_input(lambda x: sizes.append(x[prompt:].abs().float().flatten()))
    try:
        with torch.no_grad():
            for sequence in tokens:
                model(sequence[None].to(model.device), use_cache=False)
    finally:
        handle.remove()
    return torch.cat(sizes).sort().values.cpu()


def head_thresholds(sizes: torch.Tensor, density: float, inputs: int) -> dict[str, torch.Tensor]:
    """Return the head's row prices, [1, M], with which a price of 1 reads this share of the sorted sizes; none at 1."""
    if density >= 1:
        return {}
    threshold = sizes[int((1 - density) * len(sizes))]
    return {HEAD: threshold.square().reciprocal().expand(1, inputs)}  # infinite where all are to be read


def bytes_read(spec: DecoderSpec, row_bytes: RowBytes, parts: Mapping[str, torch.Tensor]) -> Row:
    """Return the fraction of the bytes that is read: of the linears, of the head, and of both."""
    outputs, read, whole = linear_outputs(spec), 0.0, 0.0
    for part, density in parts.items():
        if part == HEAD:
            continue
        for layer in range(spec.num_layers):
            size = linear_shape(spec, part)[0] * row_bytes.of(layer, (part,), outputs)
            read, whole = read + float(density[layer]) * size, whole + size
    head = linear_shape(spec, HEAD)[0] * row_bytes.of(0, (HEAD,), outputs)
    of_head = float(parts[HEAD][0]) if HEAD in parts else 1.0
    return {"linears": read / whole, "head": of_head, "both": (read + of_head * head) / (whole + head)}


def refined(rows: Sequence[Row]) -> list[Row]:
    """Add settings between neighbouring densities of the head, by interpolation, as their own series."""
    found = list(rows)
    for sparsity in dict.fromkeys(row["sparsity"] for row in rows):
        own = [row for row in rows if row["sparsity"] == sparsity]
        for one, other in itertools.pairwise(own):
            for part in BETWEEN:
                both = (1 - part) * one["both"] + part * other["both"]

                def kl(first: float, second: float, ends: tuple[Row, Row] = (one, other), at: float = both) -> float:
                    points = [(end["both"], value) for end, value in zip(ends, (first, second), strict=True)]
                    return max(kl_at(points, at) or 0.0, SMALLEST_KL)

                windows = [kl(*each) for each in zip(one["windows"], other["windows"], strict=True)]
                series = (1 - part) * one["series"] + part * other["series"]
                of = {"series": series, "sparsity": sparsity, "both": both, "windows": windows}
                found.append(of | {"kl": sum(windows) / len(windows)})
    return found


def compared(kind: str, found: Mapping[str, Sequence[Row]], windows: int) -> Iterator[Row]:
    """Yield a row for each fraction of bytes: every way that has settings around it, beside the first way.

    Settings of one way that differ in `series` are alternatives, of which the best counts.
    """
    for share in SHARES:
        kls: dict[str, float] = {}
        by_window: dict[str, list[float]] = {}
        for way, rows in found.items():
            for series in dict.fromkeys(row.get("series") for row in rows):
                own = [row for row in rows if row.get("series") == series]
                kl = kl_at([(row["both"], row["kl"]) for row in own], share)
                if kl is not None and kl < kls.get(way, float("inf")):
                    each = ([(row["both"], row["windows"][i]) for row in own] for i in range(windows))
                    kls[way] = kl
                    by_window[way] = [max(kl_at(points, share) or 0.0, SMALLEST_KL) for points in each]
        first = next(iter(found))
        if first in kls and len(kls) > 1:
            ratios = {way: ratio(by_window[way], by_window[first]) for way in kls if way != first}
            yield {"weights": kind, "both": share, "kl": kls, f"to {first}": ratios}


def measured(options: argparse.Namespace) -> Iterator[Row]:
    source = resolve_model(options.model, notify=lambda line: print(line, file=sys.stderr))
    calibration, spec = read_calibration(options.calibration), source.spec
    if calibration.model_fingerprint != source.fingerprint:
        raise UsageError(f"{options.calibration} is of another model than {source.name}. Calibrate this one.")
    priced = calibration.priced
    if priced is None or HEAD not in priced.sums.square:
        raise UsageError(f"{options.calibration} has no prices for the head's rows. Calibrate without --head whole.")
    model = source.reference(device=options.device).requires_grad_(False)
    text = Windows(source, model, options.text, TextSettings(options.prompts, options.prompt_tokens, CONTINUATION))
    teal: list[Row] = []
    if options.densities:
        densities = read_densities(options.densities)
        densities.require(options.densities, source.fingerprint, PACKING, "all")
        prompt = calibration.provenance["settings"]["prompt_tokens"]
        sizes = head_sizes(model, spec, price_sequences(source, calibration, options), prompt)
        for sparsity, density in itertools.product(SPARSITIES, HEAD_DENSITIES):
            rows = threshold_prices("teal", priced, spec, PACKING, densities.at(sparsity))
            rows |= head_thresholds(sizes, density, linear_shape(spec, HEAD)[0])
            teal.append({"series": density, "sparsity": sparsity, **text.measure(rows, 1.0)})
    for kind in ("float", "int4"):
        plan = None if kind == "float" else read_plan(source, kind, None, ())
        row_bytes = row_bytes_of(spec, FLOAT_BYTES, plan, head=True)
        row_prices = priced.row_prices(spec, PACKING, row_bytes)
        found: dict[str, list[Row]] = {}
        for way, exponent in itertools.product((PRICED, WHOLE), range(options.points)):
            price = SMALLEST_PRICE * 2.0**exponent * (1.0 if kind == "float" else 8.0)
            rows = row_prices if way == PRICED else {name: of for name, of in row_prices.items() if name != HEAD}
            found.setdefault(way, []).append({"price": price, **text.measure(rows, price)})
        if teal:
            found |= {TEAL: teal, TEAL_WHOLE: [row for row in teal if row["series"] == 1.0]}
        for way, own in found.items():
            found[way] = [row | bytes_read(spec, row_bytes, row["parts"]) for row in own]
            for row in found[way]:
                row["kl"] = sum(row["windows"]) / text.count
                shown = {name: value for name, value in row.items() if name not in ("windows", "parts")}
                yield {"weights": kind, "way": way, **shown}
        if teal:
            found[TEAL] = refined(found[TEAL])
        yield from compared(kind, found, text.count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--densities", type=Path, metavar="FILE", help="TEAL's greedy densities of all linears.")
    parser.add_argument("--dataset", default=BUILTIN, help="The calibration's own.  [default: builtin]")
    parser.add_argument("--text", type=Path, required=True, help="Text to measure on.")
    parser.add_argument("--sequences", type=int, default=32, help="Most sequences for TEAL's head.  [default: 32]")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--points", type=int, default=10, help="Prices, each twice the one before.  [default: 10]")
    parser.add_argument("--device", default="cpu", help="PyTorch's device.  [default: cpu]")
    return print_rows(measured(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
