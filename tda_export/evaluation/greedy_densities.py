"""TEAL's block-wise greedy densities: how many rows each matrix of a layer drops at a sparsity of the layer.

Source: arXiv 2408.14690, Algorithm 1. Starting from dense, the matrix whose next step adds the least error of the
block's output per byte takes that step. Every layer has the same sparsity, but each spreads it differently over its
matrices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tda_export.calibration.price_file import Priced
from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.row_methods import threshold_prices
from tda_export.models.row_dropping import dropping
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, Parts, droppable_matrices, linear_shape

FORMAT = "tda-export greedy densities"
STEP = 0.1  # share of a matrix's rows
MOST_SPARSITY = 0.75  # a layer's sparsity at which the search ends


@dataclass(frozen=True)
class GreedyDensities:
    """The path of every layer: `sparsity` [L][steps], rising from 0, and the densities of the layer's matrices at each
    step.

    `density` is by matrix, [L][steps]. Layers may have different numbers of steps.
    """

    model_fingerprint: str
    packing: Packing
    parts: Parts
    sparsity: list[list[float]]
    density: dict[str, list[list[float]]]

    def at(self, sparsity: float) -> dict[str, torch.Tensor]:
        """Interpolate the densities at a sparsity of every layer, float64 [L] by matrix.

        Raises:
            UsageError: The sparsity is beyond the search.
        """
        most = min(path[-1] for path in self.sparsity)
        if sparsity > most:
            raise UsageError(
                f"Greedy densities reach sparsity {most:.3f}, and {sparsity} is more. Give a lower --sparsity."
            )
        return {
            name: torch.tensor(
                [_interpolate(sparsity, path, layer) for path, layer in zip(self.sparsity, layers, strict=True)],
                dtype=torch.float64,
            )
            for name, layers in self.density.items()
        }

    def require(self, path: Path, model_fingerprint: str, packing: Packing, parts: Parts) -> None:
        """Refuse densities that were made for something else.

        Raises:
            UsageError: They are for another model, packing or other parts.
        """
        if self.model_fingerprint != model_fingerprint:
            raise UsageError(f"{path} was made for another model. Give densities of this artifact's.")
        if (self.packing, self.parts) != (packing, parts):
            raise UsageError(
                f"{path} is of --packing {self.packing} --parts {self.parts}, and {packing} and {parts} are measured. "
                "Make another with benchmarks/teal_densities.py."
            )


def write_densities(found: GreedyDensities, path: Path) -> None:
    """Write the densities as JSON."""
    path.write_text(json.dumps({"format": FORMAT} | asdict(found)), encoding="utf-8")


def read_densities(path: Path) -> GreedyDensities:
    """Read densities back.

    Raises:
        UsageError: There is no such file.
        TdaError: The file holds something else.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Make one with benchmarks/teal_densities.py.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        found = GreedyDensities(**content)
        layers = [[len(path) for path in found.sparsity]]
        layers += [[len(path) for path in paths] for paths in found.density.values()]
        if not found.sparsity or any(other != layers[0] for other in layers) or min(layers[0]) < 1:
            raise ValueError("paths of other lengths")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TdaError(
            f"{path}: not a file of greedy densities ({error}). Make one with benchmarks/teal_densities.py."
        ) from error


def greedy_densities(
    model: Any,
    spec: DecoderSpec,
    priced: Priced,
    tokens: torch.Tensor,
    prompt_tokens: int,
    packing: Packing,
    parts: Parts,
    model_fingerprint: str,
    advance: Callable[[int], None] = lambda layers: None,
) -> GreedyDensities:
    """Search every layer's path, with the inputs of the dense model.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        priced: The magnitudes of the calibration text, which give thresholds.
        tokens: int64 [N, P + C]; rows are dropped, and errors measured, only after the prompt.
        prompt_tokens: P.
        packing: The packing of the matrices.
        parts: The parts whose rows may be dropped.
        model_fingerprint: The fingerprint of the model, stored with the densities.
        advance: Called after every layer.
    """
    sizes = {
        name: sum(linear_shape(spec, part)[0] * linear_shape(spec, part)[1] for part in members)
        for name, members in droppable_matrices(spec, packing, parts).items()
    }
    total = sum(sizes.values())
    sparsity: list[list[float]] = []
    density: dict[str, list[list[float]]] = {name: [] for name in sizes}
    for layer in range(spec.num_layers):
        block = Block(model, spec, priced, layer, tokens, prompt_tokens, packing)
        path = search_path(sizes, block.error)
        sparsity.append([sum((1 - step[name]) * size for name, size in sizes.items()) / total for step in path])
        for name in sizes:
            density[name].append([step[name] for step in path])
        advance(1)
    return GreedyDensities(model_fingerprint, packing, parts, sparsity, density)


