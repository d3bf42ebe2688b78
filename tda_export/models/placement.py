"""Spread a model over several GPUs, and over the CPU's memory where they are full, with accelerate's device map.

Accelerate's hooks move a module's inputs to the module's device, and logits back to the tokens' device, so only code
that watches modules must care about devices. A module that is offloaded to the CPU has weights only during its call
(`present`), and autograd must not keep them for the backward pass (`weights_fetched_again`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.errors import TdaError

AUTO = "auto"
GPU_SHARE = 0.85  # share of a GPU's free memory for weights; the rest is for activations and their gradients
DISK = "disk"

Memory = dict[int | str, int]  # bytes by GPU, and of the CPU


def own_memory(number: int = 0, count: int = 1) -> Memory:
    """Return the memory that one of `count` processes on this machine may fill with weights: its GPUs and a share of
    RAM.

    Raises:
        TdaError: accelerate is missing.
    """
    _check_accelerate()
    import psutil  # accelerate's own dependency

    gpus = torch.cuda.device_count() // count
    own = range(number * gpus, (number + 1) * gpus)
    memory: Memory = {gpu: int(torch.cuda.mem_get_info(gpu)[0] * GPU_SHARE) for gpu in own}
    return memory | {"cpu": psutil.virtual_memory().available // count}


def spread(model: Any, memory: Memory) -> Any:
    """Spread a model that is in the CPU's memory.

    Raises:
        TdaError: The model is larger than this memory.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    together = list(model._no_split_modules or ())
    balanced = get_balanced_memory(model, dict(memory), no_split_module_classes=together)
    places = infer_auto_device_map(model, balanced, no_split_module_classes=together)
    check_places(places)
    return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def check_places(places: dict[str, Any]) -> None:
    """Refuse a device map that has put modules on the disk.

    Raises:
        TdaError: A module is on the disk.
    """
    if DISK in {str(place) for place in places.values()}:
        raise TdaError(
            "The model does not fit the memory of the GPUs and the CPU together. Use a smaller --dtype, more GPUs, or "
            "fewer ranks of one machine."
        )


def is_offloaded(module: torch.nn.Module) -> bool:
    """Return whether a module has its weights on its device only while it is called."""
    hook = getattr(module, "_hf_hook", None)
    return bool(getattr(hook, "offload", False))


def module_device(module: torch.nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    if is_offloaded(module):
        return torch.device(module._hf_hook.execution_device)  # type: ignore[union-attr, arg-type]
    return next(module.parameters()).device


@contextlib.contextmanager
def present(module: torch.nn.Module) -> Iterator[None]:
    """Load a module's weights to its device while the block runs; tensors derived from them stay valid."""
    if not is_offloaded(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


@dataclass(frozen=True)
class _Elsewhere:
    """A view of a freed weight, and how to load it again."""

    module: Any
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def fetch(self) -> torch.Tensor:
        hook = self.module._hf_hook
        weight: torch.Tensor = hook.weights_map[self.name].to(hook.execution_device)
        return weight.as_strided(self.size, self.stride, self.offset)


@contextlib.contextmanager
def weights_fetched_again(model: torch.nn.Module) -> Iterator[None]:
    """While the block runs, keep autograd from saving weights of offloaded modules: backward passes fetch them
    again."""
    running: list[torch.nn.Module] = []
    handles: list[Any] = []
    for module in model.modules():
        if is_offloaded(module):
            handles.append(module.register_forward_pre_hook(lambda module, inputs: running.append(module)))
            handles.append(module.register_forward_hook(lambda module, inputs, output: _drop_last(running)))
    if not handles:
        yield
        return

    def keep(tensor: torch.Tensor) -> torch.Tensor | _Elsewhere:
        if running and not tensor.requires_grad:
            for name, weight in running[-1].named_parameters(recurse=False):
                if weight.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                    return _Elsewhere(running[-1], name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def kept(found: torch.Tensor | _Elsewhere) -> torch.Tensor:
        return found.fetch() if isinstance(found, _Elsewhere) else found

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, kept):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _drop_last(running: list[torch.nn.Module]) -> None:
    running.pop()


def _check_accelerate() -> None:
    try:
        import accelerate  # noqa: F401 -- whether it is there
    except ImportError as error:
        raise TdaError(
            "--device auto spreads a model with accelerate, which is missing here. Install it with "
            "'pip install accelerate'."
        ) from error
