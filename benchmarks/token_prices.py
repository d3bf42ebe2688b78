"""Compare row prices as estimated, refined, and with a price that differs by token, with TEAL at the same bytes.

    python benchmarks/token_prices.py MODEL --calibration FILE --text wikitext2_valid.txt [--densities FILE]
        [--probes 2 8 14 20 26] [--strength 0.3 0.45] [--power 1 0.85] [--labels 2] [--ridge 0.75] [--device cpu]

In PyTorch, float32. FILE comes from `tda-export calibrate MODEL`; with its --refine, refined prices are measured too.
With --probes, so are prices that differ by token, as the model's own state predicts how much a token's loss matters.
That is an experiment: no artifact has such prices. g_ti is the gradient of the log-likelihood by input channel i of
a matrix at token t. Prices of rows hold its mean square over tokens; but |g_t|² differs between tokens by orders of
magnitude, and alike in neighbouring layers. At some layers, the probes, a linear function of the FFN's input is fitted
to log |g_t|², averaged over the matrices from this probe to the next (ridge regression on the sequences that gave the
prices, read densely; one function for k and v, and one for all other matrices). A token's price is then

    price · exp(-strength · prediction),    with the prediction centred, and cut to -4 to 4.

Before the first probe, prices are those of the artifact. With --power p, row prices of each matrix are drawn together:
c² becomes (c²)^p m^(1 - p), m the geometric mean of the matrix, in which each row weighs as much as its c².

TEAL's greedy densities (--densities, from benchmarks/teal_densities.py) are measured beside it. Every way is compared
at the same bytes of all linears: its KL, of the mean and of each window, is interpolated between two settings.

It prints one row for each way and fraction of bytes: KL, and the geometric mean over windows of its ratio to plain
prices and to TEAL, with the standard error of the ratio's logarithm.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import Row, print_rows
from same_bytes import Cell, at_same_bytes, kl_at

from tda_export.calibration.corpus import BUILTIN, load_corpus
from tda_export.calibration.divergence import mean_kl
from tda_export.calibration.file import Calibration, read_calibration
from tda_export.calibration.prices import ChooseLabels, read_prompt, sampled_labels
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.greedy_densities import read_densities
from tda_export.evaluation.row_methods import threshold_prices
from tda_export.evaluation.text import TextSettings, cut_windows
from tda_export.models.linear_modules import layer_linears
from tda_export.models.row_dropping import PriceOf, RowsRead, dropping
from tda_export.models.source import ModelSource, resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_parts, linear_shape
from tda_export.progress import progress
from tda_export.weights.plan import HEAD

PACKING, PARTS = "separate", "all"
PLAIN, REFINED, TEAL = "priced", "refined", "TEAL, greedy densities"
WITHIN = 0.02  # a miss of the bytes up to which a setting counts
MOST, LEAST = 4.0, 1e-3  # the largest prediction; the smallest |g_t|², relative to the mean
GROUPS: dict[str, int] = {"k": 1, "v": 1}  # by part; all others are 0


@dataclass(frozen=True)
class Probes:
    """The fitted functions: `weight` [hidden, 2] and `offset` [2] by layer; the columns are the groups."""

    weight: dict[int, torch.Tensor]
    offset: dict[int, torch.Tensor]

    def predict(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Predict from the FFN's input x [T, hidden] of a probe's layer, [T, 2]."""
        return (x.float() @ self.weight[layer] + self.offset[layer]).clamp(-MOST, MOST)


@dataclass
class TokenPrices:
    """The prices of the tokens of one call. `prediction`: the last probe's, None before the first."""

    probes: Probes
    price: float
    strength: float
    prediction: torch.Tensor | None = None

    def observe(self, layer: int, x: torch.Tensor) -> None:
        self.prediction = self.probes.predict(layer, x)

    def __call__(self, layer: int, part: str) -> torch.Tensor:
        """Return the price of each token for a matrix, [T, 1]; [] where all have the same."""
        if self.prediction is None:
            return torch.tensor(self.price)
        return self.price * (-self.strength * self.prediction[:, GROUPS.get(part, 0), None]).exp()


def ffn_input(spec: DecoderSpec) -> str:
    """Return the part that reads the FFN's input: gate, or up where there is no gate."""
    return linear_parts(spec)[4]


@dataclass
class Sample:
    """A sequence's inputs of the probes, [T, hidden] by layer, and |g_t|² by layer and part, [T]."""

    inputs: dict[int, torch.Tensor]
    square: dict[tuple[int, str], torch.Tensor]


