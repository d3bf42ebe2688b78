"""Drop rows of a transformers model's linears as decode does, in plain PyTorch. All other code uses this module.

Row i of a matrix holds the weights of input channel i. A token reads it unless x_i² · row_price_i < price.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tda_export.models.linear_modules import Linear, by_module, layer_linears
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_parts, linear_shape, linear_sites
from tda_export.weights.plan import HEAD

PriceOf = Callable[[int, str], torch.Tensor]  # layer and part to the price of a call's tokens, float32 [] or [T, 1]
# Inputs [T, in], rows that are read [T, in], row prices [in], price, layer and parts to the inputs with 0 for others.
Drop = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, Sequence[str]], torch.Tensor]


@dataclass
class RowsRead:
    """The number of rows that tokens read so far: `read` by part, float64 [L], and of a head with prices, [1], summed
    over `tokens` tokens. Rows with x = 0 never count."""

    read: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    decided: int = 0  # rows with given decisions, by matrix and token
    otherwise: int = 0  # of these, rows for which the price would decide differently

    def densities(self, spec: DecoderSpec) -> dict[str, torch.Tensor]:
        """Return the share of each part's rows that a token reads on average, float64 [L]."""
        return {part: read / (self.tokens * linear_shape(spec, part)[0]) for part, read in self.read.items()}


def kept_rows(x: torch.Tensor, row_price: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
    """Return which rows a token reads, bool [T, in]: those not below the price, so that a NaN is read.

    Args:
        x: The input of each token, [T, in]; compared in float32.
        row_price: float32 [in].
        price: float32 [], or [T, 1].
    """
    return ~(x.float().square() * row_price < price)


def zeroed(
    x: torch.Tensor,
    rows: torch.Tensor,
    row_price: torch.Tensor,
    price: torch.Tensor,
    layer: int,
    parts: Sequence[str],
) -> torch.Tensor:
    """Drop rows: the inputs [T, in] of those that are not read become 0."""
    return torch.where(rows, x, 0)


@contextlib.contextmanager
def dropping(
    model: Any,
    spec: DecoderSpec,
    row_prices: Mapping[str, torch.Tensor],
    price: float | torch.Tensor | PriceOf,
    decisions: Mapping[str, torch.Tensor] | None = None,
    drop: Drop = zeroed,
) -> Iterator[RowsRead]:
    """Drop rows of a model's linears while the block runs, and count those that are read.

    Calls of the model are of batch 1, and every token of a call drops rows: read a dense prompt in a call outside the
    block, and continue from its keys and values inside.

    Args:
        model: A transformers model.
        spec: Its architecture.
        row_prices: float32 [L, in] of each matrix, by the name of its part or of its site, whose parts then drop the
            same rows, and of the head, [1, in]. Parts without row prices are read whole.
        price: The least worth of a row that is read, or float [T, 1], one for each token of a call, or a function that
            returns such prices for a layer and part (equal ones for the parts of a site); 0 is dense.
        decisions: Given decisions, bool [L, T, in], [1, T, in] of the head, by the names of `row_prices`, true where a
            row is read. They replace the price's decisions, which are compared with them. The block may then have only
            one call.
        drop: Sets the inputs of rows that are not read to 0; another one than `zeroed` may have a gradient by row
            prices.

    Yields:
        The count of all parts, which grows with each call.
    """
    names = _matrices(spec, row_prices)
    device = model.device
    price_of = price if callable(price) else _constant(torch.as_tensor(price, dtype=torch.float32, device=device))
    on_device = {name: value.to(device, torch.float32) for name, value in row_prices.items()}
    layers = {part: 1 if part == HEAD else spec.num_layers for part in names}
    count = RowsRead({part: torch.zeros(size, dtype=torch.float64, device=device) for part, size in layers.items()})
    handles: list[Any] = []

    def patch(layer: int, group: list[Linear]) -> None:
        def kept(linears: list[Linear], x: torch.Tensor) -> torch.Tensor | None:
            """Count the rows that linears of one name read; return their input without others, None where all are
            read."""
            name, parts = names[linears[0].part], [linear.part for linear in linears]
            read, inputs = x != 0, None
            if name is not None:
                own, at = on_device[name][layer].to(x.device), price_of(layer, parts[0]).to(x.device)
                rows = kept_rows(x.detach(), own.detach(), at)
                if decisions is not None:
                    others = decisions[name][layer].to(x.device)
                    count.decided += len(parts) * rows.numel()
                    count.otherwise += len(parts) * int((rows != others).sum())
                    rows = others
                read = rows & read
                inputs = drop(x, rows, own, at, layer, parts)
            for part in parts:
                count.read[part][layer] += read.sum().to(device)
            return inputs

        def together(x: torch.Tensor) -> torch.Tensor | None:
            if layer == 0 and group[0].part == "q":
                count.tokens += len(x)
            return kept(group, x)

        def apart(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x, output = inputs[0].flatten(0, -2), output.clone()
            if layer == 0 and group[0].part == "q":
                count.tokens += len(x)
            for linear in group:
                own_inputs = kept([linear], x)
                if own_inputs is not None:
                    own = own_inputs @ linear.weight
                    own = own if linear.bias is None else own + linear.bias
                    linear.put_outputs(output, own.view(*output.shape[:-1], -1))
            return output

        if len({names[linear.part] for linear in group}) == 1:
            handles.append(group[0].on_input(together))
        else:  # each slice of a packed product has its own input
            handles.append(group[0].module.register_forward_hook(apart))

    for layer in range(spec.num_layers):
        for group in by_module(layer_linears(model, spec, layer).values()):
            patch(layer, group)
    if HEAD in names:
        patch(0, [Linear(model, spec, 0, HEAD)])
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _constant(price: torch.Tensor) -> PriceOf:
    return lambda layer, part: price


def _matrices(spec: DecoderSpec, row_prices: Mapping[str, torch.Tensor]) -> dict[str, str | None]:
    """Return the matrix of each part, None for parts that are read whole."""
    names: dict[str, str | None] = dict.fromkeys(linear_parts(spec))
    for name in row_prices:
        for part in linear_sites(spec).get(name, (name,)):
            names[part] = name
    return names
