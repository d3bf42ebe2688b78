"""A small model with sequences that it has read, for tests of calibration by KL."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tda_export.calibration.dense import Blended, DenseSequence, blend, read_dense
from tda_export.calibration.masked import down_weights
from tda_export.models.source import resolve_model
from tda_export.models.spec import DecoderSpec
from tests.tiny import save_tiny_model

PROMPT, CONTINUATION, PRIOR_TOKENS = 12, 8, 6.0


@dataclass(frozen=True)
class KlCase:
    """A model, its sequences [N, P + C] and what was read from them; `scale` [L, F] is random."""

    model: Any
    spec: DecoderSpec
    tokens: torch.Tensor
    sequences: list[DenseSequence]
    blended: list[Blended]
    scale: torch.Tensor

    @property
    def down(self) -> list[torch.Tensor]:
        return down_weights(self.model, self.spec)


def read_case(model: Any, spec: DecoderSpec, tokens: torch.Tensor, *, prior_tokens: float = PRIOR_TOKENS) -> KlCase:
    sequences = read_dense(model, spec, tokens, PROMPT)
    scale = 0.5 + torch.rand(spec.num_layers, spec.ffn_size, generator=torch.Generator().manual_seed(5))
    return KlCase(model, spec, tokens, sequences, blend(sequences, prior_tokens), scale)


def make_case(
    folder: Path, family: str = "llama", *, sequences: int = 4, dtype: torch.dtype = torch.float32, **overrides: Any
) -> KlCase:
    source = resolve_model(str(save_tiny_model(family, folder / family, **overrides)))
    model = source.reference(dtype=dtype)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, source.spec.vocab_size, (sequences, PROMPT + CONTINUATION), generator=generator)
    return read_case(model, source.spec, tokens)


def with_down_scaled(case: KlCase, factors: list[float]) -> KlCase:
    """Make a case of a model whose down weights are scaled by a factor for each layer."""
    model = copy.deepcopy(case.model)
    for weight, factor in zip(down_weights(model, case.spec), factors, strict=True):
        weight *= factor
    return read_case(model, case.spec, case.tokens)


@contextmanager
def seen_by_ffns(model: Any) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Collect the input and output of every FFN, [T, M] each, of the last pass in the block."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(layer: int) -> Any:
        return model.model.layers[layer].mlp.register_forward_hook(
            lambda ffn, inputs, output: seen.__setitem__(layer, (inputs[0][0], output[0]))
        )

    handles = [hook(layer) for layer in range(len(model.model.layers))]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
