"""Quantise a model: the embedding first, then layer after layer, then the head, each with all that is before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tda_export
from tda_export.calibration.corpus import Corpus
from tda_export.calibration.run import RECORDED_PACKAGES
from tda_export.models.layerwise import LayerwiseModel
from tda_export.models.layout import module_parts, module_weight
from tda_export.models.placement import AUTO
from tda_export.models.quantised import matrix_shape
from tda_export.models.source import ModelSource
from tda_export.packing import linear_parts, linear_sites
from tda_export.progress import Advance
from tda_export.quantization.code_tensors import CodeTensors
from tda_export.quantization.gptq import LazyMatrix, quantise_together, why_slow
from tda_export.quantization.hessians import head_hessian, named_order, site_hessian, site_order
from tda_export.quantization.kl import Compared, Loss, compare, summarise
from tda_export.quantization.layers import (
    Call,
    continuation_log_probabilities,
    first_inputs,
    float_log_probabilities,
    layer_calls,
    pass_on,
)
from tda_export.quantization.losses import linear_losses
from tda_export.quantization.nearest import check_scales, read_matrix, round_matrix
from tda_export.quantization.resume import KeptCodes, LayerSaver, PartialLayers
from tda_export.quantization.settings import LABELS, QuantizeSettings, split
from tda_export.ranks import ALONE, Ranks
from tda_export.versions import installed_versions
from tda_export.weights.formats import IntegerFormat
from tda_export.weights.integers import Codes, PackedCodes
from tda_export.weights.mixture import Mixture
from tda_export.weights.plan import EMBEDDING, HEAD, FormatPlan, part_name

HEAD_ELEMENTS = 1 << 27  # of the head that are rounded at a time

Show = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True)
class Quantised:
    """A quantised model: its codes by matrix, which the first rank alone has, their formats, and further entries of
    config.json.

    With an output, codes of layers lie in files next to it until `PartialLayers.remove`.
    """

    codes: Mapping[str, Codes]
    plan: FormatPlan
    about: dict[str, Any]
    loss: Loss | None


def quantize(
    source: ModelSource,
    corpus: Corpus | None,
    settings: QuantizeSettings,
    *,
    show: Show,
    output: Path | None = None,
    ranks: Ranks = ALONE,
    notify: Callable[[str], object] = lambda line: None,
) -> Quantised:
    """Quantise a model.

    Args:
        source: The float model.
        corpus: Sequences of `settings.length` tokens; None where no data are needed.
        settings: How to quantise.
        show: Opens the progress display of a step, given its description and number of units.
        output: The folder that will be written. Layers that an interrupted run finished are read from next to it
            (`PartialLayers`). Only the first rank writes there.
        ranks: The ranks that share sequences and matrices; all return the same result, but for codes of linears.
        notify: Called with lines that are for the user.

    Raises:
        UsageError: A rule matches nothing, or there is too little text.
        TdaError: The model holds non-finite numbers.
    """
    spec, plan, mixture = source.spec, settings.plan(source.spec), settings.mixture(source.spec)
    tokens, held_out = split(corpus, settings)
    about = _about(source, ranks.from_first(lambda: source.fingerprint), corpus, settings, len(tokens), len(held_out))
    versions = {"tda-export": tda_export.__version__, **installed_versions(RECORDED_PACKAGES)}

    def kept(plan: FormatPlan) -> PartialLayers | None:
        layers = {name: format for name, format in plan.to_dict().items() if name != HEAD}  # the head comes last
        key = about | {"formats": layers, "device": settings.device, "versions": versions}
        return PartialLayers(output, key) if output and ranks.first else None

    device = _device(settings.device, ranks)
    model = LayerwiseModel(source, device) if len(tokens) or len(held_out) else None
    if model is not None and settings.quantizer == "gptq":
        possible = (plan,) if mixture is None else (mixture.fours, mixture.eights)
        formats = frozenset().union(*(each.gptq_formats for each in possible))
        reason = why_slow(torch.device(device), formats, settings.symmetric)
        if reason is not None:
            notify(
                f"Triton's kernel cannot run ({reason}), so rounding takes several times as long. Triton needs a C "
                "compiler and Python's header files."
            )
    own = held_out[ranks.number :: ranks.count]
    dense: list[torch.Tensor] = []
    if model is not None and len(held_out):
        with show("Reading the float model", spec.num_layers) as advance:
            dense = float_log_probabilities(model, own, settings.continuation_tokens, advance)
    if mixture is not None:
        assert model is not None
        losses = _losses(source, model, mixture, tokens, settings, kept(plan), show, ranks)
        plan = mixture.choose(losses)
        data = {"sequences": settings.estimated_on(len(tokens)), "labels": LABELS}
        about |= {"mixture": mixture.describe(plan) | data}
    if settings.quantizer == "rtn":
        tokens = tokens[:0]  # they were for the losses
    layers = kept(plan)
    with LayerSaver(layers) if layers else nullcontext() as saver:
        run = _Run(source, plan, settings, device, model, tokens, own, saver, ranks)
        with show("Quantising", spec.num_layers + 2) as advance:
            run.begin()
            advance(1)
            for layer in range(spec.num_layers):
                run.layer(layer)
                advance(1)
            run.head()
            advance(1)
    measured = None
    if len(held_out):
        pairs = iter(zip(dense, run.log_probabilities(), strict=True))

        def measure(sequence: torch.Tensor, together: int) -> Compared:
            float_model, quantised = next(pairs)
            advance(together)
            return compare(float_model, quantised)

        with show("Measuring", len(held_out)) as advance:
            measured = summarise(list(ranks.in_order(list(held_out), measure)))
        about |= {"loss": measured.describe()}
    return Quantised(run.codes, plan, about | {"versions": versions}, measured)


def _device(device: str, ranks: Ranks) -> str:
    """Return the device of this rank's layers and of its rounding, given --device; `auto` is a GPU if there is one."""
    if device != AUTO:
        return ranks.own_device(device)
    return ranks.own_device("cuda") if torch.cuda.is_available() else "cpu"


