"""Logits that are not finite end a generation, and do not affect later ones."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.runtime import Sampling, Token, load, open_artifact
from tests.runtime.conftest import (
    PROMPT,
    without_native_kernels,
)


def test_weight_that_is_not_a_number(artifact_copy: Path) -> None:
    artifact = load(artifact_copy, provider="cpu").artifact
    weights = np.memmap(
        artifact.file(contract.WEIGHTS_FILE),
        np.float32,
        mode="r+",
        offset=artifact.manifest["weights"][contract.HEAD]["offset"],
        shape=(1,),
    )
    weights[0] = np.nan
    weights.flush()
    generation = load(artifact_copy, provider="cpu").generate(PROMPT)
    with pytest.raises(
        TdaError, match=rf"logits that are not finite at token {len(PROMPT)}.*--dtype bf16, or with fp32"
    ):
        next(generation)


def spoil_rotation(folder: Path, position: int, bad: float) -> None:
    artifact = open_artifact(folder)
    entry = artifact.manifest["weights"][contract.COS_CACHE]
    rows = np.memmap(
        artifact.file(contract.WEIGHTS_FILE), np.float32, mode="r+", offset=entry["offset"], shape=tuple(entry["shape"])
    )
    rows[position] = bad
    rows.flush()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
def test_a_prompt_that_is_not_finite_leaves_nothing_behind(artifact_copy: Path, bad: float, native: bool) -> None:
    """Statistics decay to 0 before each prompt, but NaN would survive any decay."""
    spoil_rotation(artifact_copy, 30, bad)  # a position beyond short prompts
    with contextlib.nullcontext() if native else without_native_kernels():
        model = load(artifact_copy, provider="cpu")
    short = list(range(5, 25))
    before = model.generate(short, max_new_tokens=5)
    tokens = [token.id for token in before]
    with pytest.raises(TdaError, match="not finite"):
        next(model.generate(list(range(5, 45))))
    after = model.generate(short, max_new_tokens=5)
    assert [token.id for token in after] == tokens
    assert after.metrics.sparsity == before.metrics.sparsity


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "stock"])
def test_logits_that_become_infinite(artifact_copy: Path, bad: float, sampling: Sampling, native: bool) -> None:
    """The rotation of one position is spoiled, so the logits of the token there are not finite."""
    spoil_rotation(artifact_copy, len(PROMPT) + 2, bad)  # the position of the third token that decode reads
    with contextlib.nullcontext() if native else without_native_kernels():
        model = load(artifact_copy, provider="cpu")
    tokens: list[Token] = []

    def consume(generation: Iterator[Token]) -> None:
        tokens.extend(itertools.islice(generation, 3))
        next(generation)

    with pytest.raises(TdaError, match=rf"logits that are not finite at token {len(PROMPT) + 3}"):
        consume(model.generate(PROMPT, sampling=sampling))
    assert len(tokens) == 3  # the tokens before it were returned
