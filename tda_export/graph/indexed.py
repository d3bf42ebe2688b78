"""An artifact whose decode computes the neurons of a prompt mask: what it stores, its graphs, its manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tda_export.calibration.budgets import Allocation
from tda_export.graph import contract
from tda_export.graph.decode import build_decode
from tda_export.graph.method import Method
from tda_export.graph.prefill import Prior, build_prefill
from tda_export.graph.weight_plan import IndexedRows
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec
from tda_export.runtime.deployment import NO_REFRESH, Refresh


@dataclass(frozen=True)
class IndexedDesign:
    """How prompt masks are chosen. `thresholds` [L] are the defaults of the prefill graph; zeros for top-k methods.

    `up_rms`, float [L, F], comes from calibration and is for two-level methods; the allocation gives their token
    thresholds. `prior` holds the statistics that a prompt begins with.
    """

    method: Method
    thresholds: list[float]
    allocation: Allocation | None = None
    up_rms: torch.Tensor | None = None
    prior: Prior | None = None
    refresh: Refresh = NO_REFRESH

    layout = "indexed"

    def __post_init__(self) -> None:
        assert self.method.two_levels == (self.up_rms is not None), "a two-level method needs up_rms"

    @property
    def rows(self) -> IndexedRows:
        """The meaning of the rows of the layers' matrices."""
        return IndexedRows(self.up_rms)

    @property
    def token_thresholds(self) -> list[float]:
        """The defaults of the decode graph, [L]; 0 is off."""
        chosen = self.allocation.token_thresholds if self.allocation else []
        return chosen or [0.0] * len(self.thresholds)

    @property
    def survivors(self) -> list[float]:
        """The expected share of the prompt mask's neurons that a token does not skip, [L]."""
        if self.allocation is None or not self.allocation.token_density:
            return [1.0] * len(self.thresholds)
        pairs = zip(self.allocation.token_density, self.allocation.density, strict=True)
        return [token / mask if mask else 1.0 for token, mask in pairs]

    @property
    def expected(self) -> dict[str, Any]:
        """The values that calibration expects, as plain data; `sparsity` is the share of FFN bytes that a token is
        expected not to read, refreshes included."""
        if self.allocation is None:
            return {}
        return asdict(self.allocation) | {"sparsity": self.refresh.sparsity(self.allocation.sparsity)}

    def graphs(self, spec: DecoderSpec, table: WeightTable, dtype: str, kv: str) -> dict[str, ir.Model]:
        """Build the graphs, by file name."""
        thresholds, token_thresholds = np.asarray(self.thresholds, "f4"), np.asarray(self.token_thresholds, "f4")
        return {
            contract.PREFILL_FILE: build_prefill(spec, table, dtype, self.method, thresholds, self.prior, kv=kv),
            contract.DECODE_FILE: build_decode(spec, table, dtype, self.method, token_thresholds, kv=kv),
            contract.EXPLICIT_DECODE_FILE: build_decode(spec, table, dtype, self.method, kv=kv, explicit=True),
        }

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entries that only this layout has."""
        return {
            "method": asdict(self.method),
            "thresholds": self.thresholds,
            "token_thresholds": self.token_thresholds,
            "survivors": self.survivors,
            "prior_tokens": self.prior.tokens if self.prior else 0.0,
            "refresh": asdict(self.refresh),
            "expected": self.expected,
        }
