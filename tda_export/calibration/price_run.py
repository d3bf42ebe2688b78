"""The calibration of priced rows: half of the sequences give prices; the cost of prices is measured on the other
half."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tda_export.calibration.magnitudes import MagnitudeCounter, Magnitudes, no_magnitudes
from tda_export.calibration.price_file import Priced
from tda_export.calibration.price_table import (
    SCAN_SEQUENCES,
    SHARES,
    SHORT_SEQUENCES,
    Measured,
    choose_prices,
    measure_sequence,
    short_prompt,
    shortened,
)
from tda_export.calibration.prices import PriceSums, no_prices, price_continuation, read_prompt, sampled_labels
from tda_export.calibration.refine import BATCH, Refinement, refine
from tda_export.errors import UsageError
from tda_export.models.linear_modules import watch_sites
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, RowBytes, linear_parts, linear_shape
from tda_export.progress import Advance
from tda_export.ranks import ALONE, Ranks
from tda_export.weights.plan import HEAD

SAVE_SECONDS = 5.0  # least time between two saves of prices

Show = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class PriceSettings:
    """How prices are taken: the number of labels of each token, the seed that they are drawn with, and what is
    measured.

    `prefix_tokens`: the number of tokens that the tokenizer puts before a text (BOS). `head`: whether the head's rows
    get prices too. `refine_steps`: steps by the KL itself, 0 for prices as estimated.
    """

    prompt_tokens: int
    labels: int
    seed: int
    packings: Sequence[Packing]
    prefix_tokens: int = 0
    head: bool = False
    refine_steps: int = 0

    @property
    def prompts(self) -> tuple[int, int] | None:
        """The tokens of a short prompt and of the others; None where no prompt can be short."""
        short = short_prompt(self.prompt_tokens, self.prefix_tokens)
        return None if short is None else (short, self.prompt_tokens)


def begin_priced(
    spec: DecoderSpec,
    settings: PriceSettings,
    norms: dict[str, torch.Tensor],
    row_bytes: RowBytes,
    continuation_tokens: int,
) -> Priced:
    """Return empty prices of a model, before any work."""
    parts = (*linear_parts(spec), HEAD) if settings.head else linear_parts(spec)
    linears = {part: linear_shape(spec, part) for part in parts}
    sums, magnitudes = no_prices(spec, head=settings.head), no_magnitudes(spec)
    return Priced(linears, sums, magnitudes, norms, row_bytes, continuation_tokens, prompts=settings.prompts)


def check_sequences(count: int) -> None:
    """Refuse too few sequences.

    Raises:
        UsageError: There are fewer than two.
    """
    if count < 2:
        raise UsageError(
            f"Half of the sequences give prices and the others measure their loss, and {count} is too few for "
            "that. Give --sequences 2 or more and text for them."
        )


def price_rows(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    settings: PriceSettings,
    begun: Priced,
    *,
    show: Show,
    resume: Priced | None = None,
    save: Callable[[Priced], None] = lambda priced: None,
    ranks: Ranks = ALONE,
) -> Priced:
    """Take prices from the even sequences and measure tables on the odd ones, the first of which also after a short
    prompt.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        tokens: int64 [N, P + C], N at least 2.
        settings: How to take prices.
        begun: The result of `begin_priced`.
        show: Opens the progress display of a step, given its description and number of units.
        resume: The state of an interrupted run.
        save: Called with the current state from time to time, and after each measured sequence.
        ranks: The ranks that share the sequences.
    """
    model.requires_grad_(False)
    priced = resume or begun
    half = len(tokens[::2])
    if int(priced.sums.sequences) < half:
        with show("Pricing", half) as advance:
            priced = _take_prices(model, spec, tokens[::2], settings, priced, advance, save, ranks)
        save(priced)
    if settings.refine_steps:
        _refine(model, spec, tokens[::2], settings, priced, show, save, ranks)
    row_prices = {packing: priced.row_prices(spec, packing) for packing in settings.packings}
    scanned = tokens[::2][:SCAN_SEQUENCES]
    passes = 1 + len(SHARES) * len(settings.packings)
    prompt, prefix = settings.prompt_tokens, settings.prefix_tokens
    shorter = 0 if priced.prompts is None else min(SHORT_SEQUENCES, len(tokens[1::2]))
    with show("Measuring prices", len(scanned) + passes * (len(tokens[1::2]) + shorter)) as advance:
        if not priced.measured:
            chosen = choose_prices(model, spec, scanned, prompt, row_prices, priced.row_bytes, advance, ranks)
            priced = replace(priced, measured=_nothing_measured(spec, settings, chosen))
            save(priced)
        else:
            advance(len(scanned))
        done = min(len(measured.kl) for measured in priced.measured.values())
        advance((done + min(done, shorter)) * passes)
        left_out = passes - sum(len(measured.prices) for measured in priced.measured.values()) + len(row_prices) - 1

        def measure_after(length: int, sequence: torch.Tensor, together: int) -> dict[Packing, Measured]:
            found = {packing: measured.empty() for packing, measured in priced.measured.items()}
            measure_sequence(model, spec, sequence, length, row_prices, found, lambda units: advance(units * together))
            advance(left_out * together)
            return found

        def measure(item: tuple[int, torch.Tensor], together: int) -> dict[Packing, Measured]:
            index, sequence = item
            own = measure_after(prompt, sequence, together)
            if priced.prompts is not None and index < shorter:
                short = priced.prompts[0]
                end = shortened(sequence, len(sequence) - prompt + short, prefix)
                for packing, found in measure_after(short, end, together).items():
                    own[packing].short_kl = found.kl
            return own

        for found in ranks.in_order(list(enumerate(tokens[1::2]))[done:], measure):
            for packing, of_sequence in found.items():
                priced.measured[packing].add(of_sequence)
            save(priced)
    return priced


def _refine(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    settings: PriceSettings,
    priced: Priced,
    show: Show,
    save: Callable[[Priced], None],
    ranks: Ranks,
) -> None:
    """Refine the prices of every packing, in `priced`."""
    with show("Refining prices", settings.refine_steps * BATCH * len(settings.packings)) as advance:
        for packing in settings.packings:
            earlier = priced.refined.get(packing)
            if earlier is not None and not earlier.under_way:
                advance(settings.refine_steps * BATCH)
                continue

            def keep(refinement: Refinement, packing: Packing = packing) -> None:
                priced.refined[packing] = refinement
                save(priced)

            found = refine(
                model,
                spec,
                tokens,
                settings.prompt_tokens,
                packing,
                priced.sums.row_prices(spec, packing, priced.row_bytes),
                priced.row_bytes,
                settings.refine_steps,
                seed=settings.seed,
                prefix_tokens=settings.prefix_tokens,
                resume=earlier,
                save=keep,
                advance=advance,
                ranks=ranks,
            )
            keep(found)


def _nothing_measured(
    spec: DecoderSpec, settings: PriceSettings, prices: Mapping[Packing, list[float]]
) -> dict[Packing, Measured]:
    return {packing: Measured.begin(spec, of, head=settings.head) for packing, of in prices.items()}


def _take_prices(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    settings: PriceSettings,
    priced: Priced,
    advance: Advance,
    save: Callable[[Priced], None],
    ranks: Ranks,
) -> Priced:
    done = int(priced.sums.sequences)
    advance(done)
    saved = time.monotonic()
    norms = {name: value.to(model.device) for name, value in priced.norms.items()}

    def take(item: tuple[int, torch.Tensor], together: int) -> tuple[PriceSums, Magnitudes]:
        index, sequence = item
        cache = read_prompt(model, sequence[: settings.prompt_tokens])
        counter = MagnitudeCounter(spec, norms)
        # The sequence's number in the corpus; these are the even ones.
        choose = sampled_labels(settings.labels, settings.seed, 2 * index)
        with watch_sites(model, spec, counter.observe):
            rest = sequence[settings.prompt_tokens :]
            found = price_continuation(model, spec, cache, rest, choose, head=settings.head)
        return found, counter.counts

    for sums, magnitudes in ranks.in_order(list(enumerate(tokens))[done:], take):
        priced = replace(priced, sums=priced.sums + sums, magnitudes=priced.magnitudes + magnitudes)
        advance(1)
        if time.monotonic() - saved >= SAVE_SECONDS:
            save(priced)
            saved = time.monotonic()
    return priced
