"""A predictor of each token's neurons, in the manner of Deja Vu (arXiv 2310.17157, section 4).

Before a layer's FFN, two small matrices map its input to one logit per neuron. The rows of the neurons with the largest
logits are read from all three matrices. Deja Vu's predictors learn which neurons of a ReLU model are nonzero. A gated
FFN has no zeros, so these learn which neurons have the largest r_i(t). Departures from Deja Vu that help the predictor:
a bias for every neuron, which starts at its log-odds, so that training starts at the best static choice; and inputs are
standardised in training, which is then folded into the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tda_export.errors import UsageError
from tda_export.evaluation.reference_methods import Rows
from tda_export.graph.method import kept_neurons
from tda_export.models.spec import DecoderSpec

SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class PredictorSettings:
    """How predictors are made: `rank` R of the two matrices, passes over the text, tokens per step, step size, seed."""

    rank: int = 64
    epochs: int = 5
    batch_tokens: int = 256
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 1 or self.batch_tokens < 1:
            raise UsageError("A predictor needs a rank, epochs and tokens a step of 1 or more.")


@dataclass(frozen=True)
class Predictor:
    """One layer's predictor: logits = x A B + b, with A float32 [M, R], B float32 [R, F], b float32 [F]."""

    first: torch.Tensor
    second: torch.Tensor
    bias: torch.Tensor

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, M] to float32 [T, F]."""
        return x.float() @ self.first @ self.second + self.bias

    @property
    def parameters(self) -> int:
        """The number of parameters that a token reads for it."""
        return self.first.numel() + self.second.numel() + self.bias.numel()


def predictor_density(spec: DecoderSpec, sparsity: float, rank: int) -> float:
    """Return the density at which the FFN's rows and the predictors' own weights together meet a sparsity.

    Raises:
        UsageError: The predictors alone read more.
    """
    neurons, hidden = spec.ffn_size, spec.hidden_size
    own = (rank * (hidden + neurons) + neurons) / (3 * hidden * neurons)
    density = 1.0 - sparsity - own
    if density <= 0.0:
        raise UsageError(
            f"Predictors of rank {rank} read {own:.3f} of the FFN's bytes themselves, which leaves nothing at "
            f"sparsity {sparsity}. Lower the rank or the sparsity."
        )
    return density


def train_predictor(
    x: torch.Tensor,
    relative: torch.Tensor,
    density: float,
    settings: PredictorSettings,
) -> Predictor:
    """Train one layer's predictor by binary cross-entropy: is a neuron among the token's `density` F largest r_i(t)?

    Equal inputs and settings give equal predictors.

    Args:
        x: FFN inputs of a calibration text, float32 [T, M].
        relative: r_i(t), float32 [T, F].
        density: The share of neurons that a token keeps.
        settings: Rank, epochs, and so on.
    """
    tokens, neurons = relative.shape
    generator = torch.Generator().manual_seed(settings.seed)
    labels = largest(relative, kept_neurons(density, neurons)).float()  # [T, F]
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(SMALLEST_DEVIATION)
    standard = (x - mean) / deviation
    frequency = (labels.sum(dim=0) + 0.5) / (tokens + 1)  # never 0 or 1
    first = torch.randn(x.shape[1], settings.rank, generator=generator) / x.shape[1] ** 0.5
    parameters = [first, torch.zeros(settings.rank, neurons), frequency.logit()]
    first, second, bias = (parameter.requires_grad_() for parameter in parameters)
    optimiser = torch.optim.Adam([first, second, bias], lr=settings.learning_rate)
    steps = settings.epochs * -(-tokens // settings.batch_tokens)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, steps)
    for _ in range(settings.epochs):
        for batch in torch.randperm(tokens, generator=generator).split(settings.batch_tokens):
            logits = standard[batch] @ first @ second + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        folded = first / deviation[:, None]  # (x - mean) / deviation · A = x · folded - mean · folded
        return Predictor(folded, second.detach().clone(), bias - mean @ folded @ second)


def largest(values: torch.Tensor, number: int) -> torch.Tensor:
    """Mark the `number` largest of every row [T, F]. Returns bool [T, F]."""
    chosen = values.topk(number, dim=1).indices  # [T, number]
    return torch.zeros_like(values, dtype=torch.bool).scatter(1, chosen, True)


@dataclass(frozen=True)
class PredictorMethod:
    """A token reads all three rows of the `kept` neurons with the largest logits of L predictors.

    `extra_bytes` counts the predictors' weights in the model's dtype, of `element_size` bytes.
    """

    predictors: Sequence[Predictor]
    kept: int
    element_size: int = 4

    @property
    def extra_bytes(self) -> int:
        return self.element_size * sum(predictor.parameters for predictor in self.predictors)

    def keep(self, layer: int, x: torch.Tensor, activated: torch.Tensor, up: torch.Tensor) -> Rows:
        mask = largest(self.predictors[layer].logits(x), self.kept)
        return Rows(mask, mask, mask)
