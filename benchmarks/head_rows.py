"""Measure what it gives to price the rows of the head too, beside those of the layers' linears.

    python benchmarks/head_rows.py MODEL --calibration FILE --text wikitext2_valid.txt [--prompts 16] [--points 6]

An experiment in PyTorch: no artifact drops rows of the head. A row of the head holds the weights of one channel of the
last hidden state. Its c² is the mean square of the gradient of the log-likelihood by that channel, over labels that are
sampled from the model, as for the linears (`tda_export/calibration/prices.py`), on the sequences that gave the
calibration's prices. A token reads the row unless x_i² c_i² / bytes_i < price, with one price for all matrices.

Bytes are those of floats, or of linears in int4 and the head in int8, in groups of 32; the weights themselves are the
model's own, so KL is that of dropped rows alone. KL is to the dense model, over the 128 tokens after prompts that are
read densely.

It prints a JSON object for each kind of weights and price: the KL and the fraction of bytes, of linears, head and both,
with the head's rows dropped and with all of them read; then for each kind, at fractions of both's bytes, both KLs
interpolated, and the geometric mean over windows of their ratio with the standard error of its logarithm.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rows import Row, print_rows
from same_bytes import kl_at
from token_prices import price_sequences, ratio

from tda_export.calibration.corpus import BUILTIN
from tda_export.calibration.divergence import mean_kl
from tda_export.calibration.file import read_calibration
from tda_export.calibration.prices import read_prompt, sampled_labels
from tda_export.errors import UsageError
from tda_export.evaluation.text import TextSettings, cut_windows
from tda_export.graph.storage import read_plan
from tda_export.models.row_dropping import dropping, kept_rows
from tda_export.models.source import ModelSource, resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, RowBytes, linear_outputs, linear_shape, row_bytes_of

PACKING: Packing = "sites"
CONTINUATION = 128  # tokens
FLOAT_BYTES = 4
SMALLEST_PRICE = 2.5e-10  # for floats; a byte of int4 holds eight times as much
SHARES = (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of all bytes of linears and head


def head_squares(model: Any, tokens: torch.Tensor, settings: Mapping[str, int], labels: int) -> torch.Tensor:
    """Return c² of the head's input channels, float64 [M], from continuations of sequences int64 [N, P + C]."""
    prompt = settings["prompt_tokens"]
    total = torch.zeros(model.get_output_embeddings().weight.shape[1], dtype=torch.float64)
    count = 0
    inputs: list[torch.Tensor] = []

    def leaf(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs[:] = [given[0].detach().requires_grad_()]
        return (inputs[0],)

    handle = model.get_output_embeddings().register_forward_pre_hook(leaf)
    try:
        for index, sequence in enumerate(tokens):
            cache = read_prompt(model, sequence[:prompt])
            with torch.enable_grad():
                logits = model(sequence[None, prompt:], past_key_values=cache, use_cache=True).logits[0, :-1].float()
                log_probs = logits.log_softmax(dim=-1)
                for chosen in sampled_labels(labels, settings["seed"], 2 * index)(logits.detach()):
                    inputs[0].grad = None
                    log_probs.gather(1, chosen[:, None]).sum().backward(retain_graph=True)
                    assert inputs[0].grad is not None
                    total += inputs[0].grad[0, :-1].square().sum(dim=0, dtype=torch.float64)
                    count += len(chosen)
    finally:
        handle.remove()
    return total / count


@contextlib.contextmanager
def dropping_of_head(model: Any, row_price: torch.Tensor, price: float) -> Iterator[list[int]]:
    """Drop rows of the head while the block runs; yields how many rows were read, and of how many."""
    count = [0, 0]

    def drop(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        rows = kept_rows(given[0][0], row_price, torch.tensor(price))
        count[0] += int(rows.sum())
        count[1] += rows.numel()
        return (torch.where(rows, given[0], 0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(drop)
    try:
        yield count
    finally:
        handle.remove()


class Windows:
    """Windows of a text, whose prompts have been read."""

    def __init__(self, source: ModelSource, model: Any, text: Path, settings: TextSettings) -> None:
        tokens = source.tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        windows = torch.tensor(cut_windows(tokens, source.tokenizer("")["input_ids"], settings))
        self._model, self._spec = model, source.spec
        self._rest = windows[:, settings.prompt_tokens :]
        self._caches = [read_prompt(model, window[: settings.prompt_tokens]) for window in windows]
        self._dense = [self._log_probs(i) for i in range(len(windows))]
        self.count = len(windows)

    def _log_probs(self, window: int) -> torch.Tensor:
        cache = copy.deepcopy(self._caches[window])
        with torch.no_grad():
            logits = self._model(self._rest[window, None], past_key_values=cache, use_cache=True).logits[0]
        found: torch.Tensor = logits.float().log_softmax(dim=-1)
        return found

    def measure(self, linears: Mapping[str, torch.Tensor], head: torch.Tensor | None, price: float) -> Row:
        """Return the KL of each window, and the densities of each part, float64 [L], and of the head."""
        kl, densities, read = [], [], [0, 0]
        for window, dense in enumerate(self._dense):
            with contextlib.ExitStack() as stack:
                count = stack.enter_context(dropping(self._model, self._spec, linears, price))
                of_head = [0, 0] if head is None else stack.enter_context(dropping_of_head(self._model, head, price))
                kl.append(float(mean_kl(dense, self._log_probs(window))))
            densities.append(count.densities(self._spec))
            read = [read[0] + of_head[0], read[1] + of_head[1]]
        mean = {part: torch.stack([each[part] for each in densities]).mean(dim=0) for part in densities[0]}
        return {"windows": kl, "parts": mean, "head": 1.0 if head is None else read[0] / read[1]}


def bytes_read(spec: DecoderSpec, row_bytes: RowBytes, parts: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Return the bytes of the linears that are read, and of all of them."""
    outputs, read, whole = linear_outputs(spec), 0.0, 0.0
    for part, density in parts.items():
        for layer in range(spec.num_layers):
            size = linear_shape(spec, part)[0] * row_bytes.of(layer, (part,), outputs)
            read, whole = read + float(density[layer]) * size, whole + size
    return read, whole


def compared(
    kind: str, text: Windows, spec: DecoderSpec, row_bytes: RowBytes, rows: tuple[Any, torch.Tensor, float], points: int
) -> Iterator[Row]:
    """Yield a row for each price, and one for each fraction of bytes that both ways have settings around."""
    linears, head, head_row = rows
    found: dict[bool, list[Row]] = {False: [], True: []}
    for exponent in range(points):
        price = SMALLEST_PRICE * 2.0**exponent * (1.0 if kind == "float" else 8.0)
        for priced in (False, True):
            row = text.measure(linears, head if priced else None, price)
            read, whole = bytes_read(spec, row_bytes, row.pop("parts"))
            of_head = len(head) * head_row
            row |= {"weights": kind, "price": price, "head_priced": priced, "linears": read / whole}
            row |= {"both": (read + row["head"] * of_head) / (whole + of_head)}
            row["kl"] = sum(row["windows"]) / len(row["windows"])
            found[priced].append(row)
            yield {name: value for name, value in row.items() if name != "windows"}
    for share in SHARES:
        kls = {way: kl_at([(row["both"], row["kl"]) for row in rows], share) for way, rows in found.items()}
        if None in kls.values():
            continue
        windows = [
            [kl_at([(row["both"], row["windows"][i]) for row in rows], share) or 0.0 for i in range(text.count)]
            for rows in found.values()
        ]
        yield {"weights": kind, "both": share, "kl": kls[False], "kl_head_priced": kls[True]} | {
            "ratio": ratio(windows[1], windows[0])
        }


def measured(options: argparse.Namespace) -> Iterator[Row]:
    source = resolve_model(options.model, notify=lambda line: print(line, file=sys.stderr))
    found, spec = read_calibration(options.calibration), source.spec
    if found.model_fingerprint != source.fingerprint:
        raise UsageError(f"{options.calibration} is of another model than {source.name}. Calibrate this one.")
    if found.priced is None:
        raise UsageError(f"{options.calibration} has no prices. Calibrate with --method priced.")
    model = source.reference().requires_grad_(False)
    settings = found.provenance["settings"]
    squares = head_squares(model, price_sequences(source, found, options), settings, options.labels)
    text = Windows(source, model, options.text, TextSettings(options.prompts, options.prompt_tokens, CONTINUATION))
    for kind in ("float", "int4"):
        plan = None if kind == "float" else read_plan(source, kind, None, ())
        row_bytes = row_bytes_of(spec, FLOAT_BYTES, plan)
        format = None if plan is None else plan.of("head")
        head_row = spec.vocab_size * FLOAT_BYTES if format is None else format.row_bytes(spec.vocab_size)
        linears = found.priced.sums.row_prices(spec, PACKING, row_bytes)
        rows = (linears, (squares / head_row).float(), head_row)
        yield from compared(kind, text, spec, row_bytes, rows, options.points)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dataset", default=BUILTIN, help="The calibration's own.  [default: builtin]")
    parser.add_argument("--text", type=Path, required=True, help="Text to measure on.")
    parser.add_argument("--labels", type=int, default=2, help="Labels of each token.  [default: 2]")
    parser.add_argument("--sequences", type=int, default=32, help="Most sequences to sample.  [default: 32]")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument("--points", type=int, default=6, help="Prices, each twice the one before.  [default: 6]")
    return print_rows(measured(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
