"""What a measurement asks for: a method by name, and its budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tda_export.deployments import Asked
from tda_export.packing import Parts


@dataclass(frozen=True)
class Request(Asked):
    """A method by name (None: the artifact's own), and what was asked of it.

    `parts`: whose rows may be dropped, of methods of priced artifacts; a sparsity is then a share of their bytes.
    `densities`: a file of TEAL's greedy densities, in place of uniform ones.
    """

    method: str | None = None
    parts: Parts | None = None
    densities: Path | None = None
