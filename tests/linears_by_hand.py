"""The linears of transformers models, found by hand. Tests of prices and of skipped rows compare with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tda_export.models.spec import DecoderSpec


def by_hand(model: Any, spec: DecoderSpec, layer: int, part: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Return a part's module, its weights [in, out], and the places of its outputs among the module's, int64 [out]."""
    names = {
        "q": spec.names.query,
        "k": spec.names.key,
        "v": spec.names.value,
        "o": spec.names.attention_out,
        "gate": spec.names.gate,
        "up": spec.names.up,
        "down": spec.names.down,
    }
    module = model.get_submodule(names[part].format(i=layer))
    weight = module.weight.detach() if spec.transposed_linears else module.weight.detach().T
    columns = torch.arange(weight.shape[1])
    heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_size
    if part in ("q", "k", "v") and spec.qkv_layout == "by_head":
        third = ("q", "k", "v").index(part)
        columns = torch.cat([columns[(3 * h + third) * size : (3 * h + third + 1) * size] for h in range(heads)])
    elif part in ("q", "k", "v") and spec.qkv_layout == "stacked":
        ends = {"q": (0, heads), "k": (heads, heads + kv), "v": (heads + kv, heads + 2 * kv)}[part]
        columns = columns[ends[0] * size : ends[1] * size]
    elif part in ("gate", "up") and spec.packed_gate:
        columns = columns[: spec.ffn_size] if part == "gate" else columns[spec.ffn_size :]
    return module, weight[:, columns], columns


SITES = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def sites_of(spec: DecoderSpec) -> list[tuple[str, ...]]:
    """Return the parts that read the same input, by site."""
    return [tuple(part for part in site if spec.gated or part != "gate") for site in SITES]


@contextmanager
def patched(
    model: Any, spec: DecoderSpec, own: Callable[[int, str, torch.Tensor, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Replace the outputs of every part by own(layer, part, x [T, in], outputs [T, out])."""
    handles = []

    def patch(layer: int, part: str) -> None:
        module, _, columns = by_hand(model, spec, layer, part)

        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            rows = output.flatten(0, -2).clone()
            rows[:, columns] = own(layer, part, inputs[0].flatten(0, -2), rows[:, columns].clone())
            return rows.view_as(output)

        handles.append(module.register_forward_hook(hook))

    for layer in range(spec.num_layers):
        for site in sites_of(spec):
            for part in site:
                patch(layer, part)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
