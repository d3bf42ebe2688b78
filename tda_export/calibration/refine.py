"""Refine prices of rows by the KL itself, at several shares of the bytes.

Prices estimate the KL near the dense point, one row at a time (`calibration.prices`). Where many rows are dropped, the
losses of rows are no longer independent. So the price of each row gets a factor that lowers

    KL(p) / KL_0(p) + slope * bytes(p),    averaged over a few prices p,

where KL_0 is the KL without factors and bytes the share of the linears' bytes that is read. `slope` is that of ln KL_0
by bytes, so that fewer bytes do not pay by themselves; each price also follows its share of the bytes.

Whether a token reads a row is a step in the row's factor, which has no gradient. Its surrogate (straight-through,
Bengio et al., arXiv 1308.3432) is the derivative of a logistic function of ln(worth / price): each row that is near the
border counts by g x, what reading it changes, and by its bytes. No weight changes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tda_export.calibration.divergence import mean_kl
from tda_export.calibration.price_table import RowPrices, choose_prices
from tda_export.calibration.prices import HALF_SCALE, SCALE_STEP, SMALLEST_SCALE, read_prompt
from tda_export.errors import TdaError
from tda_export.models.placement import weights_fetched_again
from tda_export.models.row_dropping import RowsRead, dropping
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, RowBytes, linear_outputs, linear_parts, linear_shape
from tda_export.progress import Advance
from tda_export.ranks import ALONE, Ranks
from tda_export.weights.plan import HEAD

LEVELS = (0.7, 0.6, 0.5, 0.42)  # shares of the bytes at which the KL counts
BATCH = 4  # sequences of a step
PROMPT_PART = 4  # prompts are this many times shorter than where prices are taken, so that more tokens count
REFERENCES = 4  # sequences that KL_0 is taken from
WIDTH = 0.5  # of the logistic function, in units of ln(worth)
RATE = 0.03  # Adam's step, in units of ln(factor); falls to 0
WARM_UP = 0.1  # the part of the steps in which it rises first
DECAYS, EPSILON = (0.9, 0.99), 1e-8  # Adam's
FOLLOW = 0.6  # change of ln(price) for each unit of bytes that a pass reads beyond its level's share
SAVE_SECONDS = 30.0  # least time between two saves
LEVEL_COLUMNS = 3


@dataclass
class Refinement:
    """Factors of the prices of one packing, by matrix, and where the search for them stands. All float64 on the CPU.

    `factors`: natural logarithms, [L, in]. `first`, `second`: Adam's moments, alike; empty once `step` is the last.
    `levels`: by level, [n, 3]: ln(price) now, KL_0, and the slope. n is 0 where rows have too few different worths to
    choose prices from; then factors stay 0.
    """

    factors: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    second: dict[str, torch.Tensor] = field(default_factory=dict)
    levels: torch.Tensor = field(default_factory=lambda: torch.zeros(0, LEVEL_COLUMNS, dtype=torch.float64))
    step: int = 0

    @property
    def under_way(self) -> bool:
        """Whether steps are left."""
        return bool(self.first)

    def apply(self, row_prices: RowPrices) -> dict[str, torch.Tensor]:
        """Return row prices [L, in] times their factors; those of the head have none."""
        return {
            name: (prices.double() * self.factors[name].exp()).float() if name in self.factors else prices
            for name, prices in row_prices.items()
        }


class _NearBorder(torch.autograd.Function):
    """Drop rows; the gradient of row prices is that of the surrogate."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, row_price: torch.Tensor, price: torch.Tensor, cost: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, rows, row_price, price)
        ctx.cost = cost
        return torch.where(rows, x, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, rows, row_price, price = ctx.saved_tensors
        safe = row_price.clamp_min(torch.finfo(torch.float32).tiny)
        worth = x.float().square() * safe
        near = torch.sigmoid((worth / price).clamp_min(1e-30).log() / WIDTH)
        near = near * (1 - near) / WIDTH
        change = (gradient.float() * x.float() + ctx.cost) * near
        own = (change.sum(dim=0) / safe).where(row_price > 0, 0)
        return torch.where(rows, gradient, 0), None, own, None, None


def refine(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    prompt_tokens: int,
    packing: Packing,
    row_prices: RowPrices,
    row_bytes: RowBytes,
    steps: int,
    *,
    seed: int,
    prefix_tokens: int = 0,
    resume: Refinement | None = None,
    save: Callable[[Refinement], None] = lambda refinement: None,
    advance: Advance = lambda units: None,
    ranks: Ranks = ALONE,
) -> Refinement:
    """Find factors of row prices in `steps` steps of `BATCH` sequences each.

    Args:
        model: A transformers model in evaluation mode, whose parameters need no gradient.
        spec: Its architecture.
        tokens: int64 [N, P + C], the sequences that the prices were taken from.
        prompt_tokens: P. A quarter of it is read densely here.
        packing: The packing of the row prices.
        row_prices: float32 [L, in] of each matrix; the head is read whole here.
        row_bytes: The bytes of rows.
        steps: The number of steps.
        seed: Of the order of sequences and levels.
        prefix_tokens: The number of tokens that the tokenizer puts before a text (BOS).
        resume: Where an interrupted search stood.
        save: Called with the current state from time to time.
        advance: Called with the number of sequences that were read.
        ranks: The ranks that share the sequences of a step.

    Raises:
        TdaError: Gradients are not finite.
    """
    own_prices = {name: value for name, value in row_prices.items() if name != HEAD}
    passes = _Passes(model, spec, own_prices, row_bytes, max(prompt_tokens // PROMPT_PART, prefix_tokens, 1))
    found = resume
    if found is None:
        chosen = choose_prices(
            model,
            spec,
            tokens[:REFERENCES],
            prompt_tokens,
            {packing: own_prices},
            row_bytes,
            ranks=ranks,
            shares=LEVELS,
        )[packing]
        found = _begin(passes, tokens[:REFERENCES], chosen, ranks)
    if not len(found.levels):
        advance(steps * BATCH)
        return found
    advance(found.step * BATCH)
    saved = time.monotonic()
    for step, batch in enumerate(_schedule(len(tokens), len(found.levels), steps, seed)):
        if step < found.step:
            continue
        levels = found.levels.clone()

        def take(
            item: tuple[int, int], together: int, levels: torch.Tensor = levels
        ) -> tuple[dict[str, torch.Tensor], float]:
            sequence, level = item
            return passes.gradients(tokens[sequence], found.factors, levels[level])

        gradients: dict[str, torch.Tensor] = {}
        for (_, level), (own, read) in zip(batch, ranks.in_order(batch, take), strict=True):
            for name, value in own.items():
                gradients[name] = gradients.get(name, 0) + value.double() / len(batch)
            found.levels[level, 0] += FOLLOW * (read - LEVELS[level])
            advance(1)
        _adam(found, gradients, steps)
        if time.monotonic() - saved >= SAVE_SECONDS:
            save(found)
            saved = time.monotonic()
    return Refinement(found.factors, levels=found.levels, step=steps)


def _schedule(sequences: int, levels: int, steps: int, seed: int) -> list[list[tuple[int, int]]]:
    """Return the sequence and level of each pass, by step. Every sequence comes before one comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * BATCH:
        order += torch.randperm(sequences, generator=generator).tolist()
    chosen = torch.randint(levels, (steps * BATCH,), generator=generator).tolist()
    pairs = list(zip(order, chosen, strict=False))
    return [pairs[at : at + BATCH] for at in range(0, steps * BATCH, BATCH)]


def _begin(passes: _Passes, tokens: torch.Tensor, prices: Sequence[float], ranks: Ranks) -> Refinement:
    """Measure KL_0 and bytes at the first prices."""
    factors = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in passes.row_prices.items()}
    if len(prices) < len(LEVELS):
        return Refinement(factors)

    def measure(sequence: torch.Tensor, together: int) -> list[tuple[float, float]]:
        return passes.measure(sequence, prices)

    of_sequences = torch.tensor(list(ranks.in_order(list(tokens), measure)), dtype=torch.float64)  # [n, levels, 2]
    kl, read = of_sequences.mean(dim=0).unbind(dim=1)
    if not (bool((kl > 0).all()) and bool(kl.isfinite().all()) and read[0] > read[-1]):
        return Refinement(factors)
    slope = (kl[-1] / kl[0]).log() / (read[0] - read[-1])
    logs = torch.tensor(prices, dtype=torch.float64).log()
    levels = torch.stack([logs, kl, slope.expand_as(kl)], dim=1)
    return Refinement(
        factors,
        {name: torch.zeros_like(value) for name, value in factors.items()},
        {name: torch.zeros_like(value) for name, value in factors.items()},
        levels,
    )


def _adam(found: Refinement, gradients: Mapping[str, torch.Tensor], steps: int) -> None:
    """Take one of Adam's steps (Kingma and Ba, arXiv 1412.6980)."""
    found.step += 1
    rate = RATE * min(1.0, found.step / (WARM_UP * steps)) * (1 - (found.step - 1) / steps)
    for name, gradient in gradients.items():
        first = found.first[name].lerp_(gradient, 1 - DECAYS[0])
        second = found.second[name].lerp_(gradient.square(), 1 - DECAYS[1])
        unbiased = [moment / (1 - decay**found.step) for moment, decay in zip((first, second), DECAYS, strict=True)]
        found.factors[name] -= rate * unbiased[0] / (unbiased[1].sqrt() + EPSILON)


class _Passes:
    """Reads sequences: a short prompt densely, and its continuation densely and with rows dropped."""

    def __init__(
        self, model: Any, spec: DecoderSpec, row_prices: RowPrices, row_bytes: RowBytes, prompt_tokens: int
    ) -> None:
        self.row_prices = row_prices
        self._model, self._spec, self._prompt = model, spec, prompt_tokens
        outputs = linear_outputs(spec)
        self._sizes = {
            part: torch.tensor(
                [row_bytes.of(layer, (part,), outputs) for layer in range(spec.num_layers)], dtype=torch.float64
            )
            for part in linear_parts(spec)
        }  # bytes of a row, [L]
        self._total = sum(float(own.sum()) * linear_shape(spec, part)[0] for part, own in self._sizes.items())

    def measure(self, sequence: torch.Tensor, prices: Sequence[float]) -> list[tuple[float, float]]:
        """Return the KL and the share of bytes of a sequence at each price."""
        cache = read_prompt(self._model, sequence[: self._prompt])
        found = []
        with torch.no_grad():
            dense = self._read(cache, sequence)
            for price in prices:
                with dropping(self._model, self._spec, self.row_prices, price) as count:
                    kl = float(mean_kl(dense, self._read(cache, sequence)))
                found.append((kl, self._share(count)))
        return found

    def gradients(
        self, sequence: torch.Tensor, factors: Mapping[str, torch.Tensor], level: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Return the gradient of a sequence's loss by each factor, float32 [L, in] on the CPU, and the share of bytes.

        Args:
            sequence: int64 [P + C].
            factors: As in `Refinement`.
            level: A row of `Refinement.levels`.
        """
        cache = read_prompt(self._model, sequence[: self._prompt])
        with torch.no_grad():
            dense = self._read(cache, sequence)
        price, reference, slope = level.tolist()
        scale = HALF_SCALE if self._model.dtype == torch.float16 else 1.0
        cost = slope / (len(sequence) - self._prompt) / self._total  # of a byte that one token reads
        while True:
            leaves = {name: value.float().to(self._model.device).requires_grad_() for name, value in factors.items()}
            own = {name: self.row_prices[name].to(leaf.device) * leaf.exp() for name, leaf in leaves.items()}

            def drop(
                x: torch.Tensor,
                rows: torch.Tensor,
                row_price: torch.Tensor,
                at: torch.Tensor,
                layer: int,
                parts: Sequence[str],
                scale: float = scale,
            ) -> torch.Tensor:
                row_bytes = sum(float(self._sizes[part][layer]) for part in parts)
                dropped: torch.Tensor = _NearBorder.apply(x, rows, row_price, at, scale * cost * row_bytes)
                return dropped

            with torch.enable_grad(), weights_fetched_again(self._model):
                with dropping(self._model, self._spec, own, math.exp(price), drop=drop) as count:
                    loss = mean_kl(dense, self._read(cache, sequence)) / reference
                found = torch.autograd.grad(loss * scale, list(leaves.values()))
            if all(bool(each.isfinite().all()) for each in found):
                return {n: (g / scale).cpu() for n, g in zip(leaves, found, strict=True)}, self._share(count)
            scale /= SCALE_STEP
            if self._model.dtype != torch.float16 or scale < SMALLEST_SCALE:
                raise TdaError("Gradients are not finite. Calibrate with --dtype bf16 or fp32.")

    def _read(self, cache: Any, sequence: torch.Tensor) -> torch.Tensor:
        tokens = sequence[None, self._prompt :].to(self._model.device)
        logits = self._model(tokens, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
        log_probs: torch.Tensor = logits.float().log_softmax(dim=-1)
        return log_probs

    def _share(self, count: RowsRead) -> float:
        read = sum(float(own.cpu() @ self._sizes[part]) for part, own in count.read.items())
        return read / count.tokens / self._total
