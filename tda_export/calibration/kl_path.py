"""Allocation by KL: a path of settings from nearly dense to sparse. Along it, bytes have the same price in every layer.

The path starts with every neuron and lowers the budget of FFN bytes step by step. At each step one batch of sequences
gives the price of each layer's mask and token threshold (`marginals.price`); densities with a high price grow, the
others shrink, and all are scaled to the step's budget. So a single sweep gives the allocation of every budget, and
takes the interaction of layers into account, which single-layer sensitivities do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.dense import Blended, DenseSequence
from tda_export.calibration.marginals import (
    BAND,
    Densities,
    EstimateHistogram,
    Level,
    Neighbours,
    price,
    score_thresholds,
)
from tda_export.calibration.masked import LayerRun, choose_masking, down_weights, masked_kl, two_level_ffn
from tda_export.models.spec import DecoderSpec
from tda_export.ranks import ALONE, Ranks

FIRST_SHARE, LAST_SHARE = 0.85, 0.19  # of FFN bytes
FIRST_MASK = 0.97  # mask density of the first share; prices nearer to dense are noise
WARM_UP = 6  # steps at the first share, while prices settle
STEPS = 26  # steps from the first share to the last
RATE = 0.3  # step of the logarithm of a density whose price is twice the typical one
MEMORY = 0.8  # weight of earlier prices in the average with a step's
HISTOGRAM_MEMORY = 0.5
WIDEST = 3.0  # prices are clamped to this many times the typical one
SMALLEST_DENSITY = 0.005


@dataclass
class PathState:
    """The state of a sweep: all that the next step needs, and the densities of every step so far ([steps, L])."""

    step: int
    densities: Densities
    token_thresholds: torch.Tensor  # float32 [L]
    histogram: EstimateHistogram
    prices: torch.Tensor  # float32 [2, L], relative, averaged; empty before the first step
    mask_densities: list[torch.Tensor]
    token_densities: list[torch.Tensor]

    def to(self, device: torch.device) -> PathState:
        """Return the state on a device."""
        return PathState(
            self.step,
            Densities(self.densities.mask.to(device), self.densities.token.to(device)),
            self.token_thresholds.to(device),
            self.histogram.to(device),
            self.prices.to(device),
            [value.to(device) for value in self.mask_densities],
            [value.to(device) for value in self.token_densities],
        )


def share_of_step(step: int) -> float:
    """Return a step's target share of FFN bytes."""
    progress = min(max(step - WARM_UP, 0) / (STEPS - 1), 1.0)
    return FIRST_SHARE * math.exp(progress * math.log(LAST_SHARE / FIRST_SHARE))


