"""MoEfication: balanced clusters, experts by true activation against brute force, and fitted routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_export.errors import UsageError
from tda_export.evaluation.moefication import (
    ExpertMethod,
    balanced_clusters,
    expert_count,
    expert_scores,
    kept_experts,
    layer_experts,
)
from tda_export.evaluation.predictor import PredictorSettings
from tda_export.evaluation.reference_data import ffn_inputs
from tda_export.evaluation.reference_fit import Wanted, fit_methods
from tda_export.evaluation.reference_methods import sparse_ffn
from tda_export.models.source import ModelSource

TOKENS = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 3), st.booleans())
def test_clusters_are_balanced_and_repeat(count: int, clusters: int, seed: int, equal: bool) -> None:
    clusters = min(clusters, count)
    rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)) * (not equal)
    chosen = balanced_clusters(rows, clusters, seed)
    sizes = torch.bincount(chosen, minlength=clusters)
    assert sizes.sum() == count
    assert int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(chosen, balanced_clusters(rows, clusters, seed))


def test_clusters_that_lie_apart_are_found() -> None:
    centres = torch.eye(4) * 50
    rows = (centres[:, None] + torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))).flatten(0, 1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    best = min(
        (balanced_clusters(rows[order], 4, seed) for seed in range(8)),
        key=lambda chosen: sum(float(rows[order][chosen == i].var(dim=0).sum()) for i in range(4)),
    )
    for i in range(4):
        assert len(set((order[best == i] // 8).tolist())) == 1


def test_the_experts_of_largest_true_activation_are_read(reference: Any, source: ModelSource) -> None:
    [method] = fit_methods(
        reference,
        source.spec,
        ffn_inputs(reference, source.spec, TOKENS),
        [Wanted("moe-true", 0.6)],
        PredictorSettings(),
    ).values()
    assert isinstance(method, ExpertMethod)
    assert (method.kept, method.extra_bytes) == (1, 0)
    generator = torch.Generator().manual_seed(3)
    activated, up = (torch.randn(5, 96, generator=generator) for _ in range(2))
    rows = method.keep(1, torch.zeros(5, 64), activated, up)
    experts = layer_experts(reference, source.spec, 1)
    norms = reference.get_submodule("model.layers.1.mlp.down_proj").weight.detach().norm(dim=0)
    for token in range(5):
        size = (activated[token] * up[token]).abs() * norms
        totals = [float(size[experts == i].sum()) for i in range(3)]
        assert torch.equal(rows.up[token], experts == totals.index(max(totals)))
    assert torch.equal(rows.gate, rows.down)


def test_a_router_reads_its_own_bytes_too(reference: Any, source: ModelSource) -> None:
    settings = PredictorSettings(rank=4, epochs=2, batch_tokens=16)
    inputs = ffn_inputs(reference, source.spec, TOKENS)
    [method] = fit_methods(reference, source.spec, inputs, [Wanted("moe", 0.3)], settings).values()
    assert isinstance(method, ExpertMethod)
    assert method.extra_bytes == 3 * 4 * (4 * (64 + 3) + 3)
    with torch.inference_mode(), sparse_ffn(reference, source.spec, method) as count:
        reference(TOKENS[:1])
    assert count.ffn_share == pytest.approx(2 / 3)


def test_scores_of_experts() -> None:
    scores = expert_scores(torch.tensor([0, 1, 0, 2]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert scores.tolist() == [[4.0, 2.0, 4.0]]
    assert (expert_count(1536), expert_count(8)) == (48, 1)


def test_no_room_for_an_expert(source: ModelSource) -> None:
    with pytest.raises(UsageError, match=r"^Sparsity 0\.9 leaves less than one of 3 experts\. Lower the sparsity"):
        kept_experts(source.spec, 0.9, None)
    with pytest.raises(UsageError, match="less than one of 3 experts and their router"):
        kept_experts(source.spec, 0.7, 64)
