"""MoEfication (arXiv 2110.01786): an FFN's neurons are grouped into experts of equal size, and a token reads a few of
them.

Experts are balanced k-means clusters of the neurons' gate and up rows. Experts are chosen either by their true
activation, which is known only after reading all experts (so this is an upper bound), or by a router fitted to a
calibration text, here of the form in `predictor.py`. MoEfication was made for ReLU and sums its activations; with gates
an expert's activation is the sum of its neurons' |h_i| ||W_down[:, i]||.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.errors import UsageError
from tda_export.evaluation.predictor import Predictor, largest
from tda_export.evaluation.reference_methods import Rows
from tda_export.models.spec import DecoderSpec

EXPERT_NEURONS = 32  # as in the paper
ITERATIONS = 20


def expert_count(neurons: int) -> int:
    """Return E, the number of experts of a layer of F neurons."""
    return max(1, neurons // EXPERT_NEURONS)


def balanced_clusters(rows: torch.Tensor, clusters: int, seed: int = 0) -> torch.Tensor:
    """Cluster rows by k-means into clusters whose sizes differ by at most one. Equal arguments give equal results.

    In each pass each row goes to the nearest centre with room; where too many rows want a centre, the nearest get it.

    Args:
        rows: float32 [F, D].
        clusters: E, at most F.
        seed: The seed of the initial centres.

    Returns:
        The cluster of each row, int64 [F].
    """
    count = len(rows)
    sizes = torch.full((clusters,), count // clusters)
    sizes[: count % clusters] += 1
    first = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:clusters]
    centres, chosen = rows[first], torch.full((count,), -1)
    for _ in range(ITERATIONS):
        again = _assigned(torch.cdist(rows, centres), sizes)
        if torch.equal(again, chosen):
            break
        chosen = again
        centres = torch.zeros_like(centres).index_add(0, chosen, rows) / sizes[:, None]
    return chosen


def _assigned(distance: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Assign rows to clusters of limited sizes, by distances [F, E]."""
    distance, room = distance.clone(), sizes.clone()
    chosen = torch.full((len(distance),), -1)
    while (free := (chosen < 0).nonzero().flatten()).numel():
        distance[:, room == 0] = float("inf")
        nearest, cluster = distance[free].min(dim=1)
        order = nearest.argsort(stable=True)
        order = order[cluster[order].argsort(stable=True)]  # by cluster, and by distance within one
        sorted_cluster = cluster[order]
        starts = torch.searchsorted(sorted_cluster, sorted_cluster)
        rank = torch.arange(len(order)) - starts
        taken = order[rank < room[sorted_cluster]]
        chosen[free[taken]] = cluster[taken]
        room -= torch.bincount(cluster[taken], minlength=len(room))
    return chosen


def layer_experts(model: Any, spec: DecoderSpec, layer: int, seed: int = 0) -> torch.Tensor:
    """Return the expert of each neuron of a layer, int64 [F]: gate and up rows count equally, whatever their
    lengths."""
    gate, up = (model.get_submodule(name.format(i=layer)).weight for name in (spec.names.gate, spec.names.up))
    rows = [torch.nn.functional.normalize(weight.detach().float().cpu(), dim=1) for weight in (gate, up)]
    return balanced_clusters(torch.cat(rows, dim=1), expert_count(spec.ffn_size), seed)


def expert_scores(experts: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Sum the values of each expert's neurons: [T, F] to [T, E]."""
    count = int(experts.max()) + 1
    return torch.zeros(len(sizes), count, dtype=sizes.dtype).index_add(1, experts, sizes)


def router_bytes_share(spec: DecoderSpec, rank: int) -> float:
    """Return the share of the FFN's bytes that routers of a rank read."""
    experts = expert_count(spec.ffn_size)
    own = rank * (spec.hidden_size + experts) + experts
    return own / (3 * spec.hidden_size * spec.ffn_size)


def kept_experts(spec: DecoderSpec, sparsity: float, rank: int | None) -> int:
    """Return how many experts a token may read so that they, and a router of a rank, meet a sparsity.

    Raises:
        UsageError: There is no room for a single expert.
    """
    experts = expert_count(spec.ffn_size)
    own = 0.0 if rank is None else router_bytes_share(spec, rank)
    kept = round((1.0 - sparsity - own) * experts)
    if kept < 1:
        beside = "" if rank is None else " and their router"
        raise UsageError(
            f"Sparsity {sparsity} leaves less than one of {experts} experts{beside}. Lower the sparsity or the rank."
        )
    return kept


@dataclass(frozen=True)
class ExpertMethod:
    """A token reads all three rows of the neurons of `kept` experts.

    `experts`: the expert of each neuron, L tensors int64 [F]. `norms`: ||W_down[:, i]||, L tensors float32 [F].
    `routers`: one for each layer; None chooses by the true activation. `extra_bytes`: the bytes of the routers.
    """

    experts: Sequence[torch.Tensor]
    norms: Sequence[torch.Tensor]
    kept: int
    routers: Sequence[Predictor] | None = None
    element_size: int = 4

    @property
    def extra_bytes(self) -> int:
        return self.element_size * sum(router.parameters for router in self.routers or ())

    def keep(self, layer: int, x: torch.Tensor, activated: torch.Tensor, up: torch.Tensor) -> Rows:
        if self.routers is None:
            scores = expert_scores(self.experts[layer], (activated * up).float().abs() * self.norms[layer])
        else:
            scores = self.routers[layer].logits(x)
        mask = largest(scores, self.kept)[:, self.experts[layer]]  # [T, F]
        return Rows(mask, mask, mask)
