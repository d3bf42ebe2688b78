"""The part of a calibration file for priced rows: prices, their tables, and magnitudes for other threshold methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tda_export.calibration.magnitudes import BINS, Magnitudes
from tda_export.calibration.price_table import LinearShapes, Measured
from tda_export.calibration.prices import PriceSums
from tda_export.calibration.refine import LEVEL_COLUMNS, Refinement
from tda_export.calibration.refine import LEVELS as LEVEL_SHARES
from tda_export.models.spec import DecoderSpec
from tda_export.packing import ATTENTION_PARTS, PACKINGS, Packing, RowBytes, row_bytes_from, sites_of
from tda_export.pricing import PriceTable
from tda_export.weights.formats import INTEGER_FORMATS
from tda_export.weights.plan import HEAD

# Prefixes of tensor names.
PRICES, INPUTS, WEIGHTED, NORMS, MEASURED = "prices.", "inputs.", "weighted.", "row_norms.", "measured."
REFINED = "refined."
LEVELS, STEP = "levels", "step"  # tensors of a refinement, besides those by matrix:
MOMENTS = ("factors", "first", "second")
TOKENS, SEQUENCES = "tokens", "sequences"  # tensors of prices, besides the matrices
SHORT = "short_kl"  # a tensor of the measurements, where prompts were shortened


@dataclass(frozen=True)
class Priced:
    """Prices and what they cost.

    `linears`: input channels and outputs of each part, the head among them where its rows have prices. `norms`: ||W_i||
    by matrix, float32 [L, in]. `measured`: the measurements of each packing. `row_bytes`: the bytes of the rows that
    the measured prices are meant for. `continuation_tokens`: tokens of a sequence's continuation. `prompts`: tokens of
    a short prompt and of the others; None where no prompt is short, as in older files. `refined`: the factors of the
    prices of each packing; none in older files and where prices were not refined.
    """

    linears: LinearShapes
    sums: PriceSums
    magnitudes: Magnitudes
    norms: dict[str, torch.Tensor]
    row_bytes: RowBytes
    continuation_tokens: int
    measured: dict[Packing, Measured] = field(default_factory=dict)
    prompts: tuple[int, int] | None = None
    refined: dict[Packing, Refinement] = field(default_factory=dict)

    def row_prices(
        self, spec: DecoderSpec, packing: Packing, row_bytes: RowBytes | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the prices of rows of each matrix of a packing, float32 [L, in], and of a head with prices, [1, in].

        Args:
            spec: The model's architecture.
            packing: The packing.
            row_bytes: The bytes of the rows; by default those that were measured.
        """
        prices = self.sums.row_prices(spec, packing, row_bytes or self.row_bytes)
        return self.refined[packing].apply(prices) if packing in self.refined else prices

    def table(self, packing: Packing) -> PriceTable:
        """Return the table of a packing that was measured."""
        measured = self.measured[packing]
        return measured.table(self.linears, packing, self.row_bytes, self.continuation_tokens, self.prompts)

    def tables(self) -> dict[Packing, PriceTable]:
        """Return all tables."""
        return {packing: self.table(packing) for packing in self.measured}


def describe_priced(priced: Priced) -> dict[str, Any]:
    """Return all that is not a tensor, as plain data."""
    return {
        "linears": {part: list(shape) for part, shape in priced.linears.items()},
        "element_bytes": priced.row_bytes.element_bytes,
        "formats": {name: format.name for name, format in priced.row_bytes.integers.items()},
        "continuation_tokens": priced.continuation_tokens,
        "prompts": None if priced.prompts is None else list(priced.prompts),
    }


def priced_tensors(priced: Priced) -> dict[str, torch.Tensor]:
    """Return the tensors by their names in the file."""
    tensors = {PRICES + name: value for name, value in priced.sums.square.items()}
    tensors |= {PRICES + TOKENS: priced.sums.tokens, PRICES + SEQUENCES: priced.sums.sequences}
    tensors |= {INPUTS + name: value for name, value in priced.magnitudes.inputs.items()}
    tensors |= {WEIGHTED + name: value for name, value in priced.magnitudes.weighted.items()}
    tensors |= {NORMS + name: value.cpu() for name, value in priced.norms.items()}
    for packing, refinement in priced.refined.items():
        prefix = f"{REFINED}{packing}."
        for kind in MOMENTS:
            tensors |= {f"{prefix}{kind}.{name}": value for name, value in getattr(refinement, kind).items()}
        tensors |= {prefix + LEVELS: refinement.levels, prefix + STEP: torch.tensor([refinement.step])}
    for packing, measured in priced.measured.items():
        prefix = f"{MEASURED}{packing}."
        tensors |= {prefix + name: getattr(measured, name) for name in ("prices", "kl", "agreement")}
        tensors |= {prefix + TOKENS: torch.tensor([measured.tokens])}
        tensors |= {} if measured.short_kl is None else {prefix + SHORT: measured.short_kl}
        tensors |= {f"{prefix}read.{part}": value for part, value in measured.read.items()}
    return tensors


