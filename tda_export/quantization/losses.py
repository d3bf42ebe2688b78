"""What each linear alone loses once it is rounded: an estimate for all of them, from a few backward passes.

E [in, out] is the error of a matrix, and ∇ [in, out] the gradient of a sequence's log-likelihood by the matrix, for
labels drawn from the model's own distribution. Rounding moves the log-likelihood by <E, ∇>, so the expected KL is
½ E[<E, ∇>²] (the Fisher information, as in `calibration.prices`). The columns of E are errors of different outputs, and
nearly independent. So this is about ½ |E^T ∇|² / out (Frobenius norm), an average with much less noise. With the inputs
X [T, in] and the gradients G [T, out] of the outputs, ∇ = X^T G, and |E^T ∇|² is the sum of all elements of
(XE (XE)^T) * (G G^T), both [T, T].

E is the error of rounding to nearest. For GPTQ it is passed on to later rows as GPTQ does, with Hessians of sequences
that give no gradients.

Only one layer is in memory at a time. A first pass, from the first layer to the last, keeps the inputs of each layer
and XE (XE)^T. A second one, from the last layer to the first, runs each layer again and takes G.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch

from tda_export.calibration.prices import sampled_labels
from tda_export.errors import TdaError
from tda_export.models.layerwise import LayerwiseModel, layers_skipped
from tda_export.models.linear_modules import layer_linears
from tda_export.models.source import ModelSource
from tda_export.packing import linear_outputs, linear_sites
from tda_export.progress import Advance
from tda_export.quantization.code_tensors import CodeTensors
from tda_export.quantization.gptq import passed_on
from tda_export.quantization.hessians import layer_hessians, site_order
from tda_export.quantization.layers import first_inputs, layer_calls, pass_on
from tda_export.quantization.nearest import read_matrix, round_matrix
from tda_export.quantization.settings import LABELS, QuantizeSettings
from tda_export.ranks import ALONE, Ranks
from tda_export.weights.integers import Codes
from tda_export.weights.plan import FormatPlan, part_name

TOKENS_AT_ONCE = 128  # tokens whose logits are in memory


def linear_losses(
    source: ModelSource,
    model: LayerwiseModel,
    plan: FormatPlan,
    names: Collection[str],
    tokens: torch.Tensor,
    settings: QuantizeSettings,
    *,
    advance: Advance,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Estimate the KL to the float model, in nats a token, that each linear causes if it alone is rounded.

    Args:
        source: The float model.
        model: The same model, a layer at a time.
        plan: The format of each matrix.
        names: The linears, integers in the plan.
        tokens: int64 [N, T], N at least 1: first those that give gradients (`QuantizeSettings.estimated_on`), then
            those of GPTQ's Hessians.
        settings: The quantiser, the zero points and the seed.
        advance: Called with the number of finished layers, twice for each.
        ranks: The ranks that share the sequences; all return the same result.

    Raises:
        TdaError: The model holds non-finite numbers.
    """
    estimate = _Estimate(source, model, plan, names, tokens, settings, ranks)
    layers = range(source.spec.num_layers)
    for layer in layers:
        estimate.forward(layer)
        advance(1)
    estimate.begin_backward()
    for layer in reversed(layers):
        estimate.backward(layer)
        advance(1)
    return estimate.losses()


