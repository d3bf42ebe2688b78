"""Copies from a checkpoint to a GPU."""

from __future__ import annotations

import torch

PIECE = 1 << 26  # bytes of a copy


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor of the CPU to a device.

    A memory-mapped tensor is copied to a GPU by way of pinned memory, a piece at a time: PyTorch's threads fill the
    next piece while CUDA copies one.
    """
    if torch.device(device).type != "cuda" or not tensor.is_contiguous():
        return tensor.to(device)
    copied = torch.empty_like(tensor, device=device)
    pieces = max(1, PIECE // tensor.element_size())
    for source, place in zip(tensor.view(-1).split(pieces), copied.view(-1).split(pieces), strict=True):
        place.copy_(source.pin_memory(), non_blocking=True)  # PyTorch keeps pinned memory until its copy has ended
    return copied
