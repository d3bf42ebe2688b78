"""The Hessian of a site: what its inputs were over the calibration, X^T X."""

from __future__ import annotations

from typing import Any

import torch

from tda_export.models.placement import module_device
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_shape, linear_sites
from tda_export.quantization.layers import Call, watch_site

# How often the first token of a sequence counts in q, k and v: all tokens attend to it, and its key and value, of a
# hidden state unlike any other, must survive.
FIRST_TOKEN_WEIGHT = 100.0
WEIGHTED_SITE = "qkv"


def site_hessian(
    model: Any, spec: DecoderSpec, layer: int, site: str, call: Call, inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Add up x x^T over all tokens of all sequences, float32 [in, in] on the layer's device.

    Args:
        model: A transformers model.
        spec: Its architecture.
        layer: Which.
        site: Its parts read x.
        call: How the layer is called.
        inputs: What enters the layer, [1, T, M] of each sequence.
    """
    size = linear_shape(spec, linear_sites(spec)[site][0])[0]
    hessian = torch.zeros(size, size, device=module_device(call.module))
    first = FIRST_TOKEN_WEIGHT**0.5 if site == WEIGHTED_SITE else 1.0

    def observe(x: torch.Tensor) -> None:
        x = torch.cat([first * x[:1], x[1:]]).float()
        hessian.addmm_(x.T, x)

    watch_site(model, spec, layer, site, call, inputs, observe)
    return hessian