def priced_from(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Priced:
    """Read prices back and check them.

    Args:
        content: The result of `describe_priced`.
        tensors: The tensors of `priced_tensors`; others are ignored.

    Raises:
        ValueError, KeyError, TypeError: A value is missing, of the wrong shape, not finite or negative.
    """
    linears = {str(part): (int(shape[0]), int(shape[1])) for part, shape in content["linears"].items()}
    missing = {*ATTENTION_PARTS, "up", "down"} - set(linears)
    if missing:
        raise ValueError(f"no linear {', '.join(sorted(missing))}")
    inside = tuple(part for part in linears if part != HEAD)
    sites = sites_of(inside)
    inputs = {name: linears[parts[0]][0] for name, parts in ({part: (part,) for part in inside} | sites).items()}
    layers = tensors[PRICES + "o"].shape[0]

    def read(prefix: str, names: Iterable[str], columns: int | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {name: _checked(tensors, prefix + name, dtype, (layers, columns or inputs[name])) for name in names}

    def read_head() -> dict[str, torch.Tensor]:
        return {HEAD: _checked(tensors, PRICES + HEAD, double, (1, linears[HEAD][0]))} if HEAD in linears else {}

    double = torch.float64
    sums = PriceSums(
        read(PRICES, inputs, None, double) | read_head(),
        *(_checked(tensors, PRICES + name, double, (1,)) for name in (TOKENS, SEQUENCES)),
    )
    magnitudes = Magnitudes(
        read(INPUTS, sites, BINS, torch.int64),
        read(WEIGHTED, inputs, BINS, torch.int64),
    )
    norms = read(NORMS, inputs, None, torch.float32)
    found = {name.split(".")[1] for name in tensors if name.startswith(MEASURED)}
    measured = {packing: _measured(packing, linears, layers, tensors) for packing in PACKINGS if packing in found}
    formats = {str(name): INTEGER_FORMATS[format] for name, format in dict(content.get("formats", {})).items()}
    row_bytes = row_bytes_from(layers, tuple(linears), int(content["element_bytes"]), formats)
    continuation = int(content["continuation_tokens"])
    prompts = content.get("prompts")
    prompts = None if prompts is None else (int(prompts[0]), int(prompts[1]))
    names = {name.split(".")[1] for name in tensors if name.startswith(REFINED)}
    matrices: dict[Packing, Mapping[str, tuple[str, ...]]] = {
        "separate": {part: (part,) for part in inside},
        "sites": sites,
    }
    refined = {
        packing: _refinement(f"{REFINED}{packing}.", {n: (layers, inputs[n]) for n in matrices[packing]}, tensors)
        for packing in PACKINGS
        if packing in names
    }
    return Priced(linears, sums, magnitudes, norms, row_bytes, continuation, measured, prompts, refined)


def finished(priced: Priced) -> Priced:
    """Check the prices of a finished calibration and return them.

    Raises:
        ValueError: Nothing was priced or measured, or a table is invalid.
    """
    if not (priced.sums.tokens > 0 and priced.sums.sequences > 0):
        raise ValueError("prices of no token")
    if not priced.measured:
        raise ValueError("no table of prices")
    if priced.prompts is not None and any(table.short_kl is None for table in priced.measured.values()):
        raise ValueError("no KL after short prompts")
    priced.tables()
    return priced


def _refinement(prefix: str, shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, torch.Tensor]) -> Refinement:
    def read(kind: str, *, signed: bool = True) -> dict[str, torch.Tensor]:
        return {
            name: _checked(tensors, f"{prefix}{kind}.{name}", torch.float64, shape, signed=signed)
            for name, shape in shapes.items()
        }

    count = len(LEVEL_SHARES) if len(tensors[prefix + LEVELS]) else 0
    levels = _checked(tensors, prefix + LEVELS, torch.float64, (count, LEVEL_COLUMNS), signed=True)
    step = int(_checked(tensors, prefix + STEP, torch.int64, (1,)))
    if any(name.startswith(f"{prefix}first.") for name in tensors):
        return Refinement(read("factors"), read("first"), read("second", signed=False), levels, step)
    return Refinement(read("factors"), levels=levels, step=step)


def _measured(packing: Packing, linears: LinearShapes, layers: int, tensors: Mapping[str, torch.Tensor]) -> Measured:
    prefix = f"{MEASURED}{packing}."
    prices = tensors[prefix + "prices"]
    _checked(tensors, prefix + "prices", torch.float64, (prices.numel(),))
    count = len(tensors[prefix + "kl"])
    kl = _checked(tensors, prefix + "kl", torch.float64, (count, len(prices)), signed=True)
    agreement = _checked(tensors, prefix + "agreement", torch.float64, (count, len(prices)))
    read = {
        part: _checked(tensors, f"{prefix}read.{part}", torch.float64, (len(prices), 1 if part == HEAD else layers))
        for part in linears
    }
    tokens = _checked(tensors, prefix + TOKENS, torch.int64, (1,))
    short = None
    if prefix + SHORT in tensors:
        fewer = min(count, len(tensors[prefix + SHORT]))
        short = _checked(tensors, prefix + SHORT, torch.float64, (fewer, len(prices)), signed=True)
    return Measured(prices, kl, agreement, read, int(tokens), short)


def _checked(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    signed: bool = False,
) -> torch.Tensor:
    tensor = tensors[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: expected {str(dtype).removeprefix('torch.')} {list(shape)}, "
            f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} is not finite")
    if not signed and bool((tensor < 0).any()):
        raise ValueError(f"{name} is negative")
    return tensor
