"""How a model is quantised, and which text that reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from tda_export.calibration.corpus import Corpus
from tda_export.calibration.run import check_device
from tda_export.errors import UsageError
from tda_export.models.quantised import matrix_shape
from tda_export.models.spec import DecoderSpec
from tda_export.packing import HeadRows, linear_parts
from tda_export.quantization.gptq import DAMPING
from tda_export.quantization.hessians import FIRST_TOKEN_WEIGHT
from tda_export.weights.formats import DEFAULT_GROUP
from tda_export.weights.mixture import OPTION, Mixture
from tda_export.weights.plan import FormatPlan, Rule, part_name, plan_formats

Quantizer = Literal["gptq", "rtn"]

ESTIMATE_SEQUENCES = 8  # whose gradients give the losses of linears
LABELS = 4  # labels of each of their tokens


@dataclass(frozen=True)
class QuantizeSettings:
    """How to quantise. Lengths in tokens; a sequence is `prompt_tokens` and then `continuation_tokens`.

    `sequences`: how many GPTQ reads. `kl_sequences`: how many others the loss is measured on; 0 measures no loss.
    `bits_per_weight`: the mean bits of the layers' linears, some of which are then in eight bits instead of four.
    `head`: `priced` stores a head of integers by input channel, apart from an embedding that it may be tied to, so that
    its rows can have prices; GPTQ rounds it too. `whole` stores it by token, rounded to nearest; a tied one stays the
    embedding.
    """

    weights: str = "int4"
    group: int = DEFAULT_GROUP
    rules: tuple[Rule, ...] = ()
    quantizer: Quantizer = "gptq"
    symmetric: bool = False
    sequences: int = 60
    kl_sequences: int = 8
    prompt_tokens: int = 256
    continuation_tokens: int = 128
    seed: int = 0
    device: str = "cpu"
    bits_per_weight: float | None = None
    head: HeadRows = "priced"

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.bits_per_weight is not None and self.weights != "int4":
            raise UsageError(
                f"{OPTION} stores some linears in int4 and others in int8, and has no effect with --weights "
                f"{self.weights}. Leave one of them out."
            )

    @property
    def length(self) -> int:
        """The tokens of a sequence."""
        return self.prompt_tokens + self.continuation_tokens

    @property
    def read_sequences(self) -> int:
        """The number of sequences that are read before the loss is measured: by GPTQ, or only to estimate losses."""
        if self.quantizer == "gptq":
            return self.sequences
        return 0 if self.bits_per_weight is None else ESTIMATE_SEQUENCES

    @property
    def all_sequences(self) -> int:
        """The number of sequences to draw, 0 where no data are needed."""
        return self.read_sequences + self.kl_sequences

    def estimated_on(self, read: int) -> int:
        """Return how many of so many read sequences give gradients. GPTQ's Hessians come from the others."""
        return min(ESTIMATE_SEQUENCES, (read + 1) // 2) if self.quantizer == "gptq" else read

    def plan(self, spec: DecoderSpec) -> FormatPlan:
        """Return the format of every matrix of a model. With `bits_per_weight`, those that are open are in four bits.

        Raises:
            UsageError: A rule matches nothing, or there are no integers in the plan.
        """
        plan = self._plan(spec, self.weights)
        if not plan.integers:
            raise UsageError("All matrices would stay floats, so there is nothing to quantise. Change --weights-for.")
        return plan

    def mixture(self, spec: DecoderSpec) -> Mixture | None:
        """Return what is to be chosen for `bits_per_weight`, None where it is not given.

        Raises:
            UsageError: No choice has this mean, or there is nothing to choose.
        """
        if self.bits_per_weight is None:
            return None
        names = [part_name(layer, part) for layer in range(spec.num_layers) for part in linear_parts(spec)]
        shapes = {name: matrix_shape(spec, name) for name in names}
        found = Mixture(self._plan(spec, "int4"), self._plan(spec, "int8"), shapes, self.bits_per_weight)
        found.check()
        return found

    def _plan(self, spec: DecoderSpec, weights: str) -> FormatPlan:
        return plan_formats(
            spec.num_layers,
            linear_parts(spec),
            tied_head=spec.tied_head,
            weights=weights,
            group=self.group,
            rules=self.rules,
            head_major="input" if self.head == "priced" else "output",
        )

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain data, which a folder keeps."""
        content: dict[str, Any] = {"name": self.quantizer, "symmetric": self.symmetric}
        if self.quantizer == "gptq":
            content |= {"least_damping": DAMPING, "first_token_weight": FIRST_TOKEN_WEIGHT}
        return content


def split(corpus: Corpus | None, settings: QuantizeSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences that are read to quantise and those that the loss is measured on; int64 [.., P + C].

    Those of the loss come first in the corpus, so that all quantisers and any number of --sequences are measured on the
    same text.

    Raises:
        UsageError: There are too few sequences.
    """
    if corpus is None:
        none = torch.zeros(0, settings.length, dtype=torch.int64)
        return none, none
    found = len(corpus.tokens)
    held_out = end = min(settings.kl_sequences, found)
    if settings.read_sequences:
        end = found
        if held_out and found < settings.all_sequences:  # both get less text than was asked for
            held_out = max(1, found * settings.kl_sequences // settings.all_sequences)
        if held_out == found:
            reader = "GPTQ" if settings.quantizer == "gptq" else OPTION
            without = ", or --quantizer rtn" if settings.quantizer == "gptq" else ""
            raise UsageError(
                f"{reader} reads sequences and measures on others, and {found} is too few for that. Give text for "
                f"more, or --kl-sequences 0{without}."
            )
    return corpus.tokens[held_out:end], corpus.tokens[:held_out]
