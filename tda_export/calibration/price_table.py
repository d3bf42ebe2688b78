"""Measure what about ten prices save and cost, on sequences that no price was taken from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.divergence import agreement, mean_kl
from tda_export.calibration.magnitudes import ALL_BINS, bin_edges, float_bins
from tda_export.calibration.prices import read_prompt
from tda_export.errors import TdaError
from tda_export.models.linear_modules import watch_sites
from tda_export.models.row_dropping import dropping
from tda_export.models.spec import DecoderSpec
from tda_export.packing import (
    ATTENTION_PARTS,
    Packing,
    RowBytes,
    linear_outputs,
    linear_parts,
    linear_sites,
    packed_matrices,
)
from tda_export.pricing import PriceRow, PriceTable, ShortPrompts
from tda_export.progress import Advance
from tda_export.ranks import ALONE, Ranks
from tda_export.weights.plan import HEAD

SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.3)  # of what dense reads: targets of the prices
SCAN_SEQUENCES = 4  # the number of sequences on whose inputs the prices are chosen
SHORT_SEQUENCES = 8  # the number of sequences measured after a short prompt too
SHORT_PART = 8  # a short prompt is this many times shorter

LinearShapes = Mapping[str, tuple[int, int]]  # input channels and outputs by part
RowPrices = Mapping[str, torch.Tensor]


def choose_prices(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    prompt_tokens: int,
    row_prices: Mapping[Packing, RowPrices],
    row_bytes: RowBytes,
    advance: Advance = lambda units: None,
    ranks: Ranks = ALONE,
    shares: tuple[float, ...] | None = None,
) -> dict[Packing, list[float]]:
    """Choose the prices to measure: those at which the dense model's inputs would read shares of what dense reads.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        tokens: int64 [N, P + C].
        prompt_tokens: P.
        row_prices: float32 [L, in] of each matrix, for each packing; the head's do not count.
        row_bytes: The bytes of rows.
        advance: Called after every sequence.
        ranks: The ranks that share the sequences.
        shares: Falling; None for `SHARES`. Prices are fewer where two shares need the same one.

    Raises:
        TdaError: No row is worth anything.
    """
    names = {packing: _by_site(spec, packing) for packing in row_prices}
    outputs = linear_outputs(spec)
    on_device = {p: {name: value.to(model.device) for name, value in of.items()} for p, of in row_prices.items()}

    def scan(sequence: torch.Tensor, together: int) -> dict[Packing, torch.Tensor]:
        worth = {name: torch.zeros(ALL_BINS, dtype=torch.float64, device=model.device) for name in row_prices}

        def observe(layer: int, site: str, x: torch.Tensor) -> None:
            square = x.float().square()
            for packing, found in worth.items():
                for name, parts in names[packing][site].items():
                    bins = float_bins(square * on_device[packing][name][layer].to(x.device)).flatten()
                    count = torch.bincount(bins, minlength=ALL_BINS).to(found.device)
                    found.add_(count, alpha=row_bytes.of(layer, parts, outputs))

        cache = read_prompt(model, sequence[:prompt_tokens])
        with torch.no_grad(), watch_sites(model, spec, observe):
            continuation = sequence[None, prompt_tokens:].to(model.device)
            model(continuation, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return {packing: found.cpu() for packing, found in worth.items()}

    bytes_worth = {packing: torch.zeros(ALL_BINS, dtype=torch.float64) for packing in row_prices}
    for found in ranks.in_order(list(tokens), scan):
        for packing, worth in found.items():
            bytes_worth[packing] += worth
        advance(1)
    prices = {packing: prices_at(found, shares or SHARES) for packing, found in bytes_worth.items()}
    if not all(prices.values()):
        raise TdaError(
            "All rows have the price 0: the model's output does not depend on its layers. Check the checkpoint."
        )
    return prices


def prices_at(bytes_worth: torch.Tensor, shares: tuple[float, ...]) -> list[float]:
    """Find prices in a histogram, strictly rising.

    Args:
        bytes_worth: The bytes of rows by the bin of their worth, x² · row_price: float64 [ALL_BINS].
        shares: Shares of the bytes with a nonzero worth, falling.
    """
    worth = bytes_worth.clone()
    worth[0] = 0.0
    read = worth.flip(0).cumsum(0).flip(0)  # bytes read at the lower edge of each bin
    edges = bin_edges().double()
    prices: list[float] = []
    if read[0] == 0:
        return prices
    for share in shares:
        inside = (
            min(int((read >= share * read[0]).sum()), len(edges) - 1) - 1
        )  # the last bin whose lower edge still reads enough bytes
        part = (read[inside] - share * read[0]) / worth[inside].clamp_min(1e-300)
        price = float(edges[inside] + part.clamp(0, 1) * (edges[inside + 1] - edges[inside]))
        if 0 < price < math.inf and (not prices or price > prices[-1]):
            prices.append(price)
    return prices


@dataclass
class Measured:
    """The measurements at the A prices of one packing, on the CPU. Row 0 is dense.

    `prices`: float64 [A], the first 0. `kl` and `agreement`: float64 [n, A], of the n sequences so far. `read`: the
    number of rows that tokens read, by part, float64 [A, L], and of a head with prices, [A, 1], summed over `tokens`
    tokens. `short_kl`: the KL of the
    first m sequences after a short prompt, float64 [m, A], m at most n.
    """

    prices: torch.Tensor
    kl: torch.Tensor
    agreement: torch.Tensor
    read: dict[str, torch.Tensor]
    tokens: int = 0
    short_kl: torch.Tensor | None = None

    @classmethod
    def begin(cls, spec: DecoderSpec, prices: list[float], *, head: bool = False) -> Measured:
        """Return an empty measurement; dense is put before the prices. `head`: whether the head's rows have prices."""
        rows = torch.tensor([0.0, *prices], dtype=torch.float64)
        layers = dict.fromkeys(linear_parts(spec), spec.num_layers) | ({HEAD: 1} if head else {})
        read = {part: torch.zeros(len(rows), size, dtype=torch.float64) for part, size in layers.items()}
        return cls(rows, torch.zeros(0, len(rows), dtype=torch.float64), rows.new_zeros(0, len(rows)), read)

    def empty(self) -> Measured:
        """Return the same prices with nothing measured."""
        none = self.kl.new_zeros(0, len(self.prices))
        return Measured(self.prices, none, none, {part: torch.zeros_like(rows) for part, rows in self.read.items()})

    def add(self, other: Measured) -> None:
        """Add the measurements of further sequences at the same prices."""
        self.kl = torch.cat([self.kl, other.kl])
        self.agreement = torch.cat([self.agreement, other.agreement])
        for part, rows in other.read.items():
            self.read[part] += rows
        self.tokens += other.tokens
        if other.short_kl is not None:
            self.short_kl = other.short_kl if self.short_kl is None else torch.cat([self.short_kl, other.short_kl])

    def measured_short(self, short: bool) -> bool:
        """Return whether every sequence so far that should be measured after a short prompt has been.

        Args:
            short: Whether there are short prompts; no sequence is measured after one otherwise.
        """
        found = 0 if self.short_kl is None else len(self.short_kl)
        return found == (min(len(self.kl), SHORT_SEQUENCES) if short else 0)

    def densities(self, linears: LinearShapes) -> dict[str, torch.Tensor]:
        """Return the mean share of rows that a token reads, by part, float64 [A, L]."""
        return {part: read / (self.tokens * linears[part][0]) for part, read in self.read.items()}

    def table(
        self,
        linears: LinearShapes,
        packing: Packing,
        row_bytes: RowBytes,
        continuation_tokens: int,
        prompts: tuple[int, int] | None = None,
    ) -> PriceTable:
        """Return the table. Standard errors are over sequences, 0 for a single one.

        Args:
            linears: Input channels and outputs of each part.
            packing: The packing that was measured.
            row_bytes: The bytes of the rows that these prices are for.
            continuation_tokens: C.
            prompts: The tokens of a short prompt and of the others, where some sequences were measured after a short
                one.
        """
        count = len(self.kl)
        error = self.kl.std(dim=0) / math.sqrt(count) if count > 1 else torch.zeros_like(self.kl[0])
        densities = self.densities(linears)
        parts = {part: density.mean(dim=1) for part, density in densities.items()}  # [A]
        outputs = {part: shape[1] for part, shape in linears.items()}
        sizes = {
            part: torch.tensor(
                [linears[part][0] * row_bytes.of(layer, (part,), outputs) for layer in range(density.shape[1])],
                dtype=torch.float64,
            )
            for part, density in densities.items()
        }  # [L]
        ffn = _share(sizes, densities, [part for part in linears if part not in (*ATTENTION_PARTS, HEAD)])
        attention = _share(sizes, densities, ATTENTION_PARTS)
        share = _share(sizes, densities, [part for part in linears if part != HEAD])
        rows = [
            PriceRow(
                price=float(price),
                share=float(share[i]),
                ffn_share=float(ffn[i]),
                attention_share=float(attention[i]),
                parts={part: float(density[i]) for part, density in parts.items()},
                # Between logits that are equal except for rounding, the KL may be below 0.
                kl=max(0.0, float(self.kl[:, i].mean())),
                kl_stderr=float(error[i]),
                agreement=float(self.agreement[:, i].mean()),
            )
            for i, price in enumerate(self.prices)
        ]
        short = None if prompts is None or self.short_kl is None else self._short(*prompts)
        return PriceTable(packing, row_bytes.element_bytes, continuation_tokens, tuple(rows), row_bytes.label, short)

    def _short(self, prompt_tokens: int, table_prompt_tokens: int) -> ShortPrompts:
        """Return the KL of all sequences after short prompts: their KL times the ratio on the sequences measured both
        ways."""
        assert self.short_kl is not None
        short, usual = self.short_kl[: len(self.kl)], self.kl.mean(dim=0)
        own = self.kl[: len(short)]
        usable = own.mean(dim=0) > 0
        base = own.mean(dim=0).where(usable, torch.ones_like(usual))
        factor = (short.mean(dim=0) / base).clamp_min(0.0).where(usable, torch.ones_like(usual))
        error = torch.zeros_like(usual)
        if len(short) > 1:  # combines the errors of the ratio and of what it multiplies
            ratio = (short - factor * own).std(dim=0) / base / math.sqrt(len(short))
            whole = self.kl.std(dim=0) / math.sqrt(len(self.kl))
            error = ((ratio * usual).square() + (factor * whole).square()).sqrt().where(usable, error)
        kl = (factor * usual).clamp_min(0.0)
        return ShortPrompts(prompt_tokens, table_prompt_tokens, tuple(kl.tolist()), tuple(error.tolist()))


