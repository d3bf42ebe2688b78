"""The Hessian of a site, X^T X of its inputs over the calibration."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tda_export.errors import TdaError
from tda_export.models.linear_modules import layer_linears
from tda_export.models.placement import module_device
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_shape, linear_sites
from tda_export.quantization.gptq import RowOrder, row_order
from tda_export.quantization.layers import Call, pass_on, watch_head, watch_site
from tda_export.weights.plan import HEAD

# The weight of a sequence's first token in q, k and v. All tokens attend to it, and its hidden state is unlike any
# other, so its key and value must stay accurate.
FIRST_TOKEN_WEIGHT = 100.0
WEIGHTED_SITE = "qkv"


def site_hessian(
    model: Any, spec: DecoderSpec, layer: int, site: str, call: Call, inputs: list[torch.Tensor]
) -> torch.Tensor:
    """Add up x x^T over all tokens of all sequences, float32 [in, in] on the model's device.

    Args:
        model: A transformers model.
        spec: Its architecture.
        layer: The layer's number.
        site: The site, whose parts read x.
        call: How the layer is called.
        inputs: The layer's input for each sequence, [1, T, M].
    """
    hessian = _empty(spec, site, model.device)
    watch_site(model, spec, layer, site, call, inputs, lambda x: _add(hessian, site, x))
    return hessian


def layer_hessians(
    model: Any, spec: DecoderSpec, layer: int, call: Call, inputs: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Do the same for all sites of a layer in one pass, and replace each sequence's input by the layer's output."""
    found = {site: _empty(spec, site, module_device(call.module)) for site in linear_sites(spec)}
    linears = layer_linears(model, spec, layer)
    handles = [
        linears[parts[0]].on_input(partial(_add, found[site], site)) for site, parts in linear_sites(spec).items()
    ]
    try:
        pass_on(call, inputs, module_device(call.module))
    finally:
        for handle in handles:
            handle.remove()
    return found


def head_hessian(model: Any, spec: DecoderSpec, sequence: torch.Tensor, hidden: list[torch.Tensor]) -> torch.Tensor:
    """Do the same for the head, float32 [in, in].

    Args:
        model: A transformers model. Its layers are not run, and need no weights.
        spec: Its architecture.
        sequence: int64 [T], any of the sequences.
        hidden: The last layer's output for each sequence, [1, T, M].
    """
    size = linear_shape(spec, HEAD)[0]
    hessian = torch.zeros(size, size, device=model.device)
    watch_head(model, spec, sequence, hidden, lambda x: _add(hessian, HEAD, x))
    return hessian


def site_order(hessian: torch.Tensor, layer: int, site: str) -> RowOrder:
    """Order the rows of a site's matrices (`row_order`).

    Raises:
        TdaError: The Hessian is not finite, or has no factor; the message names the site.
    """
    return named_order(hessian, f"Layer {layer}, {site}")


def named_order(hessian: torch.Tensor, name: str) -> RowOrder:
    """Do the same, and put this name before the message."""
    try:
        return row_order(hessian)
    except TdaError as error:
        raise TdaError(f"{name}: {error}") from error


def _empty(spec: DecoderSpec, site: str, device: torch.device) -> torch.Tensor:
    size = linear_shape(spec, linear_sites(spec)[site][0])[0]
    return torch.zeros(size, size, device=device)


def _add(hessian: torch.Tensor, site: str, x: torch.Tensor) -> None:
    first = FIRST_TOKEN_WEIGHT**0.5 if site == WEIGHTED_SITE else 1.0
    x = torch.cat([first * x[:1], x[1:]]).float()
    hessian.addmm_(x.T, x)
