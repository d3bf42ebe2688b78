"""Codes of integer formats in tensors of one device; `weights.integers.Codes` has them in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import FIELDS, Codes, PackedCodes


@dataclass(frozen=True)
class CodeTensors:
    """A matrix [rows, columns] of an integer format, unpacked, on one device.

    `codes` uint8 [rows, columns], `scales` float16 [rows, groups], `zero_points` uint8 [rows, groups].
    """

    format: IntegerFormat
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor

    @staticmethod
    def of(codes: Codes, device: torch.device | str = "cpu") -> CodeTensors:
        """Copy codes to a device."""
        fields = (torch.from_numpy(each).to(device) for each in (codes.codes, codes.scales, codes.zero_points))
        return CodeTensors(codes.format, *fields)

    @staticmethod
    def beside(parts: Sequence[CodeTensors]) -> CodeTensors:
        """Put matrices of one format side by side; all but the last have whole groups."""
        fields = (torch.cat([getattr(part, field) for part in parts], dim=1) for field in FIELDS)
        return CodeTensors(parts[0].format, *fields)

    def cpu(self) -> CodeTensors:
        """Copy it to the CPU."""
        return CodeTensors(self.format, *(getattr(self, field).cpu() for field in FIELDS))

    def pack(self) -> PackedCodes:
        """Do what `Codes.pack` does on the device, and copy the result to the CPU."""
        bits = self.format.bits
        stored = (_packed(self.codes, bits), self.scales.contiguous(), _packed(self.zero_points, bits))
        rows, columns = self.codes.shape
        return PackedCodes(self.format, rows, columns, tuple(each.cpu().numpy() for each in stored))

    def decode(self) -> torch.Tensor:
        """Do what `Codes.decode` does: float32 [rows, columns]."""
        rows, columns = self.codes.shape
        missing = self.format.groups(columns) * self.format.group - columns
        grouped = torch.nn.functional.pad(self.codes, (0, missing)).view(rows, -1, self.format.group).float()
        decoded = grouped.sub_(self.zero_points[..., None]).mul_(self.scales.float()[..., None])
        return decoded.flatten(1)[:, :columns].contiguous()


def _packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Do what `integers.pack_bits` does."""
    if bits == 8:
        return numbers.contiguous()
    pairs = torch.nn.functional.pad(numbers, (0, numbers.shape[1] % 2)).unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4