def measure_sequence(
    model: Any,
    spec: DecoderSpec,
    sequence: torch.Tensor,
    prompt_tokens: int,
    row_prices: Mapping[Packing, RowPrices],
    measured: Mapping[Packing, Measured],
    advance: Advance = lambda units: None,
) -> None:
    """Measure every price of every packing on one sequence, and add it to `measured`.

    The prompt is read densely. Its continuation is read densely and at every price over the prompt's keys and values,
    in one call each, so a token attends to continuation tokens that were read at the same price.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        sequence: int64 [P + C].
        prompt_tokens: P.
        row_prices: float32 [L, in] of each matrix, and of a head with prices, [1, in], for each packing.
        measured: The measurements of each packing. They change only when all are measured, so that an interruption
            leaves no partial counts.
        advance: Called after every pass over the continuation.

    Raises:
        TdaError: A KL is not finite.
    """
    cache = read_prompt(model, sequence[:prompt_tokens])
    continuation = sequence[None, prompt_tokens:].to(model.device)

    def read(prices: RowPrices, price: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad(), dropping(model, spec, prices, price) as count:
            logits = model(continuation, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
            return logits.float().log_softmax(dim=-1), {part: rows.cpu() for part, rows in count.read.items()}

    # The head's rows are counted where it has prices; all others always are.
    dense, dense_read = read({n: v for n, v in next(iter(row_prices.values())).items() if n == HEAD}, 0.0)
    advance(1)
    found: dict[Packing, Measured] = {}
    for packing, table in measured.items():
        kl, agreeing, rows = [0.0], [1.0], [dense_read]
        for price in table.prices[1:].tolist():
            sparse, sparse_read = read(row_prices[packing], price)
            kl.append(float(mean_kl(dense, sparse)))
            if not math.isfinite(kl[-1]):
                raise TdaError("Logits are not finite. Calibrate with --dtype bf16 or fp32.")
            agreeing.append(agreement(dense, sparse))
            rows.append(sparse_read)
            advance(1)
        found[packing] = Measured(
            table.prices,
            torch.tensor([kl], dtype=torch.float64),
            torch.tensor([agreeing], dtype=torch.float64),
            {part: torch.stack([row[part] for row in rows]) for part in table.read},
            continuation.shape[1],
        )
    for packing, of_sequence in found.items():
        measured[packing].add(of_sequence)


def short_prompt(prompt_tokens: int, prefix_tokens: int = 0) -> int | None:
    """Return the length of the short prompt for prompts of `prompt_tokens`; None where nothing would be left.

    Args:
        prompt_tokens: P.
        prefix_tokens: The number of tokens that the tokenizer puts before a text (BOS), which a short prompt keeps.
    """
    length = prompt_tokens // SHORT_PART
    return length if length > prefix_tokens else None


def shortened(sequence: torch.Tensor, length: int, prefix_tokens: int) -> torch.Tensor:
    """Return the tokenizer's prefix followed by the end of a sequence, int64 [length]."""
    kept = sequence[len(sequence) - length + prefix_tokens :]
    return torch.cat([sequence[:prefix_tokens], kept])


def _share(
    sizes: Mapping[str, torch.Tensor], densities: Mapping[str, torch.Tensor], parts: Iterable[str]
) -> torch.Tensor:
    """Return the share of these parts' bytes that is read, [A], from the shares of their rows, [A, L]."""
    chosen = list(parts)
    read = torch.stack([densities[part] @ sizes[part] for part in chosen]).sum(dim=0)
    return (read / torch.stack([sizes[part].sum() for part in chosen]).sum()).clamp(0.0, 1.0)


def _by_site(spec: DecoderSpec, packing: Packing) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the matrices of each site."""
    matrices = packed_matrices(spec, packing)
    return {
        site: {name: members for name, members in matrices.items() if set(members) <= set(parts)}
        for site, parts in linear_sites(spec).items()
    }
