"""CETT and density for every threshold of every layer, as sums that add."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

from tda_export.calibration.cett import (
    grid_bins,
    kept_share,
    neuron_scores,
    relative_magnitudes,
    tail_ratio_sums_by_neuron,
    tail_ratio_sums_by_token,
)
from tda_export.errors import TdaError

Estimator = Literal["prompt", "token"]


@dataclass(frozen=True)
class CurveSums:
    """Sums over the calibration data. The sums of two halves add up to the sums of the whole.

    All are float64 on the CPU. K thresholds, L layers, F neurons.

    `ratio` [L, K]: sum of || tail || / || FFN(x_t) || over `ratio_tokens` [L] tokens. `density` [L, K]: sum of the
    share of neurons in the prompt mask over `sequences` [1] sequences. `token_density` [L, K]: with the token
    estimator, the sum over tokens of the share with r_i(t) >= tau, of the same tokens as `score_square`; [L, 0] with
    the prompt estimator. `score_square` [L, F]: sum over tokens of r_i(t)^2, `activation` [L, F]: of h_i(t), and
    `up_square` [L, F]: of (up_i · x_t)^2, each of `tokens` [1] tokens.
    """

    ratio: torch.Tensor
    ratio_tokens: torch.Tensor
    density: torch.Tensor
    sequences: torch.Tensor
    token_density: torch.Tensor
    score_square: torch.Tensor
    activation: torch.Tensor
    up_square: torch.Tensor
    tokens: torch.Tensor

    def merge(self, other: CurveSums) -> CurveSums:
        """Add the sums of other data, taken with the same grid and estimator."""
        return CurveSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def mean_cett(self) -> torch.Tensor:
        """CETT(tau_k) of each layer, float64 [L, K]."""
        return self.ratio / self.ratio_tokens.clamp_min(1)[:, None]

    @property
    def mean_density(self) -> torch.Tensor:
        """Density(tau_k) of each layer, float64 [L, K]."""
        return self.density / self.sequences

    @property
    def prior_scores(self) -> torch.Tensor:
        """Neuron scores over all of the data, float64 [L, F]."""
        return (self.score_square / self.tokens).sqrt()

    @property
    def mean_activations(self) -> torch.Tensor:
        """Mean activation of each neuron over all of the data, float64 [L, F]."""
        return self.activation / self.tokens

    @property
    def up_rms(self) -> torch.Tensor:
        """Root mean square of each neuron's up product over all of the data, float64 [L, F]."""
        return (self.up_square / self.tokens).sqrt()


class CurveAccumulator:
    """Adds one layer of one sequence after another to the sums."""

    def __init__(
        self,
        layers: int,
        neurons: int,
        grid: torch.Tensor,
        estimator: Estimator,
        prompt_tokens: int,
        sums: CurveSums | None = None,
    ) -> None:
        """Begin at zero, or at the `sums` of earlier sequences, which are updated in place."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        points = len(grid)
        self.sums = sums or CurveSums(
            ratio=zeros(layers, points),
            ratio_tokens=zeros(layers),
            density=zeros(layers, points),
            sequences=zeros(1),
            token_density=zeros(layers, points if estimator == "token" else 0),
            score_square=zeros(layers, neurons),
            activation=zeros(layers, neurons),
            up_square=zeros(layers, neurons),
            tokens=zeros(1),
        )
        self._grid = grid
        self._estimator = estimator
        self._prompt_tokens = prompt_tokens

    def add(self, layer: int, h: torch.Tensor, down: torch.Tensor) -> None:
        """Add the activations of one sequence; the layers of a sequence come in order, 0 first.

        The sequence's first token is left out: it is an attention sink with massive activations.

        Args:
            layer: The layer's number.
            h: Activations, float [P + C, F]: prompt, then continuation.
            down: W_down, float [M, F].

        Raises:
            TdaError: An activation is not finite (float16 overflows with some models).
        """
        points, sums = len(self._grid), self.sums
        grid = self._grid.to(h.device)
        rows = down.detach().float().T.contiguous()  # [F, M], neuron-major
        h = h.float()[1:]  # [T, F]
        if not h.isfinite().all():
            raise TdaError(f"Layer {layer}: activations are not finite. Calibrate with --dtype bf16 or fp32.")
        split = self._prompt_tokens - 1
        relative = relative_magnitudes(h, rows.norm(dim=1))  # [T, F]
        bins = grid_bins(neuron_scores(relative[:split]), grid)  # [F]
        if self._estimator == "prompt":
            ratio, count = tail_ratio_sums_by_neuron(h[split:], rows, bins, points)
        else:
            token_bins = grid_bins(relative, grid)  # [T, F]
            ratio, count = tail_ratio_sums_by_token(h, rows, token_bins, points)
            sums.token_density[layer] += kept_share(token_bins, points).cpu() * len(h)
        sums.ratio[layer] += ratio.cpu()
        sums.ratio_tokens[layer] += count
        sums.density[layer] += kept_share(bins, points).cpu()
        sums.score_square[layer] += relative.double().square().sum(dim=0).cpu()
        sums.activation[layer] += h.double().sum(dim=0).cpu()
        if layer == 0:
            sums.sequences[0] += 1
            sums.tokens[0] += len(h)

    def add_up(self, layer: int, up: torch.Tensor) -> None:
        """Add the up products [P + C, F] of the same sequence as in `add`."""
        self.sums.up_square[layer] += up[1:].double().square().sum(dim=0).cpu()
