"""The place where a transformers model computes the linears of a layer, in every family's packing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from tda_export.models.layout import module_parts
from tda_export.models.placement import present
from tda_export.models.spec import DecoderSpec
from tda_export.packing import ATTENTION_PARTS, linear_parts, linear_shape, linear_sites
from tda_export.weights.plan import HEAD

Observe = Callable[[torch.Tensor], None]
Change = Callable[[torch.Tensor], torch.Tensor | None]


class Linear:
    """One part (q, k, v, o, gate, up or down) of one layer, or the head. Calls of the model are of batch 1, T tokens.

    A part may share its module with others; then its outputs are a slice of the module's outputs.
    """

    _heads: tuple[int, int, int] | None
    _place: int | slice

    def __init__(self, model: Any, spec: DecoderSpec, layer: int, part: str) -> None:
        if part == HEAD:
            self._set(spec, part, model.get_output_embeddings())
            return
        name, shared = next((name, parts) for name, parts in module_parts(spec).items() if part in parts)
        self._set(spec, part, model.get_submodule(name.format(i=layer)))
        self._transposed = spec.transposed_linears
        self.shares_module = len(shared) > 1
        if self.shares_module and part in ATTENTION_PARTS and spec.qkv_layout == "by_head":
            self._heads = (spec.num_heads, len(shared), spec.head_size)
            self._place = shared.index(part)
        else:
            first = sum(linear_shape(spec, other)[1] for other in shared[: shared.index(part)])
            self._place = slice(first, first + self.outputs)

    def _set(self, spec: DecoderSpec, part: str, module: Any) -> None:
        self.part, self.module = part, module
        self.inputs, self.outputs = linear_shape(spec, part)
        self._transposed = self.shares_module = False
        self._heads, self._place = None, slice(0, self.outputs)

    @property
    def weight(self) -> torch.Tensor:
        """W [in, out] without gradient; row i holds the weights of input channel i. A view, except where heads
        interleave."""
        with present(self.module):
            weight: torch.Tensor = self.module.weight.detach()
        return self.of_outputs(weight if self._transposed else weight.T)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Write W [in, out] into the module, in place."""
        whole = self.module.weight.detach()
        self.put_outputs(whole if self._transposed else whole.T, weight.to(whole))

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias [out] without gradient, None where there is none."""
        with present(self.module):
            bias = getattr(self.module, "bias", None)
        return None if bias is None else self.of_outputs(bias.detach())

    def of_outputs(self, outputs: torch.Tensor) -> torch.Tensor:
        """Select the part [.., out] from its module's outputs, or from their gradient."""
        if self._heads is None:
            return outputs[..., self._place]
        return outputs.unflatten(-1, self._heads)[..., self._place, :].flatten(-2)  # [.., H, D] to [.., H D]

    def put_outputs(self, outputs: torch.Tensor, own: torch.Tensor) -> None:
        """Write the part [.., out] into its module's outputs, in place."""
        if self._heads is None:
            outputs[..., self._place] = own
        else:
            heads, _, size = self._heads
            outputs.unflatten(-1, self._heads)[..., self._place, :] = own.unflatten(-1, (heads, size))

    def on_input(self, change: Change) -> Any:
        """Call `change` with the module's input [T, in], and replace it by the result; return the hook's handle.

        None leaves it unchanged. Parts of one module share one input.
        """

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            changed = change(_rows(inputs[0]))
            return None if changed is None else (changed.view_as(inputs[0]),)

        return self.module.register_forward_pre_hook(hook)

    def on_output(self, observe: Observe) -> Any:
        """Call `observe` with the part's outputs [T, out] of each call; return the hook's handle."""

        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            observe(self.of_outputs(_rows(output)))

        return self.module.register_forward_hook(hook)

    def add_to_output(self, addend: torch.Tensor) -> Any:
        """Add a vector to the module's output; return the hook's handle."""
        return self.module.register_forward_hook(lambda module, inputs, output: output + addend.to(output))

    def on_input_gradient(self, observe: Observe) -> Any:
        """Call `observe` with the gradient of the input through this part only, [T, in]; return the hook's handle.

        It is called in each backward pass. The input must be part of an autograd graph.
        """
        if not self.shares_module:

            def alias(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                # A separate tensor for the input, so that other readers of the same tensor add nothing to its gradient.
                own = inputs[0].view_as(inputs[0])
                own.register_hook(lambda gradient: observe(_rows(gradient)))
                return (own,)

            return self.module.register_forward_pre_hook(alias)

        return self.on_output_gradient(lambda gradient: observe(gradient @ self.weight.T))

    def on_output_gradient(self, observe: Observe) -> Any:
        """Call `observe` with the gradient of the part's outputs, [T, out], in each backward pass; return the hook's
        handle. The outputs must be part of an autograd graph."""

        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: observe(self.of_outputs(_rows(gradient))))

        return self.module.register_forward_hook(hook)


def layer_linears(model: Any, spec: DecoderSpec, layer: int) -> dict[str, Linear]:
    """Return the linears of a layer by part."""
    return {part: Linear(model, spec, layer, part) for part in linear_parts(spec)}


def by_module(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Group linears that share a module, in order."""
    groups: dict[int, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(id(linear.module), []).append(linear)
    return list(groups.values())


@contextlib.contextmanager
def watch_sites(model: Any, spec: DecoderSpec, observe: Callable[[int, str, torch.Tensor], None]) -> Iterator[None]:
    """Call `observe` with layer, site and the site's input x [T, in] in each call of the model in the block."""
    handles = []

    def watch(linear: Linear, layer: int, site: str) -> None:
        handles.append(linear.on_input(lambda x: observe(layer, site, x)))

    for layer in range(spec.num_layers):
        linears = layer_linears(model, spec, layer)
        for site, parts in linear_sites(spec).items():
            watch(linears[parts[0]], layer, site)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Drop the batch axis, which some families have already flattened: [1, T, N] or [T, N] to [T, N]."""
    return x.flatten(0, -2)