class PathSearch:
    """The sweep, which takes a batch of sequences per step."""

    def __init__(
        self,
        model: Any,
        spec: DecoderSpec,
        sequences: list[DenseSequence],
        blended: list[Blended],
        scale: torch.Tensor,
        batch: int,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """Prepare the search.

        Args:
            model: A transformers model in evaluation mode, whose weights need no gradient.
            spec: Its architecture.
            sequences: The sequences that the allocation is fitted on.
            blended: Their statistics with the prior.
            scale: Neuron scales, float32 [L, F].
            batch: The number of sequences of one step.
            seed: The seed of the sequences' order.
            ranks: The ranks that share the sequences of a step.
        """
        self._ranks = ranks
        self._model, self._spec, self._scale = model, spec, scale
        self._sequences, self._blended = sequences, blended
        self._down, self._matrices = down_weights(model, spec), len(spec.ffn_parts)
        self._batch = min(batch, len(sequences))
        generator = torch.Generator().manual_seed(seed)
        needed = (WARM_UP + STEPS + 1) * self._batch
        order: list[int] = []
        while len(order) < needed:
            order += torch.randperm(len(sequences), generator=generator).tolist()
        self._order = order

    def start(self) -> PathState:
        """Return the state before the first step: every layer alike, with token thresholds from one batch."""
        layers, device = self._spec.num_layers, self._scale.device
        densities = Densities(
            torch.full((layers,), FIRST_MASK, device=device),
            torch.full((layers,), (self._matrices * FIRST_SHARE - FIRST_MASK) / (self._matrices - 1), device=device),
        )
        state = PathState(0, densities, torch.zeros(layers, device=device), self._histogram(), torch.empty(0), [], [])
        level = Level(score_thresholds(self._blended, densities.mask), state.token_thresholds)
        collect_estimates(
            self._model,
            self._spec,
            *self._draw(0),
            level,
            self._scale,
            self._down,
            state.histogram,
            ranks=self._ranks,
        )
        state.token_thresholds = state.histogram.thresholds(densities.token)
        return state

    def _histogram(self) -> EstimateHistogram:
        return EstimateHistogram(self._spec.num_layers, self._scale.device)

    def _draw(self, step: int) -> tuple[list[DenseSequence], list[Blended]]:
        indices = self._order[step * self._batch : (step + 1) * self._batch]
        return [self._sequences[i] for i in indices], [self._blended[i] for i in indices]

    def advance(self, state: PathState) -> None:
        """Take one step: price the current densities, and move them to the step's budget."""
        densities = state.densities
        level = Level(score_thresholds(self._blended, densities.mask), state.token_thresholds)
        wider = Densities((densities.mask * (1 + BAND)).clamp_max(1.0), densities.token * (1 + BAND))
        narrower = Densities(densities.mask * (1 - BAND), densities.token * (1 - BAND))
        neighbours = Neighbours(
            *(
                Level(score_thresholds(self._blended, side.mask), state.histogram.thresholds(side.token))
                for side in (wider, narrower)
            )
        )
        state.histogram.fade(HISTOGRAM_MEMORY)
        found = price(
            self._model,
            self._spec,
            *self._draw(state.step),
            level,
            neighbours,
            self._scale,
            self._down,
            state.histogram,
            self._ranks,
        )
        state.prices = remember(state.prices, torch.stack([found.mask, found.token]))
        state.densities = move(densities, state.prices, share_of_step(state.step), self._matrices)
        state.token_thresholds = state.histogram.thresholds(state.densities.token)
        state.mask_densities.append(state.densities.mask)
        state.token_densities.append(state.densities.token)
        state.step += 1


def remember(earlier: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Average a step's prices, relative to their mean, with earlier ones.

    An unknown price (its band was empty, or float16 overflowed) stays as it was; at first it is the mean. All prices
    stay where none is positive. A negative price is noise: it counts by at most `WIDEST` times the mean.

    Args:
        earlier: float32 [2, L], or empty.
        found: The prices of a step, float32 [2, L].
    """
    known = found.isfinite()
    mean = torch.where(known, found, 0.0).clamp_min(0).sum() / known.sum().clamp_min(1)
    before = earlier if len(earlier) else torch.ones_like(found)
    relative = torch.where(known & (mean > 0), (found / mean).clamp_min(-WIDEST), before)
    return MEMORY * earlier + (1 - MEMORY) * relative if len(earlier) else relative


def move(densities: Densities, prices: torch.Tensor, share: float, matrices: int) -> Densities:
    """Move densities by their prices, and scale them to a share of FFN bytes.

    Args:
        densities: The current densities.
        prices: The prices of mask and token thresholds, float32 [2, L].
        share: The target share of FFN bytes, in (0, 1].
        matrices: The number of matrices of the FFN.
    """
    positive = prices.clamp_min(0)
    typical = torch.where(positive.median() > 0, positive.median(), positive.mean()).clamp_min(1e-12)
    # Linear in the price, as exponentiated gradient is, so that its noise averages out over steps.
    push = torch.exp(RATE * ((prices / typical).clamp(-1.0, WIDEST) - 1.0))  # [2, L]
    return scale_to(Densities(densities.mask * push[0], densities.token * push[1]), share, matrices)


def scale_to(densities: Densities, share: float, matrices: int) -> Densities:
    """Multiply all densities by one factor, within their bounds, so that they read a given share of the FFN's bytes."""

    def scaled(factor: float) -> Densities:
        mask = (densities.mask * factor).clamp(SMALLEST_DENSITY, 1.0)
        return Densities(mask, torch.minimum((densities.token * factor).clamp_min(SMALLEST_DENSITY), mask))

    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        if scaled(middle).ffn_share(matrices) > share:
            high = middle
        else:
            low = middle
    return scaled(math.sqrt(low * high))


def densities_at(state: PathState, share: float, matrices: int) -> Densities:
    """Return the path's densities at a share of FFN bytes, smoothed over the three nearest steps."""
    steps = range(WARM_UP, len(state.mask_densities))
    nearest = sorted(steps, key=lambda step: abs(math.log(share_of_step(step) / share)))[:3]
    mask = torch.stack([state.mask_densities[step] for step in nearest]).log().mean(dim=0).exp()
    token = torch.stack([state.token_densities[step] for step in nearest]).log().mean(dim=0).exp()
    return scale_to(Densities(mask, token), share, matrices)


def collect_estimates(
    model: Any,
    spec: DecoderSpec,
    sequences: list[DenseSequence],
    blended: list[Blended],
    level: Level,
    scale: torch.Tensor,
    down: list[torch.Tensor],
    histogram: EstimateHistogram,
    advance: Callable[[int], None] = lambda units: None,
    ranks: Ranks = ALONE,
) -> None:
    """Run sequences at a setting and add the estimates of their masks' neurons to a histogram."""

    def run(case: tuple[DenseSequence, Blended], together: int) -> EstimateHistogram:
        sequence, statistics = case
        masking = choose_masking(down, statistics, level.score_square, level.token, scale)
        found = histogram.empty()

        def add(layer: int, run: LayerRun) -> None:
            found.add(layer, run.estimates, masking.keep[layer])

        with torch.no_grad(), two_level_ffn(model, spec, masking, add):
            masked_kl(model, sequence)
        return found.to("cpu")

    for found in ranks.in_order(list(zip(sequences, blended, strict=True)), run):
        histogram.merge(found)
        advance(1)
