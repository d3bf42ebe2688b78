"""The comparison at the end of `tda-export demo`: speed, bytes, loss and text of five ways to answer one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from tda_export.progress import progress
from tda_export.report.markup import shorten

if TYPE_CHECKING:
    import numpy as np

    from tda_export.runtime import Model
    from tda_export.runtime.deployment import AnyDeployment
    from tda_export.runtime.generate import MaskMode

PROMPT = (
    "Here is a note from a small museum. The clock in the entrance hall was built in 1871 by a watchmaker who had "
    "never made anything larger than a pocket watch. He cast the wheels in the yard behind his shop, and neighbours "
    "complained of the smoke for two years. When it was finished it lost eleven minutes a day, and nobody could say "
    "why. His daughter, who kept the accounts, noticed that it lost more in summer than in winter, and proposed that "
    "the pendulum rod was growing longer in the heat. They replaced the iron rod by one of seasoned fir, which hardly "
    "changes its length, and since that day the clock has been right to half a minute a week. The daughter wrote the "
    "repair into the account book under sundries, at a cost of nine pence. What does this story teach us about "
    "solving problems?"
)
NEW_TOKENS = 64
ROUNDS = 5  # generations of each way; their median speed is shown
MAX_KL = 0.05  # nats a token that skipping rows may add
SPARSITY = 0.5
SHOWN = 180  # characters of each answer
NOTES = (
    "MiB: weights that a token reads, as calibrated where rows are chosen token by token. KL: to float32, nats a "
    "token, over its answer; same: share of places with the same likeliest token. One answer to one "
    "prompt is an example, not an evaluation (tda-export eval).",
    "The built-in model is published in four bits, so its weights lie on a 4-bit grid already: int4 probably loses "
    "less here than on other models.",
)


@dataclass
class Way:
    """A way of decoding, and its measurements.

    `rates`: tokens a second, one number a round. `bytes_per_token`: all weights that a token reads, in bytes. `kl`: to
    float32, nats a token. `agreement`: fraction of positions with the same likeliest token as float32.
    """

    name: str
    model: Model
    mask: MaskMode | None = None
    deployment: AnyDeployment | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    rates: list[float] = field(default_factory=list)
    bytes_per_token: float = 0.0
    kl: float = 0.0
    agreement: float = 1.0

    def generate(self, prompt: Sequence[int]) -> None:
        """Generate once, greedily, and keep text, speed and bytes."""
        generation = self.model.generate(prompt, max_new_tokens=NEW_TOKENS, mask=self.mask, deployment=self.deployment)
        self.tokens = [token.id for token in generation]
        self.text = generation.text
        metrics = generation.metrics
        if metrics.decode_tokens_per_second:
            self.rates.append(metrics.decode_tokens_per_second)
        unread = metrics.dense_bytes_per_token - metrics.bytes_per_token
        self.bytes_per_token = dense_bytes(self.model) - unread

    def logits(self, prompt: Sequence[int], continuation: Sequence[int]) -> np.ndarray:
        """Return the logits along a given answer, float32 [C, V]."""
        from tda_export.runtime.scoring import continuation_logits

        return continuation_logits(self.model, prompt, continuation, mask=self.mask, deployment=self.deployment)


def dense_bytes(model: Model) -> int:
    """Return the bytes of all weights that a dense step reads."""
    from tda_export.graph.derive import artifact_spec
    from tda_export.graph.sizes import artifact_sizes

    return artifact_sizes(artifact_spec(model.artifact), model.artifact).read


def compare_ways(masks: Model, int4: Model) -> list[Way]:
    """Answer the prompt in five ways, the first of which is dense float32. Show progress.

    The ways take turns, so that other load of the machine slows all of them alike.

    Args:
        masks: Float32 weights, with masks of the paper's method.
        int4: Four-bit weights with prices of rows, of the same model.
    """
    from tda_export.runtime.scoring import compare

    ways = [
        Way("float32, dense", masks, mask="dense"),
        Way("float32, TDA", masks),
        Way("int4, dense", int4, deployment=int4.at(price=0.0)),
        Way(f"int4, --max-kl {MAX_KL}", int4, deployment=int4.at(max_kl=MAX_KL)),
        Way(f"int4, --sparsity {SPARSITY}", int4, deployment=int4.at(sparsity=SPARSITY)),
    ]
    prompt = masks.text.encode(masks.text.chat([{"role": "user", "content": PROMPT}]), special_tokens=False)
    with progress("Generating", len(ways) * (ROUNDS + 1)) as advance:
        for _ in range(ROUNDS):
            for way in ways:
                way.generate(prompt)
                advance(1)
        answer = ways[0].tokens
        dense = ways[0].logits(prompt, answer)
        for way in ways[1:]:
            fidelity = compare(dense, way.logits(prompt, answer))
            way.kl, way.agreement = fidelity.kl, fidelity.agreement
            advance(1)
    return ways


def print_comparison(ways: Sequence[Way]) -> None:
    """Print one row for each way, and what the columns mean."""
    native = all(way.model.sessions.native for way in ways)
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False)
    for column in ("decode", "tokens/s", "MiB", "KL", "same", "answer"):
        left = column in ("decode", "answer")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "answer")
    for way in ways:
        rate = f"{median(way.rates):.0f}" if way.rates else ""
        size = f"{way.bytes_per_token / 2**20:.0f}"
        answer = shorten(" ".join(way.text.split()), SHOWN)
        table.add_row(way.name, rate, size, f"{way.kl:.3f}", f"{way.agreement:.2f}", answer)
    console = Console(highlight=False, markup=False)
    console.print(table)
    for note in NOTES:
        console.print(note)
    if not native:
        console.print("Without native kernels every row is read, and what is not worth its bytes counts as zero.")
