"""A method: how neurons are scored, how the prompt mask is chosen, and what replaces the dropped neurons.

The graph builder takes these as choices, so that TDA, Griffin and later methods are settings of one builder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tda_export.errors import UsageError

Statistic = Literal["magnitude", "activation"]
Selection = Literal["threshold", "topk"]
Tail = Literal["zero", "mean"]


@dataclass(frozen=True)
class Method:
    """Choices of the prefill graph, and whether decode has a second level.

    `statistic`: `magnitude` scores by |h_i| * ||W_down[:, i]|| / ||m|| (TDA), `activation` by |h_i| / ||h|| (Griffin,
    arXiv 2404.01365). `selection`: `threshold` keeps scores of at least the layer's threshold; `topk` keeps the
    `density` * F best. `tail`: `mean` replaces dropped neurons by their mean over the prompt, `zero` drops them.
    `two_levels`: decode takes a token threshold for each layer; a token skips the mask's neurons below it.
    """

    name: str
    statistic: Statistic
    selection: Selection
    tail: Tail = "zero"
    density: float | None = None
    two_levels: bool = False

    def __post_init__(self) -> None:
        if (self.selection == "topk") != (self.density is not None):
            raise UsageError(f"Method {self.name}: a density belongs to top-k selection, and only to it.")

    def kept(self, ffn_size: int) -> int:
        """Return how many neurons top-k keeps."""
        assert self.density is not None
        return kept_neurons(self.density, ffn_size)


def kept_neurons(density: float, ffn_size: int) -> int:
    """Return how many of F neurons a density stands for, at least one."""
    return max(1, round(density * ffn_size))


def tda(tail: Tail = "zero", *, two_levels: bool = False) -> Method:
    """TDA: score by output magnitude, keep neurons that reach the calibrated threshold (arXiv 2408.11393)."""
    return Method("tda", "magnitude", "threshold", tail, two_levels=two_levels)


def griffin(sparsity: float) -> Method:
    """Griffin: score by relative activation, keep the same number of neurons in every layer (arXiv 2404.01365)."""
    return Method("griffin", "activation", "topk", density=1.0 - sparsity)
