"""The marginal cost of dropping more: the slope of the KL divergence in every density, from one backward pass.

With y = W_down (h * kept), the gradient of KL with respect to the kept activations gives, to first order, the cost of
dropping each neuron for each token: - (dKL / d used_i(t)) h_i(t). Summed over the neurons that the next higher
threshold would drop (a band), and divided by the bytes that they read, it is the price of that layer's threshold. At
the best allocation of a byte budget all prices are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.calibration.dense import Blended, DenseSequence
from tda_export.calibration.masked import LayerRun, Masking, choose_masking, masked_kl, two_level_ffn
from tda_export.ffn_share import two_level_share
from tda_export.models.spec import DecoderSpec
from tda_export.ranks import ALONE, Ranks

BAND = 0.08  # width of the priced band of neurons on either side of a threshold, as a share of the kept ones
BINS = 4096
GRADIENT_SCALE = 4096.0  # keeps gradients of float16 models from underflowing; harmless for other dtypes
SMALLEST, LARGEST = 1e-12, 1e6  # range of estimates; bins are 1 % wide


@dataclass(frozen=True)
class Densities:
    """Shares of neurons, float32 [L]: those in the prompt mask (gate rows read), and those that a token does not skip
    (up and down rows read)."""

    mask: torch.Tensor
    token: torch.Tensor

    def ffn_share(self, matrices: int) -> float:
        """Return the share of the FFN's bytes that is read; `matrices` is the number of matrices of the FFN."""
        return float(two_level_share(self.mask, self.token, matrices).mean())


class EstimateHistogram:
    """A histogram by layer of the estimates of the prompt mask's neurons, which gives a token threshold for a
    density."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.edges = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), BINS - 1, device=device)
        self.counts = torch.zeros(layers, BINS, dtype=torch.float64, device=device)
        self.total = torch.zeros(layers, dtype=torch.float64, device=device)  # neurons and tokens, masked or not

    def add(self, layer: int, estimates: torch.Tensor, keep: torch.Tensor) -> None:
        """Add the estimates [T, F] of the neurons in a prompt mask [F]."""
        bins = torch.searchsorted(self.edges, estimates[:, keep].contiguous(), right=True)
        self.counts[layer] += torch.bincount(bins.reshape(-1), minlength=BINS)
        self.total[layer] += estimates.numel()

    def empty(self) -> EstimateHistogram:
        """Return an empty histogram on the same device."""
        return EstimateHistogram(len(self.counts), self.counts.device)

    def to(self, device: torch.device | str) -> EstimateHistogram:
        """Return the histogram on a device."""
        moved = EstimateHistogram(len(self.counts), torch.device(device))
        moved.counts, moved.total = self.counts.to(device), self.total.to(device)
        return moved

    def merge(self, other: EstimateHistogram) -> None:
        """Add the estimates of another histogram, on any device."""
        self.counts += other.counts.to(self.counts.device)
        self.total += other.total.to(self.total.device)

    def fade(self, weight: float) -> None:
        """Reduce the weight of the estimates so far."""
        self.counts *= weight
        self.total *= weight

    def thresholds(self, density: torch.Tensor) -> torch.Tensor:
        """Choose the thresholds [L] that the given shares [L] of all neurons reach; 0 where the mask holds no more
        neurons."""
        reached = self.counts.flip(1).cumsum(1).flip(1) / self.total.clamp_min(1)[:, None]  # [L, BINS], descending
        enough = reached >= density.double()[:, None]  # a prefix of each row
        index = (enough.sum(dim=1) - 1).clamp_min(0)
        chosen = torch.cat([self.edges.new_zeros(1), self.edges])[index]
        return torch.where(index > 0, chosen, torch.zeros_like(chosen)).float()


def score_thresholds(blended: list[Blended], density: torch.Tensor) -> torch.Tensor:
    """Choose the squared score thresholds [L] that the given shares [L] of neurons reach, over all prompts."""
    scores = torch.stack([one.score_square for one in blended], dim=1).flatten(1).sort(dim=1).values  # [L, N * F]
    count = scores.shape[1]
    index = ((1.0 - density.double().to(scores.device)) * count).long().clamp(0, count - 1)
    chosen = scores.gather(1, index[:, None])[:, 0]
    return torch.where(density.to(scores.device) >= 1.0, torch.zeros_like(chosen), chosen)


@dataclass(frozen=True)
class Level:
    """The thresholds of a setting, float32 [L] each: for squared scores, and for gate estimates."""

    score_square: torch.Tensor
    token: torch.Tensor


@dataclass(frozen=True)
class Prices:
    """The price of bytes, in nats for one layer's whole FFN: `mask` and `token`, float32 [L] (they may be noisy and
    even negative; NaN where a band was empty), at `kl` nats per token and the measured `densities`."""

    mask: torch.Tensor
    token: torch.Tensor
    kl: float
    densities: Densities


@dataclass(frozen=True)
class Neighbours:
    """The thresholds one band below and above a setting's, which drop fewer and more neurons."""

    lower: Level
    upper: Level


