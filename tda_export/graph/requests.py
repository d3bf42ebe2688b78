"""Turn a calibration and a user's request into a build request: one function for each method of `build`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tda_export.calibration.budgets import Budget
from tda_export.calibration.file import Calibration, read_calibration
from tda_export.deployments import Asked
from tda_export.errors import TdaError, UsageError
from tda_export.graph.export import BuildRequest
from tda_export.graph.indexed import IndexedDesign
from tda_export.graph.method import Tail, griffin, tda
from tda_export.graph.prefill import calibrated_prior
from tda_export.graph.priced import PricedDesign
from tda_export.graph.storage import Storage
from tda_export.models.source import ModelSource
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, RowBytes
from tda_export.pricing import PriceTable
from tda_export.runtime.deployment import NO_REFRESH
from tda_export.weights.plan import FLOAT, HEAD


def calibration_of(path: Path, source: ModelSource) -> Calibration:
    """Read the calibration of a model.

    Raises:
        TdaError: The calibration cannot be read, or is of another model.
    """
    calibration = read_calibration(path)
    if calibration.model_fingerprint != source.fingerprint:
        calibrated = calibration.provenance["model"]["name"]
        raise TdaError(
            f"{path} was calibrated on another model ({calibrated}) than {source.name}. "
            "Calibrate this one with 'tda-export calibrate'."
        )
    return calibration


def default_packing(spec: DecoderSpec, storage: Storage) -> Packing:
    """Return how linears are packed by default.

    The default is one threshold per site where a kernel launch or a short row costs more than the bytes saved, and
    where the parts can be stored side by side.
    """
    row_bytes = storage.row_bytes(spec)
    small = storage.dtype != "float32" or row_bytes.integers
    return "sites" if small and row_bytes.suits(spec, "sites") else "separate"


def priced_request(
    source: ModelSource, storage: Storage, path: Path, asked: Asked, packing: Packing | None = None
) -> BuildRequest:
    """Return the build request of --method priced.

    Args:
        source: The model.
        storage: How its weights are stored.
        path: Its calibration file.
        asked: A price, sparsity or KL; without one, the calibration's own budget counts.
        packing: The packing of the linears; None chooses by storage.

    Raises:
        UsageError: The calibration holds no suitable prices, was measured with weights of another format, or the budget
            is beyond its table.
        TdaError: The calibration cannot be read, or is of another model.
    """
    calibration = calibration_of(path, source)
    chosen = packing or default_packing(source.spec, storage)
    if calibration.priced is None:
        raise UsageError(
            f"{path} contains no prices. Calibrate again with 'tda-export calibrate --method priced', or build with "
            "--method tda."
        )
    tables = calibration.priced.tables()
    if chosen not in tables:
        raise UsageError(
            f"{path} has no table of prices for --packing {chosen}. Calibrate again without --packing, or build with "
            f"--packing {next(iter(tables))}."
        )
    # The calibration says whether rows of the head have prices.
    row_bytes = storage.row_bytes(source.spec, head=HEAD in calibration.priced.sums.square)
    table = _table_of(tables[chosen], row_bytes, source, storage, path, asked)
    if not asked.has_budget:
        own = Budget(**calibration.provenance["budget"])
        asked = replace(asked, sparsity=own.sparsity, max_kl=own.max_kl if own.cett is None else None)
        if own.cett is not None:
            raise UsageError(f"{path} has a budget of CETT as its own, which prices do not have. Give --max-kl.")
    if sum(value is not None for value in (asked.price, asked.sparsity, asked.max_kl)) != 1:
        raise UsageError("Give exactly one budget: --price, --sparsity or --max-kl.")
    if asked.price is not None:
        asked = replace(asked, price=max(float(asked.price), 0.0))  # a negative price is dense too
    price, expected = asked.price, {}
    if table is not None:
        if price is None:
            price = table.price_for(sparsity=asked.sparsity, max_kl=asked.max_kl)
        row = table.predicted(price)
        expected = {"sparsity": row.sparsity, "kl": row.kl, "share": row.share, "parts": row.parts}
    assert price is not None
    budget = {"price": asked.price, "sparsity": asked.sparsity, "max_kl": asked.max_kl}
    design = PricedDesign(
        chosen,
        calibration.priced.row_prices(source.spec, chosen, row_bytes),
        price,
        None if table is None else table.to_dict(),
        expected,
    )
    given = {name: value for name, value in budget.items() if value is not None}
    return BuildRequest(source, storage, design, given, path, calibration.provenance)


def _table_of(
    table: PriceTable, row_bytes: RowBytes, source: ModelSource, storage: Storage, path: Path, asked: Asked
) -> PriceTable | None:
    """Return the table for the stored weights; None where it was measured with other weights and a given price needs
    none."""
    if storage.rounds:
        problem = (
            f"{path} was measured with the weights of {source.name} as they are, and rounded ones have another KL. "
            "Make a model of them with 'tda-export quantize', and calibrate that"
        )
    elif table.formats == FLOAT:
        return table.rescaled(row_bytes.element_bytes)
    elif table.element_bytes == row_bytes.element_bytes or not row_bytes.has_floats:
        return table
    else:
        problem = (
            f"{path} was measured with floats of {table.element_bytes} bytes beside the integers, and these are of "
            f"{row_bytes.element_bytes}. Choose the --dtype that was calibrated with, or calibrate with this one"
        )
    if asked.price is not None:
        return None
    raise UsageError(f"{problem}; or give --price, 0 for dense.")


def mask_request(source: ModelSource, dtype: str, path: Path, asked: Asked, tail: Tail | None = None) -> BuildRequest:
    """Return the build request of --method tda: prompt masks, with token thresholds.

    Raises:
        UsageError: The calibration holds no curves, or cannot meet the budget.
        TdaError: The calibration cannot be read, or is of another model.
    """
    calibration = calibration_of(path, source)
    if calibration.curves is None:
        raise UsageError(
            f"{path} contains no CETT curves. Calibrate again with 'tda-export calibrate --method tda', or build with "
            "--method priced."
        )
    refresh = asked.refresh or NO_REFRESH
    budget = asked.budget() if asked.has_budget else Budget(**calibration.provenance["budget"])
    chosen = calibration.allocate(budget, refresh.tokens)
    if budget.by_kl and tail == "zero":
        raise UsageError("--tail zero: a budget by KL is calibrated with the tail mean. Leave --tail out.")
    design = IndexedDesign(
        tda("mean" if chosen.tail_mean else tail or "zero", two_levels=True),
        chosen.thresholds,
        chosen,
        calibration.curves.up_rms.float(),
        calibrated_prior(calibration.curves, chosen.prior_tokens) if chosen.prior_tokens else None,
        refresh,
    )
    return BuildRequest(source, Storage(dtype), design, budget.describe(), path, calibration.provenance)


def griffin_request(source: ModelSource, dtype: str, sparsity: float) -> BuildRequest:
    """Return the build request of --method griffin, which needs no calibration."""
    design = IndexedDesign(griffin(sparsity), [0.0] * source.spec.num_layers)
    return BuildRequest(source, Storage(dtype), design, Budget(sparsity=sparsity, allocation="uniform").describe())