class _Estimate:
    """One estimate on its way through the model and back."""

    def __init__(
        self,
        source: ModelSource,
        model: LayerwiseModel,
        plan: FormatPlan,
        names: Collection[str],
        tokens: torch.Tensor,
        settings: QuantizeSettings,
        ranks: Ranks,
    ) -> None:
        self._spec, self._weights, self._model = source.spec, source.weights(), model
        self._formats = {name: plan.integers[name] for name in names}
        self._settings, self._ranks = settings, ranks
        count = settings.estimated_on(len(tokens))
        self._tokens = tokens[:count]
        self._own = list(range(ranks.number, count, ranks.count))
        self._calls = layer_calls(model.model, self._spec, tokens[0])
        self._others = first_inputs(model.model, self._spec, tokens[count:][ranks.number :: ranks.count])
        # By layer, and after the last one: what it reads of each of this rank's sequences, [1, T, M].
        self._hidden = [first_inputs(model.model, self._spec, tokens[self._own])]
        self._products: dict[str, list[torch.Tensor]] = {name: [] for name in names}  # XE (XE)^T of each sequence
        self._gradients: list[torch.Tensor] = []  # of each sequence's hidden state by label, [n, 1, T, M]
        self._squares: list[dict[str, torch.Tensor]] = [{} for _ in self._own]  # |E^T ∇|², summed over labels

    def forward(self, layer: int) -> None:
        """Pass a layer, and keep what its linears' errors do to their outputs."""
        with self._model.layer(layer):
            linears = layer_linears(self._model.model, self._spec, layer)
            handles = []
            for part, errors in self._errors(layer).items():
                keep = partial(_keep_products, self._products[part_name(layer, part)], errors)
                handles.append(linears[part].on_input(keep))
            self._hidden.append(list(self._hidden[layer]))
            try:
                pass_on(self._calls[layer], self._hidden[-1], self._model.device)
            finally:
                for handle in handles:
                    handle.remove()

    def begin_backward(self) -> None:
        """Take the gradients of the log-likelihood by the last layer's output."""
        pieces = -(-self._tokens.shape[1] // TOKENS_AT_ONCE)
        for number, hidden in zip(self._own, self._hidden.pop(), strict=True):
            found = []
            for piece, left in enumerate(hidden.split(TOKENS_AT_ONCE, dim=1)):
                tokens = self._tokens[number].split(TOKENS_AT_ONCE)[piece]
                found.append(self._label_gradients(number * pieces + piece, tokens, left))
            self._gradients.append(torch.cat(found, dim=2))

    def backward(self, layer: int) -> None:
        """Run a layer again, and take the gradients of its linears' outputs and of its input."""
        inputs, call = self._hidden.pop(), self._calls[layer]
        with self._model.layer(layer):
            linears = layer_linears(self._model.model, self._spec, layer)
            for index, hidden in enumerate(inputs):
                found: dict[str, torch.Tensor] = {}
                handles = [
                    linears[part].on_output_gradient(partial(_add_products, found, part)) for part in self._parts(layer)
                ]
                left = hidden.to(self._model.device).requires_grad_()
                try:
                    with torch.enable_grad():
                        output = call(left)
                    for gradient in self._gradients[index]:
                        (own,) = torch.autograd.grad(output, left, gradient.to(left), retain_graph=True)
                        gradient.copy_(own)
                finally:
                    for handle in handles:
                        handle.remove()
                for part, products in found.items():
                    name = part_name(layer, part)
                    other = self._products[name][index].to(products)
                    self._squares[index][name] = (products * other).sum(dtype=torch.float64).cpu()
        for part in self._parts(layer):
            del self._products[part_name(layer, part)]

    def losses(self) -> dict[str, float]:
        """Add up the sequences of all ranks."""
        own = iter(self._squares)
        found = list(self._ranks.in_order(list(self._tokens), lambda sequence, together: next(own)))
        outputs = linear_outputs(self._spec)
        losses = {}
        for name in self._formats:
            tokens = LABELS * self._tokens.numel() * outputs[name.rpartition(".")[2]]
            losses[name] = sum(float(of_sequence[name]) for of_sequence in found) / 2 / tokens
            if not 0 <= losses[name] < float("inf"):
                raise TdaError(f"{name}: the estimate of its loss is not finite. Check the checkpoint.")
        return losses

    def _parts(self, layer: int) -> list[str]:
        return [part for part in linear_outputs(self._spec) if part_name(layer, part) in self._formats]

    def _errors(self, layer: int) -> dict[str, torch.Tensor]:
        """Return the errors of the layer's linears by part, float32 [in, out] on the layer's device."""
        errors: dict[str, torch.Tensor] = {}
        hessians: dict[str, torch.Tensor] = {}
        if self._settings.quantizer == "gptq":
            hessians = layer_hessians(self._model.model, self._spec, layer, self._calls[layer], self._others)
        for site, parts in linear_sites(self._spec).items():
            wanted = [part for part in parts if part_name(layer, part) in self._formats]
            found = self._rounding_errors(layer, wanted)
            hessian = hessians.pop(site, None)
            if hessian is not None and wanted:
                self._ranks.add_up(hessian)
                rows = site_order(hessian, layer, site)
                found = {part: passed_on(each, rows) for part, each in found.items()}
            errors |= found
        return errors

    def _rounding_errors(self, layer: int, parts: list[str]) -> dict[str, torch.Tensor]:
        names, device = {part: part_name(layer, part) for part in parts}, self._model.device
        weights = {part: read_matrix(self._spec, self._weights, name, device) for part, name in names.items()}

        def rounded(part: str, together: int) -> Codes:
            format = self._formats[names[part]]
            return round_matrix(names[part], weights[part], format, symmetric=self._settings.symmetric)

        codes = zip(parts, self._ranks.in_order(parts, rounded), strict=True)
        return {part: CodeTensors.of(each, device).decode() - weights[part] for part, each in codes}

    def _label_gradients(self, index: int, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return the gradients of the log-likelihood of labels by the hidden states [1, T, M] that they are predicted
        from, [n, 1, T, M] on the CPU. `index` seeds the labels."""
        model, left = self._model.model, hidden.to(self._model.device).requires_grad_()
        with torch.enable_grad(), layers_skipped(model, self._spec, left):
            logits = model(tokens[None].to(self._model.device), use_cache=False).logits[0].float()
            log_probs = logits.log_softmax(dim=-1)  # [T, V]
        if not bool(log_probs.isfinite().all()):
            raise TdaError(f"{self._model.name}: the logits are not finite. Download the weights again.")
        labels = sampled_labels(LABELS, self._settings.seed, index)(logits.detach())
        found = [
            torch.autograd.grad(log_probs.gather(1, each[:, None]).sum(), left, retain_graph=True)[0] for each in labels
        ]
        return torch.stack(found).cpu()


def _keep_products(kept: list[torch.Tensor], errors: torch.Tensor, x: torch.Tensor) -> None:
    moved = x.float() @ errors
    kept.append((moved @ moved.T).cpu())


def _add_products(sums: dict[str, torch.Tensor], part: str, gradient: torch.Tensor) -> None:
    products = gradient @ gradient.T
    sums[part] = sums[part] + products if part in sums else products
