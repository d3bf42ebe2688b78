"""Which linears are stored in eight bits and which in four, for a given mean number of bits a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tda_export.errors import UsageError
from tda_export.weights.plan import FormatPlan

OPTION = "--bits-per-weight"


@dataclass(frozen=True)
class Mixture:
    """The ways to store the linears of a model in four bits, in eight, or some in either.

    The linears are those of the layers that are integers in both plans. Their bits are all that is stored: codes,
    scales and zero points.

    `fours`, `eights`: the plans with as many matrices as possible in four and in eight bits. They agree on the matrices
    whose format is fixed. `shapes`: rows and columns of each linear of the layers by name. `most_bits`: the most mean
    bits of a weight of the linears.
    """

    fours: FormatPlan
    eights: FormatPlan
    shapes: Mapping[str, tuple[int, int]]
    most_bits: float

    @property
    def open(self) -> list[str]:
        """The linears whose format is to be chosen."""
        return [name for name in self._linears if self.fours.of(name) != self.eights.of(name)]

    def bits_per_weight(self, plan: FormatPlan) -> float:
        """Return the mean bits of a weight of the linears."""
        stored = sum(self._bytes(plan, name) for name in self._linears)
        return 8 * stored / sum(math.prod(self.shapes[name]) for name in self._linears)

    def check(self) -> None:
        """Refuse a mean number of bits that no choice can meet.

        Raises:
            UsageError: It is below the plan in four bits or above the one in eight, or there is nothing to choose.
        """
        if not self.open:
            raise UsageError(
                f"{OPTION}: --weights-for fixes the format of every linear, so there is none to choose. Leave one of "
                "them out."
            )
        least, most = self.bits_per_weight(self.fours), self.bits_per_weight(self.eights)
        if not least <= self.most_bits <= most:
            # Rounded inwards, so that what is shown is allowed.
            allowed = f"{math.ceil(1000 * least) / 1000:g} to {math.floor(1000 * most) / 1000:g}"
            raise UsageError(
                f"{OPTION} {self.most_bits:g}: the linears take {least:.3f} bits a weight in int4 and {most:.3f} in "
                f"int8, scales and zero points included. Give {allowed}."
            )

    def choose(self, losses: Mapping[str, float]) -> FormatPlan:
        """Return the plan in which the linears that lose most per byte that eight bits add are in eight bits.

        Linears are taken in this order; one that would exceed the mean is left out, and the next is tried. So no
        further one fits.

        Args:
            losses: What each open linear alone loses in four bits, in any unit.
        """
        most = self.most_bits / 8 * sum(math.prod(self.shapes[name]) for name in self._linears)
        taken = sum(self._bytes(self.fours, name) for name in self._linears)
        more = {name: self._bytes(self.eights, name) - self._bytes(self.fours, name) for name in self.open}
        formats = dict(self.fours.formats)

        def order(name: str) -> tuple[float, float]:
            return losses[name] / more[name], losses[name]  # rounding may make the quotients of different losses equal

        for name in sorted(more, key=order, reverse=True):
            if taken + more[name] <= most:
                formats[name] = self.eights.of(name)
                taken += more[name]
        return FormatPlan(formats, self.fours.head_major)

    def describe(self, plan: FormatPlan) -> dict[str, float]:
        """Return the bits a weight that were asked for, and those of the chosen plan, as plain data."""
        return {"most_bits_per_weight": self.most_bits, "bits_per_weight": self.bits_per_weight(plan)}

    @property
    def _linears(self) -> list[str]:
        return [name for name in self.shapes if name in self.fours.integers and name in self.eights.integers]

    def _bytes(self, plan: FormatPlan, name: str) -> int:
        rows, columns = self.shapes[name]
        return rows * plan.integers[name].row_bytes(columns)