def sample(
    model: Any,
    spec: DecoderSpec,
    sequence: torch.Tensor,
    prompt: int,
    probes: Sequence[int],
    choose: ChooseLabels,
) -> Sample:
    """Take one sequence. Every token but the last, which has no label, counts."""
    inputs: dict[int, torch.Tensor] = {}
    square: dict[tuple[int, str], torch.Tensor] = {}
    cache = read_prompt(model, sequence[:prompt])
    handles = [model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.detach().requires_grad_())]

    def watch(layer: int, part: str) -> Callable[[torch.Tensor], None]:
        def observe(gradient: torch.Tensor) -> None:
            square[layer, part] = square.get((layer, part), 0) + gradient.float().square().sum(dim=1)

        return observe

    def keep(layer: int) -> Callable[[torch.Tensor], None]:
        return lambda x: inputs.update({layer: x.detach().float()[:-1]})

    for layer in range(spec.num_layers):
        for part, linear in layer_linears(model, spec, layer).items():
            if layer in probes and part == ffn_input(spec):
                handles.append(linear.on_input(keep(layer)))
            handles.append(linear.on_input_gradient(watch(layer, part)))
    try:
        with torch.enable_grad():
            tokens = sequence[None, prompt:].to(model.device)
            logits = model(tokens, past_key_values=cache, use_cache=True).logits[0, :-1]
            log_probs = logits.float().log_softmax(dim=-1)
            for row in choose(logits.detach().float()):
                log_probs.gather(1, row[:, None]).sum().backward(retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return Sample(inputs, {key: value[:-1] for key, value in square.items()})


def fit(samples: Sequence[Sample], spec: DecoderSpec, probes: Sequence[int], ridge: float) -> Probes:
    """Fit every probe. `ridge` is relative to the number of tokens, as inputs are standardised."""
    square = {key: torch.cat([each.square[key] for each in samples]) for key in samples[0].square}
    logs = {key: value.clamp_min(LEAST * value.mean()).log() for key, value in square.items()}
    found = Probes({}, {})
    for probe, following in zip(probes, [*probes[1:], spec.num_layers], strict=True):
        x = torch.cat([each.inputs[probe] for each in samples]).double()
        mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
        z = (x - mean) / std
        targets = []
        for group in (0, 1):
            own = [logs[key] for key in segment(spec, probe, following) if GROUPS.get(key[1], 0) == group]
            mean_log = torch.stack(own).mean(dim=0).double()
            targets.append(mean_log - mean_log.mean())
        products = z.T @ z + ridge * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(products, z.T @ torch.stack(targets, dim=1)) / std[:, None]
        found.weight[probe], found.offset[probe] = weight.float(), -(mean @ weight).float()
    return found


def segment(spec: DecoderSpec, probe: int, following: int) -> list[tuple[int, str]]:
    """List the layers and parts whose prices a probe sets: from its FFN to the attention of the next probe's layer."""
    ffn = linear_parts(spec)[4:]
    every = [(layer, part) for layer in range(probe, spec.num_layers) for part in linear_parts(spec)]
    return [
        (layer, part)
        for layer, part in every
        if (layer > probe or part in ffn) and (layer < following or (layer == following and part not in ffn))
    ]


class Text:
    """Windows of a text, read densely once: prompts' keys and values, and log-probabilities of continuations."""

    def __init__(self, source: ModelSource, model: Any, path: Path, settings: TextSettings) -> None:
        self._model, self._spec, self._prompt = model, source.spec, settings.prompt_tokens
        tokens = source.tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        self._windows = torch.tensor(cut_windows(tokens, source.tokenizer("")["input_ids"], settings))
        self._caches = [read_prompt(model, window[: self._prompt]) for window in self._windows]
        with torch.no_grad():
            self._dense = [self._read(i) for i in range(len(self._windows))]

    def _read(self, window: int) -> torch.Tensor:
        cache = copy.deepcopy(self._caches[window])
        tokens = self._windows[window, None, self._prompt :].to(self._model.device)
        logits = self._model(tokens, past_key_values=cache, use_cache=True).logits[0]
        found: torch.Tensor = logits.float().log_softmax(dim=-1)
        return found

    def measure(self, rows: Mapping[str, torch.Tensor], price: float, probes: Probes, strength: float) -> Row:
        """Return the KL of each window, their mean, and the fraction of all linears' bytes that is read."""
        kl, shares = [], []
        for window, dense in enumerate(self._dense):
            prices = TokenPrices(probes, price, strength)
            # Probes first: they read their inputs before rows are dropped.
            with torch.no_grad(), watching(self._model, self._spec, prices), self._dropping(rows, prices) as count:
                kl.append(float(mean_kl(dense, self._read(window))))
            shares.append(share_of(self._spec, count))
        return {"windows": kl, "kl": sum(kl) / len(kl), "linear_share": sum(shares) / len(shares)}

    def _dropping(self, rows: Mapping[str, torch.Tensor], prices: PriceOf) -> AbstractContextManager[RowsRead]:
        return dropping(self._model, self._spec, rows, prices)


@contextlib.contextmanager
def watching(model: Any, spec: DecoderSpec, prices: TokenPrices) -> Iterator[None]:
    """Let prices observe the layers of probes while the block runs."""
    handles = []
    for layer in prices.probes.weight:
        linear = layer_linears(model, spec, layer)[ffn_input(spec)]
        handles.append(linear.on_input(functools.partial(prices.observe, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share_of(spec: DecoderSpec, count: RowsRead) -> float:
    """Return the fraction of all linears' bytes that was read."""
    sizes = {part: math.prod(linear_shape(spec, part)) for part in linear_parts(spec)}
    read = sum(sizes[part] * float(own.mean()) for part, own in count.densities(spec).items())
    return read / sum(sizes.values())


def price_sequences(source: ModelSource, found: Calibration, options: argparse.Namespace) -> torch.Tensor:
    """Return the sequences that gave the prices, at most --sequences of them, int64 [N, P + C]."""
    settings = found.provenance["settings"]
    corpus = load_corpus(
        options.dataset,
        source.tokenizer,
        text_column=None,
        sequences=settings["sequences"],
        length=settings["prompt_tokens"] + settings["continuation_tokens"],
        seed=settings["seed"],
        vocab_size=source.spec.vocab_size,
    )
    if corpus.sha256 != found.provenance["dataset"]["tokens_sha256"]:
        raise UsageError(f"{options.calibration} is of other text. Give its --dataset.")
    return corpus.tokens[::2][: options.sequences]


def fitted(source: ModelSource, model: Any, found: Calibration, options: argparse.Namespace) -> Probes:
    """Sample the sequences and fit the probes.

    Raises:
        UsageError: A probe is no layer with layers after it.
    """
    last = source.spec.num_layers - 2
    if options.probes != sorted({*options.probes}) or options.probes[0] < 0 or options.probes[-1] > last:
        raise UsageError(f"--probes: give rising layers from 0 to {last}.")
    sequences, settings = price_sequences(source, found, options), found.provenance["settings"]
    samples = []
    with progress("Sampling", len(sequences), quiet=not sys.stderr.isatty()) as advance:
        for index, sequence in enumerate(sequences):
            # The sequence's number in the corpus; these are the even ones.
            choose = sampled_labels(options.labels, settings["seed"], 2 * index)
            samples.append(sample(model, source.spec, sequence, settings["prompt_tokens"], options.probes, choose))
            advance(1)
    return fit(samples, source.spec, options.probes, options.ridge)


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each way and fraction of bytes."""
    source = resolve_model(options.model, notify=lambda line: print(line, file=sys.stderr))
    found, spec = read_calibration(options.calibration), source.spec
    if found.model_fingerprint != source.fingerprint:
        raise UsageError(f"{options.calibration} is of another model than {source.name}. Calibrate this one.")
    priced = found.priced
    if priced is None or PACKING not in priced.measured:
        raise UsageError(f"{options.calibration} has no table of prices with packing {PACKING}. Calibrate with it.")
    model = source.reference(device=options.device).requires_grad_(False)
    probes = fitted(source, model, found, options) if options.probes else Probes({}, {})
    text = Text(source, model, options.text, TextSettings(options.prompts, options.prompt_tokens, 128))
    row_prices, table = priced.sums.row_prices(spec, PACKING, priced.row_bytes), priced.table(PACKING)
    row_prices.pop(HEAD, None)  # the head is read whole

    def by_price(rows: Mapping[str, torch.Tensor], strength: float, cell: Cell) -> Row:
        return text.measure(rows, table.price_for(sparsity=cell.sparsity), probes, strength)

    ways: dict[str, Callable[[Cell], Row]] = {PLAIN: functools.partial(by_price, row_prices, 0.0)}
    if PACKING in priced.refined:
        ways[REFINED] = functools.partial(by_price, priced.refined[PACKING].apply(row_prices), 0.0)
    if options.densities:
        densities = read_densities(options.densities)
        densities.require(options.densities, source.fingerprint, PACKING, PARTS)

        def by_threshold(cell: Cell) -> Row:
            thresholds = densities.at(cell.sparsity or 0.0)
            return text.measure(threshold_prices("teal", priced, spec, PACKING, thresholds), 1.0, probes, 0.0)

        ways[TEAL] = by_threshold
    for power, strength in itertools.product(options.power, options.strength if options.probes else ()):
        name = f"strength {strength:g}, power {power:g}"
        ways[name] = functools.partial(by_price, drawn_together(row_prices, power), strength)
    for sparsity in options.sparsity:
        tries = {name: at_bytes(name, sparsity, measure) for name, measure in ways.items()}
        windows = {name: [interpolated(name, of, sparsity) for of in by_window(own)] for name, own in tries.items()}
        for name, own in tries.items():
            yield {
                "way": name,
                "share": 1 - sparsity,
                "read": [row["linear_share"] for row in own],
                "kl": interpolated(name, [(row["linear_share"], row["kl"]) for row in own], sparsity),
                "of_priced": ratio(windows[name], windows[PLAIN]),
                "of_teal": ratio(windows[name], windows[TEAL]) if TEAL in windows else None,
            }


def at_bytes(name: str, sparsity: float, measure: Callable[[Cell], Row]) -> list[Row]:
    """Measure settings on both sides of the bytes."""
    tries: list[Row] = []

    def keeping(cell: Cell) -> Row:
        tries.append(measure(cell))
        return dict(tries[-1])

    at_same_bytes(Cell(name, sparsity, "linear_share"), WITHIN, keeping, between=True)
    return tries


def by_window(tries: Sequence[Row]) -> Iterator[list[tuple[float, float]]]:
    """Yield the fraction of bytes of all windows and the KL of one, of every setting, for each window."""
    for window in range(len(tries[0]["windows"])):
        yield [(row["linear_share"], row["windows"][window]) for row in tries]


def interpolated(name: str, points: Sequence[tuple[float, float]], sparsity: float) -> float:
    """Interpolate the KL at exactly the bytes.

    Raises:
        TdaError: No setting reads less, or none more.
    """
    found = kl_at(points, 1 - sparsity)
    if found is None:
        raise TdaError(f"{name}: no settings around {1 - sparsity:g} of the bytes were found. Give other --sparsity.")
    return found


def ratio(windows: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the geometric mean of windows / others, and the standard error of its logarithm."""
    logs = torch.tensor(windows, dtype=torch.float64).log() - torch.tensor(others, dtype=torch.float64).log()
    return [float(logs.mean().exp()), float(logs.std() / math.sqrt(len(logs))) if len(logs) > 1 else 0.0]


def drawn_together(row_prices: Mapping[str, torch.Tensor], power: float) -> dict[str, torch.Tensor]:
    """Draw the row prices of each matrix towards their geometric mean, weighted by themselves."""
    drawn = {}
    for name, prices in row_prices.items():
        own = prices.double().clamp_min(1e-300)
        mean = ((own * own.log()).sum(dim=1, keepdim=True) / own.sum(dim=1, keepdim=True)).exp()
        drawn[name] = (own**power * mean ** (1 - power)).float().where(prices > 0, 0)
    return drawn


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare row prices with TEAL, and prices that differ by token.")
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dataset", default=BUILTIN, help="The calibration's own.  [default: builtin]")
    parser.add_argument("--text", type=Path, required=True, help="Text to measure on.")
    parser.add_argument("--densities", type=Path, metavar="FILE", help="TEAL's greedy densities.")
    parser.add_argument("--probes", nargs="+", type=int, default=[], metavar="LAYER")
    parser.add_argument("--strength", nargs="+", type=float, default=[0.3, 0.45])
    parser.add_argument("--power", nargs="+", type=float, default=[1.0])
    parser.add_argument("--ridge", type=float, default=0.75, help="[default: 0.75]")
    parser.add_argument("--labels", type=int, default=2, help="Labels of each token.  [default: 2]")
    parser.add_argument("--sequences", type=int, default=32, help="Most sequences to sample.  [default: 32]")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--device", default="cpu", help="PyTorch's device.  [default: cpu]")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    return parser.parse_args()


def main() -> int:
    return print_rows(measured(arguments()), json.dumps)


if __name__ == "__main__":
    sys.exit(main())
