"""Published token-level methods in PyTorch, for comparison tables: every row is computed, but only kept rows are
counted.

A method decides, for every token and layer, which rows of gate, up and down it reads. A neuron contributes where all
three of its rows are read; the rows determine the bytes. This does not run faster: only quality and bytes are measured.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.reference_data import require_gates
from tda_export.evaluation.text import TextQuality, TextSettings, WindowQuality, summarise, window_quality
from tda_export.graph.method import kept_neurons
from tda_export.models.ffn_modules import ACTIVATIONS
from tda_export.models.spec import DecoderSpec
from tda_export.packing import linear_elements

CATS_LARGEST_SPARSITY = 2 / 3  # the sparsity when no up and down row is read


class Rows(NamedTuple):
    """The rows that each token reads of each matrix, bool [T, F]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class ReferenceMethod(Protocol):
    """A method's decisions. `extra_bytes` is the number of bytes that a token reads besides the FFN's rows, in all
    layers."""

    @property
    def extra_bytes(self) -> int: ...

    def keep(self, layer: int, x: torch.Tensor, activated: torch.Tensor, up: torch.Tensor) -> Rows:
        """Choose rows from x [T, M], act(gate · x) [T, F] and up · x [T, F]; a method may only use the products whose
        rows it reads."""
        ...


@dataclass
class RowCount:
    """Rows read so far, of each matrix, summed over tokens and layers."""

    read: list[int] = field(default_factory=lambda: [0, 0, 0])  # gate, up, down
    seen: int = 0  # rows of one matrix that dense reads

    def add(self, rows: Rows) -> None:
        """Count the rows of one layer."""
        self.read = [count + int(mask.sum()) for count, mask in zip(self.read, rows, strict=True)]
        self.seen += rows.gate.numel()

    @property
    def shares(self) -> tuple[float, float, float]:
        """Return the mean shares of gate, up and down rows that a token reads."""
        gate, up, down = (count / self.seen for count in self.read)
        return gate, up, down

    @property
    def ffn_share(self) -> float:
        """Return the share of the FFN's bytes: the mean of the three shares."""
        return sum(self.shares) / 3