def search_path(sizes: dict[str, int], error: Callable[[dict[str, float]], float]) -> list[dict[str, float]]:
    """Go from dense to `MOST_SPARSITY`, each time by the step that adds the least error per byte.

    Args:
        sizes: The size of each matrix, in any unit.
        error: The error of given densities by matrix; 0 when all are 1.

    Returns:
        The densities after each step, beginning with dense.
    """
    steps = dict.fromkeys(sizes, 0)
    most = round(1 / STEP) - 1  # every matrix keeps some rows
    total, now = sum(sizes.values()), 0.0

    def densities(taken: dict[str, int]) -> dict[str, float]:
        return {name: 1 - count * STEP for name, count in taken.items()}

    path = [densities(steps)]
    while sum(steps[name] * STEP * size for name, size in sizes.items()) < MOST_SPARSITY * total:
        tried = {name: error(densities(steps | {name: steps[name] + 1})) for name in sizes if steps[name] < most}
        best = min(tried, key=lambda name: (tried[name] - now) / sizes[name])
        steps[best] += 1
        now = tried[best]
        path.append(densities(steps))
    return path


class Block:
    """A layer with its inputs from the dense model."""

    def __init__(
        self,
        model: Any,
        spec: DecoderSpec,
        priced: Priced,
        layer: int,
        tokens: torch.Tensor,
        prompt_tokens: int,
        packing: Packing,
    ) -> None:
        self._model, self._spec, self._priced, self._layer, self._packing = model, spec, priced, layer, packing
        self._module = model.get_submodule(spec.names.query.split("{i}")[0] + str(layer))
        self._prompt = prompt_tokens
        self._price = torch.zeros(tokens.shape[1], 1)
        self._price[prompt_tokens:] = 1.0
        self._calls: list[tuple[Any, Any]] = []
        handle = self._module.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            with torch.inference_mode():
                for sequence in tokens:
                    model.base_model(sequence[None].to(model.device), use_cache=False)
        finally:
            handle.remove()
        self._dense = self._outputs()

    def _keep(self, module: torch.nn.Module, arguments: Any, options: Any) -> None:
        self._calls.append((arguments, options))

    def _outputs(self) -> list[torch.Tensor]:
        found = []
        with torch.inference_mode():
            for arguments, options in self._calls:
                output = self._module(*arguments, **options)
                hidden = output[0] if isinstance(output, tuple) else output
                found.append(hidden.flatten(0, -2)[self._prompt :].float())
        return found

    def error(self, densities: dict[str, float]) -> float:
        """Return the L2 error of the block's output after the prompt, where its matrices have these densities."""
        layers = self._spec.num_layers
        wanted = {name: torch.full((layers,), density) for name, density in densities.items() if density < 1}
        prices = threshold_prices("teal", self._priced, self._spec, self._packing, wanted)
        with dropping(self._model, self._spec, prices, self._price):
            outputs = self._outputs()
        squares = [(some - dense).square().sum() for some, dense in zip(outputs, self._dense, strict=True)]
        return float(torch.stack(squares).sum().sqrt())


def _interpolate(sparsity: float, path: Sequence[float], values: Sequence[float]) -> float:
    after = next((index for index, there in enumerate(path) if there >= sparsity), len(path) - 1)
    if after == 0:
        return values[0]
    weight = (sparsity - path[after - 1]) / (path[after] - path[after - 1])
    return (1 - weight) * values[after - 1] + weight * values[after]