def _losses(
    source: ModelSource,
    model: LayerwiseModel,
    mixture: Mixture,
    tokens: torch.Tensor,
    settings: QuantizeSettings,
    kept: PartialLayers | None,
    show: Show,
    ranks: Ranks,
) -> dict[str, float]:
    """Estimate what each open linear loses in four bits, or read what an interrupted run estimated."""
    names = mixture.open
    found = ranks.from_first(lambda: kept.load_losses(names) if kept else None)
    if found is None:
        with show("Estimating losses", 2 * source.spec.num_layers) as advance:
            found = linear_losses(source, model, mixture.fours, names, tokens, settings, advance=advance, ranks=ranks)
        if kept:
            kept.save_losses(found)
    return found


class _Run:
    """One quantisation on its way through the model. Without a model, weights are only rounded and nothing is run.

    Two kinds of sequences pass through each layer once it is quantised: those that GPTQ reads, and those held out for
    the loss.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: FormatPlan,
        settings: QuantizeSettings,
        device: str,
        model: LayerwiseModel | None,
        tokens: torch.Tensor,
        held_out: torch.Tensor,
        saver: LayerSaver | None,
        ranks: Ranks,
    ) -> None:
        self._spec, self._weights = source.spec, source.weights()
        self._plan, self._settings, self._model, self._saver = plan, settings, model, saver
        self._device, self._tokens, self._held_out, self._ranks = device, tokens, held_out, ranks
        self.codes = KeptCodes()
        self._calls: list[Call] = []
        self._inputs: list[torch.Tensor] = []
        self._left: list[torch.Tensor] = []

    def begin(self) -> None:
        """Quantise the embedding, and a head that lies by output, and read the sequences up to the first layer."""
        if self._plan.head_major == "input":
            wanted = [EMBEDDING]
            for piece in self._head_pieces() if self._settings.quantizer == "gptq" else ():
                piece.read(slice(0, piece.outputs))  # refuses weights that are not finite, before long work
        else:
            wanted = [EMBEDDING, HEAD]
            if self._model is not None and self._spec.tied_head and HEAD in self._plan.formats:  # and stays float
                self._model.put(self._spec.names.head, read_matrix(self._spec, self._weights, HEAD))
        self._round_outside([name for name in wanted if name in self._plan.integers])
        if self._model is not None:
            model, own = self._model.model, self._tokens[self._ranks.number :: self._ranks.count]
            for sequence in (self._tokens if len(self._tokens) else self._held_out)[:1]:  # a rank may have no sequences
                self._calls = layer_calls(model, self._spec, sequence)
            self._inputs = first_inputs(model, self._spec, own)
            self._left = first_inputs(model, self._spec, self._held_out)

    def layer(self, layer: int) -> None:
        """Quantise the linears of a layer, site by site, each with the quantised sites before it."""
        linears = [f"{module.format(i=layer)}.weight" for module in module_parts(self._spec)]
        with self._model.layer(layer, unread=linears) if self._model else nullcontext():
            self._quantise(layer)
            if self._model is not None and self._calls:
                unread = layer + 1 == self._spec.num_layers and self._plan.head_major == "output"
                for sequences in (self._left,) if unread else (self._inputs, self._left):
                    pass_on(self._calls[layer], sequences, self._model.device)

    def head(self) -> None:
        """Quantise a head that lies by input, as the layers' linears do."""
        if self._plan.head_major == "output":
            return
        if self._settings.quantizer == "rtn":
            self._round_outside([HEAD])
            return
        assert self._model is not None
        sequence = (self._tokens if len(self._tokens) else self._held_out)[0]
        hessian = head_hessian(self._model.model, self._spec, sequence, self._inputs)
        self._ranks.add_up(hessian)
        order = named_order(hessian, HEAD)
        format, symmetric = self._plan.integers[HEAD], self._settings.symmetric
        self._model.drop(self._spec.names.head)  # memory holds one head of floats
        inputs, outputs = matrix_shape(self._spec, HEAD, "input")
        values, kept, start = torch.empty(outputs, inputs, device=self._device), [], 0
        for piece in self._head_pieces():
            (found,) = quantise_together([piece], order, format, symmetric=symmetric, ranks=self._ranks)
            check_scales(HEAD, format, bool(found.scales.isfinite().all()))
            values[start : start + piece.outputs] = found.decode().T
            start += piece.outputs
            if self._ranks.first:
                kept.append(found.cpu())
        self._model.put(self._spec.names.head, values)
        if kept:
            self.codes.keep({HEAD: CodeTensors.beside(kept).pack()})

    def _head_pieces(self) -> Iterator[LazyMatrix]:
        """Yield the head [in, out], some columns at a time."""
        inputs, outputs = matrix_shape(self._spec, HEAD, "input")
        read = partial(read_matrix, self._spec, self._weights, HEAD, self._device, head_major="input")
        return LazyMatrix(outputs, read).pieces(HEAD_ELEMENTS // inputs, self._plan.integers[HEAD])

    def _round_outside(self, names: list[str]) -> None:
        """Round embedding, head or both to nearest."""
        integers, major = self._plan.integers, self._plan.head_major

        def rounded(name: str, together: int) -> Codes:
            # In the CPU's memory; the device gets pieces.
            rows = read_matrix(self._spec, self._weights, name, head_major=major)
            return round_matrix(name, rows, integers[name], symmetric=self._settings.symmetric, device=self._device)

        for name, found in zip(names, self._ranks.in_order(names, rounded), strict=True):
            self._keep_outside(name, PackedCodes.of(found), CodeTensors.of(found).decode())

    def _keep_outside(self, name: str, codes: PackedCodes, decoded: torch.Tensor) -> None:
        """Keep the codes of embedding or head, and give the model their values."""
        self.codes.keep({name: codes})
        if self._model is None:
            return
        if name == HEAD and self._plan.head_major == "input":
            self._model.put(self._spec.names.head, decoded.T.contiguous())  # where it was the embedding so far, too
        else:
            module = self._spec.names.embedding if name == EMBEDDING else self._spec.names.head
            parameter = self._model.model.get_submodule(module).weight  # that a tied head shares
            parameter.data = decoded.to(parameter)

    def log_probabilities(self) -> Iterator[torch.Tensor]:
        """Yield the log-probabilities after each token of each held-out continuation, float32 [C, V] on the CPU."""
        assert self._model is not None
        kept = self._settings.continuation_tokens
        return continuation_log_probabilities(self._model, self._held_out, self._left, kept)

    def _quantise(self, layer: int) -> None:
        names = [part_name(layer, part) for part in linear_parts(self._spec)]
        formats = {name: format for name in names if (format := self._plan.integers.get(name)) is not None}
        shapes = {name: (format, matrix_shape(self._spec, name)) for name, format in formats.items()}
        earlier = self._ranks.from_first(lambda: self._saver.layers.load(layer, shapes) if self._saver else None)
        codes: dict[str, PackedCodes] = {}
        for site, parts in linear_sites(self._spec).items():
            wanted = {part: formats[name] for part in parts if (name := part_name(layer, part)) in formats}
            if earlier is None:
                found = self._site(layer, site, wanted)
            else:
                found = {part: CodeTensors.of(earlier[part_name(layer, part)], self._device) for part in wanted}
            if earlier is None and self._ranks.first:
                codes |= {part_name(layer, part): of_part.pack() for part, of_part in found.items()}
            if self._model is not None:
                values = {
                    part: found[part].decode() if part in found else self._matrix(layer, part, slice(None))
                    for part in parts
                }
                self._put_parts(layer, values)
        if self._saver and formats:
            if earlier is None:
                self._saver.save(layer, codes)
            self.codes.keep_saved(self._saver.layers, layer, shapes)
        else:
            self.codes.keep(codes)

    def _matrix(self, layer: int, part: str, columns: slice) -> torch.Tensor:
        """Read columns of a linear [in, out] onto this rank's device."""
        return read_matrix(self._spec, self._weights, part_name(layer, part), self._device, columns)

    def _site(self, layer: int, site: str, wanted: dict[str, IntegerFormat]) -> dict[str, CodeTensors]:
        """Quantise the parts of a site that have a format, and return codes by part."""
        symmetric, ranks = self._settings.symmetric, self._ranks
        if self._settings.quantizer == "rtn" or not wanted:

            def rounded(part: str, together: int) -> Codes:
                rows = self._matrix(layer, part, slice(None))
                return round_matrix(part_name(layer, part), rows, wanted[part], symmetric=symmetric)

            codes = zip(wanted, ranks.in_order(list(wanted), rounded), strict=True)
            return {part: CodeTensors.of(of_part, self._device) for part, of_part in codes}
        assert self._model is not None
        hessian = site_hessian(self._model.model, self._spec, layer, site, self._calls[layer], self._inputs)
        ranks.add_up(hessian)
        order = site_order(hessian, layer, site)
        found: dict[str, CodeTensors] = {}
        for format in dict.fromkeys(wanted.values()):
            parts = [part for part in wanted if wanted[part] == format]
            matrices = [
                LazyMatrix(matrix_shape(self._spec, part_name(layer, part))[1], partial(self._matrix, layer, part))
                for part in parts
            ]
            together = quantise_together(matrices, order, format, symmetric=symmetric, ranks=ranks)
            found |= dict(zip(parts, together, strict=True))
        for part, of_part in found.items():
            check_scales(part_name(layer, part), of_part.format, bool(of_part.scales.isfinite().all()))
        return {part: found[part] for part in wanted}

    def _put_parts(self, layer: int, values: dict[str, torch.Tensor]) -> None:
        assert self._model is not None
        for module, parts in module_parts(self._spec).items():
            if parts[0] in values:
                weight = module_weight(self._spec, {part: values[part] for part in parts})
                self._model.put(module.format(i=layer), weight)


def _about(
    source: ModelSource,
    fingerprint: str,
    corpus: Corpus | None,
    settings: QuantizeSettings,
    read: int,
    held_out: int,
) -> dict[str, Any]:
    model = {"name": source.name, "architecture": source.spec.architecture, "fingerprint": fingerprint}
    content: dict[str, Any] = {"quantizer": settings.describe(), "model": model}
    if corpus is not None:
        lengths = {"prompt_tokens": settings.prompt_tokens, "continuation_tokens": settings.continuation_tokens}
        described = corpus.describe() | {"sequences": read, "kl_sequences": held_out, "seed": settings.seed}
        content["data"] = described | lengths
    return content
