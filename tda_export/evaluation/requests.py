"""The request of a measurement: a method by name, and its budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tda_export.deployments import Asked
from tda_export.packing import Parts


@dataclass(frozen=True)
class Request(Asked):
    """A method by name (None: the artifact's own), and its budget.

    `parts`: the parts whose rows may be dropped, for methods of priced artifacts; a sparsity is then a share of their
    bytes.
    `densities`: a file of TEAL's greedy densities, which replace uniform ones.
    """

    method: str | None = None
    parts: Parts | None = None
    densities: Path | None = None
