"""A transformers model with only one layer in memory at a time; the other parts, embeddings and head, stay.

Layers are read from the checkpoint when they are needed. So a model of any size runs where one layer, its embedding and
its head fit, provided that all sequences pass through a layer before the next one is read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch

from tda_export.errors import TdaError
from tda_export.models.source import ModelSource, attention_options
from tda_export.models.spec import DecoderSpec
from tda_export.models.transfer import to_device
from tda_export.models.weights import OTHER_FILES

META = "meta"


class LayerwiseModel:
    """The model. `model` is transformers' own, in evaluation mode, whose layers have weights only inside `layer`."""

    def __init__(self, source: ModelSource, device: str) -> None:
        """Make the model in float32, and read the weights outside the layers.

        Args:
            source: The model's source. Its weights are read, never changed.
            device: The device of weights and computations, such as `cuda:0`.

        Raises:
            TdaError: The checkpoint lacks a tensor, or has one of the wrong shape.
        """
        self.name, self.spec, self.device = source.name, source.spec, torch.device(device)
        self._weights = source.weights()
        self.model = _without_weights(source)
        self._check()
        layers = {f"{layer_name(self.spec, layer)}." for layer in range(self.spec.num_layers)}
        for name, module in self.model.named_modules():
            for buffer, value in module.named_buffers(recurse=False):
                module._buffers[buffer] = value.to(self.device)
            if not any(f"{name}.".startswith(layer) for layer in layers):
                self._read(name, module, recurse=False)
        self.model.tie_weights()  # reading has created new parameters

    @contextlib.contextmanager
    def layer(self, layer: int, unread: Collection[str] = ()) -> Iterator[None]:
        """Load a layer's weights from the checkpoint while the block runs, except for those named in `unread`.

        Replace them (`put`), but do not write into them: they may be the source's own memory.
        """
        name = layer_name(self.spec, layer)
        module = self.model.get_submodule(name)
        self._read(name, module, recurse=True, unread=unread)
        try:
            yield
        finally:
            from accelerate.utils import set_module_tensor_to_device

            for parameter, _ in list(module.named_parameters()):
                set_module_tensor_to_device(module, parameter, META)

    def drop(self, module: str) -> None:
        """Free the weight of a module outside the layers, which then has none until it is `put`. Another module that
        shares it keeps it."""
        place = self.model.get_submodule(module)
        place.weight = torch.nn.Parameter(place.weight.to(META), requires_grad=False)

    def put(self, module: str, weight: torch.Tensor) -> None:
        """Set the weight of a module in the present layer or outside the layers; no other module shares it then."""
        value = weight.to(self.device, torch.float32)
        self.model.get_submodule(module).weight = torch.nn.Parameter(value, requires_grad=False)

    def _read(self, prefix: str, module: torch.nn.Module, *, recurse: bool, unread: Collection[str] = ()) -> None:
        from accelerate.utils import set_module_tensor_to_device

        for name, _ in list(module.named_parameters(recurse=recurse)):
            full = f"{prefix}.{name}" if prefix else name
            if full in unread or (self.spec.tied_head and full == f"{self.spec.names.head}.weight"):
                continue
            value = to_device(self._weights.load(full), self.device)
            set_module_tensor_to_device(module, name, self.device, value=value, dtype=torch.float32)

    def _check(self) -> None:
        for tensor, parameter in self.model.named_parameters():
            if tensor not in self._weights:
                problem = "missing"
            elif self._weights.shape(tensor) != tuple(parameter.shape):
                problem = "of another shape"
            else:
                continue
            raise TdaError(
                f"{self.name}: the checkpoint does not fit its configuration ({problem}: {tensor}). {OTHER_FILES}"
            )


def layer_name(spec: DecoderSpec, layer: int) -> str:
    """Return the name of a layer's module in a transformers model."""
    before, _, _ = spec.names.attention_out.partition("{i}")
    return f"{before}{layer}"


def layer_module(model: Any, spec: DecoderSpec, layer: int) -> torch.nn.Module:
    """Return a layer of a transformers model."""
    module: torch.nn.Module = model.get_submodule(layer_name(spec, layer))
    return module


@contextlib.contextmanager
def layers_skipped(model: Any, spec: DecoderSpec, hidden: torch.Tensor | None = None) -> Iterator[None]:
    """While the block runs, let every layer of a transformers model return its input, the last one `hidden` if given.

    Hooks of the layers are called as usual.
    """

    def skip(hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return hidden_states

    modules = [layer_module(model, spec, layer) for layer in range(spec.num_layers)]
    for module in modules:
        module.forward = skip
    if hidden is not None:
        modules[-1].forward = lambda *arguments, **options: hidden
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _without_weights(source: ModelSource) -> Any:
    """Make the model with parameters that have no storage."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = source.spec.tied_head
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention_options(source.spec))
    model.tie_weights()
    return model.eval().requires_grad_(False)