def price(
    model: Any,
    spec: DecoderSpec,
    sequences: list[DenseSequence],
    blended: list[Blended],
    level: Level,
    neighbours: Neighbours,
    scale: torch.Tensor,
    down: list[torch.Tensor],
    histogram: EstimateHistogram,
    ranks: Ranks = ALONE,
) -> Prices:
    """Price both densities of every layer at a setting, with one forward and one backward pass for each sequence.

    Args:
        model: A transformers model whose weights need no gradient.
        spec: Its architecture.
        sequences: The batch.
        blended: The statistics of the sequences.
        level: The setting.
        neighbours: The setting's neighbours, `BAND` away in density.
        scale: Neuron scales, float32 [L, F].
        down: W_down of every layer.
        histogram: The histogram to which estimates are added.
        ranks: The ranks that share the batch.
    """
    layers, device = spec.num_layers, scale.device

    def price_one(case: tuple[DenseSequence, Blended], together: int) -> tuple[float, torch.Tensor, EstimateHistogram]:
        sequence, statistics = case
        masking = choose_masking(down, statistics, level.score_square, level.token, scale)
        runs: dict[int, LayerRun] = {}
        with torch.enable_grad(), two_level_ffn(model, spec, masking, runs.__setitem__):
            kl = masked_kl(model, sequence)
            (kl * GRADIENT_SCALE).backward()
        sums, estimates = torch.zeros(6, layers, device=device), histogram.empty()
        for layer, run in runs.items():
            keep, survivors = masking.keep[layer], run.survivors
            estimates.add(layer, run.estimates, keep)
            band = _bands(layer, run, statistics, masking, neighbours, len(spec.ffn_parts))
            sums[:, layer] = torch.stack([*band, keep.float().mean(), survivors.float().mean()])
        return float(kl.detach()), sums.cpu(), estimates.to("cpu")

    kls: list[float] = []
    sums = torch.zeros(6, layers)
    for kl, of_sequence, estimates in ranks.in_order(list(zip(sequences, blended, strict=True)), price_one):
        kls.append(kl)
        sums += of_sequence
        histogram.merge(estimates)
    cost, size, densities = sums.to(device).split(2)
    prices = torch.where(size > 0, cost / size, torch.nan)
    densities /= len(sequences)
    return Prices(prices[0], prices[1], sum(kls) / len(sequences), Densities(densities[0], densities[1]))


def _bands(
    layer: int, run: LayerRun, statistics: Blended, masking: Masking, neighbours: Neighbours, matrices: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the KL of the bands of mask and token threshold, and the share of a layer's FFN that they read."""
    assert run.used.grad is not None
    gradient, h, keep = run.used.grad[0].float() / GRADIENT_SCALE, run.h.float(), masking.keep[layer]
    neurons, tokens = h.shape[1], h.shape[0]
    # The prompt's threshold: a neuron is in or out of the mask for all tokens; outside, the tail mean replaces it.
    scores = statistics.score_square[layer]
    at_edge = (scores >= neighbours.lower.score_square[layer]) & (scores < neighbours.upper.score_square[layer])
    above = run.estimates >= masking.token_thresholds[layer]
    change = torch.where(above, h, torch.zeros_like(h)) - statistics.mean_activation[layer]
    mask_cost = -((gradient * change).sum(dim=0) * at_edge).sum()
    mask_size = two_level_share(at_edge.sum(), (above & at_edge).sum() / tokens, matrices) / neurons
    # The token's threshold: neurons of the mask whose estimates are just above or below it.
    lower, upper = neighbours.lower.token[layer], neighbours.upper.token[layer]
    at_edge = keep & (run.estimates >= lower) & (run.estimates < upper)
    token_cost = -(gradient * h * at_edge).sum()
    token_size = two_level_share(0.0, at_edge.sum() / tokens, matrices) / neurons
    return mask_cost, token_cost, mask_size, token_size
