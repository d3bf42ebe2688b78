"""The FFN bytes that a method reads, against a count of rows in transformers: with gates, without gates, with ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tda_export.evaluation.methods import Request, open_setting
from tda_export.evaluation.setting import Setting
from tda_export.graph.reference import masked_ffn
from tda_export.models.source import ModelSource, resolve_model
from tda_export.runtime import Model, load
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import PromptMask
from tests.conftest import build_tda, run_ok
from tests.runtime.conftest import reference_mask, second_level
from tests.tiny import save_tiny_model

PROMPT, READ = list(range(5, 29)), [40, 41, 42]
LAYERS, NEURONS, ROW_BYTES = 3, 96, 64 * 4
MATRICES = {"llama": 3, "gpt2": 2, "opt": 2}
BY_CETT = Request("tda", cett=0.3)
METHODS = [Request("dense"), Request("griffin", sparsity=0.5), Request("paper"), Request("tda"), BY_CETT]


@dataclass(frozen=True)
class Built:
    family: str
    source: ModelSource
    model: Model


@pytest.fixture(scope="module", params=list(MATRICES))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An artifact whose calibration has both the KL path and the curves of tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(request.param, folder / "model")
    sequences = ("--sequences", "2", "--prompt-tokens", "24", "--continuation-tokens", "8")
    run_ok("calibrate", model, "-o", folder / "calibration", "--method", "tda", "--estimator", "token", *sequences)
    run_ok(
        *build_tda(model, folder / "calibration"),
        "--no-verify",
        "-o",
        folder / "artifact",
    )
    return Built(request.param, resolve_model(str(model)), load(folder / "artifact", provider="cpu"))


def rows_read(built: Built, setting: Setting, mask: PromptMask) -> int:
    """Count with transformers the rows that the tokens of READ need, over all layers and tokens.

    A neuron of the mask needs its first row. It needs its other rows unless it is skipped or zero.
    """
    reference, source = built.source.reference(), built.source
    masks, tails = reference_mask(built.model, mask)
    if not setting.masked:
        masks, tails = [torch.ones_like(mask) for mask in masks], [torch.zeros_like(tail) for tail in tails]
    elif not setting.deployment.tail_mean:
        tails = [torch.zeros_like(tail) for tail in tails]
    thresholds = setting.deployment.token_thresholds
    level, others = second_level(built.model, thresholds), []

    class Counting:
        def keep(self, layer: int, activated: torch.Tensor) -> torch.Tensor:
            kept = level.keep(layer, activated)
            needed = kept & (activated != 0) if source.spec.activation == "relu" else kept
            others.append(int((needed * masks[layer]).sum()))
            return kept

    with torch.inference_mode():
        cache = reference(torch.tensor([PROMPT]), use_cache=True).past_key_values
        with masked_ffn(reference, source.spec, masks, tails, Counting()):  # type: ignore[arg-type]
            reference(torch.tensor([READ]), past_key_values=cache, use_cache=True)
    firsts = len(READ) * int(sum(mask.sum() for mask in masks))
    return firsts + (MATRICES[built.family] - 1) * sum(others)


@pytest.mark.parametrize("asked", METHODS, ids=lambda asked: asked.method + ("" if asked.cett is None else " by CETT"))
def test_bytes_are_those_of_the_rows_that_are_read(built: Built, asked: Request) -> None:
    artifact = built.model.artifact
    setting = open_setting(artifact, built.model.sessions, asked)
    cache = KvCache(artifact.shape, "cpu", len(PROMPT) + len(READ))
    _, mask = setting.read(PROMPT, cache)
    counted = setting.decode_counted(cache, READ, mask)
    expected = rows_read(built, setting, mask)
    assert artifact.dense_ffn_bytes == LAYERS * NEURONS * MATRICES[built.family] * ROW_BYTES
    assert counted.ffn_share * artifact.dense_ffn_bytes * len(READ) == pytest.approx(expected * ROW_BYTES, abs=0.5)
    if built.family == "opt" or asked.method != "dense":
        assert counted.ffn_share < 1


def test_nothing_is_read_of_a_model_whose_matrices_are_not_told() -> None:
    """A default of three matrices would give wrong figures for families with two."""
    from tda_export.calibration.budgets import Allocation, allocate, allocate_truncation
    from tda_export.ffn_share import truncation_share, two_level_share
    from tda_export.runtime.deployment import Deployment, one_level

    without: list[Any] = [
        lambda: two_level_share(0.5, 0.5),  # type: ignore[call-arg]
        lambda: truncation_share(0.5),  # type: ignore[call-arg]
        lambda: one_level(None, 3),  # type: ignore[call-arg]
        lambda: Deployment(None, np.zeros(3)),  # type: ignore[call-arg]
        lambda: Allocation([], [], [], []),  # type: ignore[call-arg]
        lambda: allocate(None, None, None),  # type: ignore[call-arg,arg-type]
        lambda: allocate_truncation(None, None, None),  # type: ignore[call-arg,arg-type]
    ]
    for call in without:
        with pytest.raises(TypeError, match="matrices"):
            call()
