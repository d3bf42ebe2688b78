"""The Hessian of a site, X^T X of its inputs over the calibration."""

from __future__ import annotations

from typing import Any

import torch

from tda_export.models.placement import module_device
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_shape, linear_sites
from tda_export.quantization.layers import Call, watch_site

# The weight of a sequence's first token in q, k and v. All tokens attend to it, and its hidden state is unlike any
# other, so its key and value must stay accurate.
FIRST_TOKEN_WEIGHT = 100.0
WEIGHTED_SITE = "qkv"


def site_hessian(
    model: Any, spec: DecoderSpec, layer: int, site: str, call: Call, inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Add up x x^T over all tokens of all sequences, float32 [in, in] on the layer's device.

    Args:
        model: A transformers model.
        spec: Its architecture.
        layer: The layer's number.
        site: The site, whose parts read x.
        call: How the layer is called.
        inputs: The layer's input for each sequence, [1, T, M].
    """
    size = linear_shape(spec, linear_sites(spec)[site][0])[0]
    hessian = torch.zeros(size, size, device=module_device(call.module))
    first = FIRST_TOKEN_WEIGHT**0.5 if site == WEIGHTED_SITE else 1.0

    def observe(x: torch.Tensor) -> None:
        x = torch.cat([first * x[:1], x[1:]]).float()
        hessian.addmm_(x.T, x)

    watch_site(model, spec, layer, site, call, inputs, observe)
    return hessian