@contextlib.contextmanager
def sparse_ffn(model: Any, spec: DecoderSpec, method: ReferenceMethod) -> Iterator[RowCount]:
    """Let a method decide what each token computes while the block runs, and count the rows.

    Args:
        model: A transformers model; calls are of batch 1.
        spec: Its architecture, with a gated FFN.
        method: The method.

    Yields:
        The count, which grows with each call of the model.
    """
    require_gates(spec)
    count, handles = RowCount(), []
    act = ACTIVATIONS[spec.activation]

    def patch(layer: int) -> None:
        gate, up, down = (
            model.get_submodule(name.format(i=layer)) for name in (spec.names.gate, spec.names.up, spec.names.down)
        )
        seen: dict[str, torch.Tensor] = {}

        def see_gate(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen.update(x=inputs[0][0], activated=act(output[0]))

        def see_up(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            seen.update(up=output[0])

        def drop(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            h = inputs[0]  # [1, T, F]
            rows = Rows(*(mask.expand(h.shape[1:]) for mask in method.keep(layer, **seen)))
            count.add(rows)
            return (h * (rows.gate & rows.up & rows.down),)

        handles.append(gate.register_forward_hook(see_gate))
        handles.append(up.register_forward_hook(see_up))
        handles.append(down.register_forward_pre_hook(drop))

    for layer in range(spec.num_layers):
        patch(layer)
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class StaticMethod:
    """The same neurons for every prompt and token: `masks` bool [L, F]."""

    masks: torch.Tensor
    extra_bytes: int = 0

    def keep(self, layer: int, x: torch.Tensor, activated: torch.Tensor, up: torch.Tensor) -> Rows:
        mask = self.masks[layer]
        return Rows(mask, mask, mask)


def static_method(prior_scores: torch.Tensor, sparsity: float) -> StaticMethod:
    """Keep each layer's neurons with the largest prior scores, float [L, F] (`CurveSums.prior_scores`).

    All three rows of the other neurons stay unread, so the density is 1 - `sparsity`.
    """
    best = prior_scores.topk(kept_neurons(1.0 - sparsity, prior_scores.shape[1]), dim=1).indices  # [L, K]
    return StaticMethod(torch.zeros_like(prior_scores, dtype=torch.bool).scatter(1, best, True))


@dataclass(frozen=True)
class CatsMethod:
    """CATS: a token keeps the neurons with |act(gate_i · x)| >= its layer's threshold, L floats.

    Every gate row is read, and the up and down rows of kept neurons: (1 + 2 d) / 3 of the bytes. Source: arXiv
    2404.08763, section 4.
    """

    thresholds: Sequence[float]
    extra_bytes: int = 0

    def keep(self, layer: int, x: torch.Tensor, activated: torch.Tensor, up: torch.Tensor) -> Rows:
        mask = activated.abs() >= self.thresholds[layer]
        return Rows(torch.ones_like(mask), mask, mask)


def cats_density(sparsity: float) -> float:
    """Return the density at which CATS leaves a share p of the FFN's bytes unread, 1 - 3 p / 2.

    Raises:
        UsageError: The sparsity is more than 2/3.
    """
    if sparsity > CATS_LARGEST_SPARSITY:
        raise UsageError(
            f"CATS reads every gate row, so it saves at most 2/3 of the FFN's bytes, and sparsity {sparsity} is more. "
            "Give a sparsity up to 0.666."
        )
    return 1.0 - 1.5 * sparsity


def cats_threshold(activated: torch.Tensor, sparsity: float) -> float:
    """Choose a layer's threshold, the quantile of |act(gate_i · x)| that gives the density for the sparsity.

    Args:
        activated: act(gate · x) of a calibration text, float [T, F].
        sparsity: The share of FFN bytes that is not read, up to 2/3.

    Raises:
        UsageError: The sparsity is more than 2/3.
    """
    sizes = activated.abs().flatten()
    dropped = round((1.0 - cats_density(sparsity)) * sizes.numel())
    if dropped >= sizes.numel():
        return float("inf")
    return float(sizes.kthvalue(dropped + 1).values)


def measure_methods(
    model: Any,
    spec: DecoderSpec,
    windows: Sequence[Sequence[int]],
    settings: TextSettings,
    methods: Mapping[Any, ReferenceMethod],
    advance: Callable[[int], None] = lambda windows: None,
) -> dict[Any, TextQuality]:
    """Measure methods on windows of a text by the protocol of `evaluation/text.py`.

    The prompt is read densely; then its continuation in one call, densely and by every method, over the same keys and
    values. In the results, `density` is the share of down rows, and `ffn_bytes` includes a method's `extra_bytes`.
    Attention is read whole.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        windows: N windows of `settings.window` token ids (`cut_windows`).
        settings: The lengths.
        methods: The methods, by any key.
        advance: Called after every window.

    Raises:
        TdaError: A window is longer than the model's maximum, or logits are not finite.
    """
    if settings.window > spec.max_positions:
        raise TdaError(
            f"{settings.prompt_tokens} and {settings.continuation_tokens} tokens are more than the model's "
            f"{spec.max_positions} positions. Shorten one of them."
        )
    down = model.get_submodule(spec.names.down.format(i=0)).weight
    dense_bytes = 3 * spec.num_layers * spec.ffn_size * spec.hidden_size * down.element_size()
    measured: dict[Any, list[WindowQuality]] = {key: [] for key in methods}
    for window in windows:
        prompt, read = window[: settings.prompt_tokens], window[settings.prompt_tokens : -1]
        predicted = window[settings.prompt_tokens + 1 :]
        with torch.inference_mode():
            cache = model.base_model(_ids(model, prompt), use_cache=True).past_key_values
            dense = _continue(model, cache, read)
            for key, method in methods.items():
                with sparse_ffn(model, spec, method) as count:
                    sparse = _continue(model, cache, read)
                share = count.ffn_share + method.extra_bytes / dense_bytes
                quality = window_quality(dense.numpy(), sparse.numpy(), predicted, count.shares[2], share)
                measured[key].append(quality)
        advance(1)
    linears = spec.num_layers * linear_elements(spec) * down.element_size()
    return {key: summarise(qualities, dense_bytes, linears) for key, qualities in measured.items()}


def _ids(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([list(tokens)], device=model.device)


def _continue(model: Any, cache: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Read S tokens after a cache, which is not changed. Returns logits, float32 [S, V]."""
    logits = model(_ids(model, tokens), past_key_values=copy.deepcopy(cache), use_cache=True).logits[0].float().cpu()
    if not logits.isfinite().all():
        raise TdaError("The logits are not finite. Load the model in another dtype.")
    return logits
