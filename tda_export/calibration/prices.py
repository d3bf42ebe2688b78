"""Prices of rows: the cost in likelihood of dropping an input channel of a matrix, from gradients at the dense point.

Dropping x_i at a token moves the log-likelihood by about g_i x_i, so the expected KL is ½ c_i² x_i² with c_i² =
E[g_i²], the Fisher information. g_i is the gradient of the log-likelihood of a continuation's labels, drawn from the
model's own distribution, with respect to the input channel of that one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tda_export.errors import TdaError
from tda_export.models.linear_modules import Linear, layer_linears
from tda_export.models.placement import weights_fetched_again
from tda_export.models.spec import DecoderSpec
from tda_export.packing import Packing, RowBytes, linear_outputs, linear_shape, linear_sites, packed_matrices
from tda_export.weights.plan import HEAD

# The factor of float16 models' gradients; a smaller one is used where this overflows.
HALF_SCALE, SMALLEST_SCALE, SCALE_STEP = 2.0**10, 2.0**-10, 2.0**5
SEED_STEP = 1_000_003  # distance between the label seeds of two seeds

ChooseLabels = Callable[[torch.Tensor], torch.Tensor]  # logits float32 [T, V] to labels int64 [n, T]


def priced_matrices(spec: DecoderSpec) -> dict[str, tuple[str, ...]]:
    """Name all matrices of a layer with prices, and their parts: each part, and each site of several parts."""
    return packed_matrices(spec, "separate") | packed_matrices(spec, "sites")


@dataclass(frozen=True)
class PriceSums:
    """Sums over calibration sequences. The sums of two halves add up to the sums of the whole. All are float64 on the
    CPU.

    `square`: by matrix (a part, or a site of several), [L, in], and where the head has prices, of it, [1, in]: the sum
    of g_i² over `tokens` [1] tokens, each counted once for every label, of `sequences` [1] sequences.
    """

    square: dict[str, torch.Tensor]
    tokens: torch.Tensor
    sequences: torch.Tensor

    def __add__(self, other: PriceSums) -> PriceSums:
        square = {name: value + other.square[name] for name, value in self.square.items()}
        return PriceSums(square, self.tokens + other.tokens, self.sequences + other.sequences)

    def row_prices(self, spec: DecoderSpec, packing: Packing, row_bytes: RowBytes) -> dict[str, torch.Tensor]:
        """Return c_i² / bytes_i of each matrix of a packing, float32 [L, in], and of the head, [1, in], where it was
        priced and `row_bytes` has it."""
        outputs, matrices = linear_outputs(spec), packed_matrices(spec, packing)
        found = {}
        head = {HEAD: (HEAD,)} if HEAD in self.square and HEAD in row_bytes.formats else {}
        for name, parts in (matrices | head).items():
            layers = range(len(self.square[name]))
            sizes = torch.tensor([row_bytes.of(layer, parts, outputs) for layer in layers], dtype=torch.float64)
            found[name] = (self.square[name] / self.tokens / sizes[:, None]).float()
        return found


def no_prices(spec: DecoderSpec, *, head: bool = False) -> PriceSums:
    """Return empty sums; `head` says whether the head's rows get prices too."""
    square = {
        name: torch.zeros(spec.num_layers, linear_shape(spec, parts[0])[0], dtype=torch.float64)
        for name, parts in priced_matrices(spec).items()
    }
    if head:
        square[HEAD] = torch.zeros(1, linear_shape(spec, HEAD)[0], dtype=torch.float64)
    return PriceSums(square, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


def sampled_labels(count: int, seed: int, index: int) -> ChooseLabels:
    """Return a function that draws labels from the model's own distribution, reproducibly for each sequence.

    Args:
        count: The number of labels of each token.
        seed: The seed of the calibration.
        index: The number of the sequence.
    """

    def choose(logits: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed((seed * SEED_STEP + index) % 2**63)
        probabilities = logits.softmax(dim=-1).cpu()
        labels = torch.multinomial(probabilities, count, replacement=True, generator=generator)  # [T, n]
        return labels.T.to(logits.device)

    return choose


def read_prompt(model: Any, prompt: torch.Tensor) -> Any:
    """Read a prompt int64 [P] densely and return its keys and values."""
    with torch.no_grad():
        return model.base_model(prompt[None].to(model.device), use_cache=True).past_key_values


def price_continuation(
    model: Any,
    spec: DecoderSpec,
    cache: Any,
    continuation: torch.Tensor,
    choose: ChooseLabels,
    *,
    head: bool = False,
) -> PriceSums:
    """Price the rows by one continuation of a prompt.

    Every token except the last has labels. The gradients of every token count.

    Args:
        model: A transformers model in evaluation mode, whose parameters need no gradient.
        spec: Its architecture.
        cache: The prompt's keys and values, to which the continuation's are added.
        continuation: int64 [C], C at least 2.
        choose: Chooses the labels of the C - 1 tokens.
        head: Whether to price the head's rows too.

    Raises:
        TdaError: Gradients are not finite.
    """
    gradients = _Gradients(model, spec, head=head)
    embedding = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.detach().requires_grad_()
    )
    try:
        with torch.enable_grad(), weights_fetched_again(model):
            logits = model(continuation[None].to(model.device), past_key_values=cache, use_cache=True).logits[0]
            log_probs = logits[:-1].float().log_softmax(dim=-1)  # [C - 1, V]
            rows = choose(logits[:-1].detach().float())
            losses = [log_probs.gather(1, labels[:, None]).sum() for labels in rows]
            squares = [gradients.squares(loss, model.dtype) for loss in losses]
    finally:
        embedding.remove()
        gradients.remove()
    tokens = torch.tensor([len(squares) * len(continuation)], dtype=torch.float64)
    square = {name: torch.stack([of[name] for of in squares]).sum(dim=0) for name in squares[0]}
    return PriceSums(square, tokens, torch.ones(1, dtype=torch.float64))


class _Gradients:
    """Squares of the gradients with respect to the input of every matrix, summed over tokens, from backward passes."""

    def __init__(self, model: Any, spec: DecoderSpec, *, head: bool) -> None:
        self._spec, self._device, self._head = spec, model.device, head
        self._sites = {part: (site, parts) for site, parts in linear_sites(spec).items() for part in parts}
        self._found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self._square: dict[str, list[torch.Tensor]] = {}
        self._scale = 1.0
        self._handles: list[Any] = []
        for layer in range(spec.num_layers):
            for part, linear in layer_linears(model, spec, layer).items():
                self._handles.append(linear.on_input_gradient(self._observer(layer, part)))
        if head:
            self._sites[HEAD] = (HEAD, (HEAD,))
            self._handles.append(Linear(model, spec, 0, HEAD).on_input_gradient(self._observer(0, HEAD)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def squares(self, loss: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Run a backward pass from a loss; the autograd graph is kept."""
        self._scale = HALF_SCALE if dtype == torch.float16 else 1.0
        while True:
            self._square = {name: [torch.empty(0)] * self._spec.num_layers for name in priced_matrices(self._spec)}
            self._square |= {HEAD: [torch.empty(0)]} if self._head else {}
            (loss * self._scale).backward(retain_graph=True)
            square = {
                name: torch.stack([each.to(self._device) for each in layers]).cpu()
                for name, layers in self._square.items()
            }
            if all(bool(value.isfinite().all()) for value in square.values()):
                return square
            self._scale /= SCALE_STEP
            if dtype != torch.float16 or self._scale < SMALLEST_SCALE:
                raise TdaError("Gradients are not finite. Calibrate with --dtype bf16 or fp32.")

    def _observer(self, layer: int, part: str) -> Callable[[torch.Tensor], None]:
        site, parts = self._sites[part]

        def observe(gradient: torch.Tensor) -> None:
            gradient = gradient.float() / self._scale
            self._square[part][layer] = gradient.square().sum(dim=0, dtype=torch.float64)
            if len(parts) == 1:
                return
            found = self._found.setdefault((layer, site), {})
            found[part] = gradient
            if len(found) == len(parts):
                # In the order of the parts, not of their arrival, so that sums round in the same way.
                together = torch.stack([found[name] for name in parts]).sum(dim=0)
                self._square[site][layer] = together.square().sum(dim=0, dtype=torch.float64)
                del self._found[layer, site]

        return observe
