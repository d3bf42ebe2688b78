"""Sections on neuron activity, measured with an artifact's own graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tda_export.progress import Advance
from tda_export.report.activity import (
    CHANCE,
    Reader,
    first_quarter,
    inertia,
    overlap_by_layer,
    similarity,
)
from tda_export.report.axes import Axis
from tda_export.report.charts import line_chart
from tda_export.report.drawing import Series
from tda_export.report.heatmap import bucket, colour_bar, matrix_chart, picture_chart
from tda_export.report.markup import element
from tda_export.report.page import Figure, Section, Table
from tda_export.report.texts import ACTIVITY_TEXT, ACTIVITY_TOKENS, SIMILARITY_PROMPTS
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.text import Text

PICTURE_COLUMNS = 192
RANDOM_SEED = 0
UNCERTAINTY_TOKENS = 256
DIMMEST, BRIGHTEST = 0.1, 4.0  # range of the colours, relative to the root mean square over neurons, on a log scale


@dataclass(frozen=True)
class Case:
    """Relative magnitudes of tokens read in one way: [T, F] for each layer. The first `sinks` rows are attention
    sinks."""

    name: str
    rows: list[np.ndarray]
    sinks: int
    alone: bool


def activity_steps(prefixed: bool) -> int:
    """Count the units of progress of `activity_section`."""
    return 2 * ((1 if prefixed else 2) * ACTIVITY_TOKENS + 1)


def activity_section(reader: Reader, text: Text, advance: Advance) -> Section:
    """Draw the relative magnitudes of tokens alone and in a sequence, for a text and for random tokens.

    Every picture's neurons are sorted by their score over the picture's own first quarter of tokens. Where the colours
    continue downwards, the first tokens predict which neurons are active later.
    """
    shape = reader.artifact.shape
    layers = sorted({0, shape.num_layers // 2, shape.num_layers - 1})
    prefix = text.encode("")
    words = text.encode(ACTIVITY_TEXT, special_tokens=False)[:ACTIVITY_TOKENS]
    noise = random_tokens(reader.artifact, len(words), RANDOM_SEED)
    cases = [
        *read_cases(reader, "text", words, prefix, layers, advance),
        *read_cases(reader, "random tokens", noise, prefix, layers, advance),
    ]
    table: list[list[object]] = []
    figures = [Figure(_legend(), "Colours of all pictures; logarithmic.")]
    for place, layer in enumerate(layers):
        for case in cases:
            found = inertia(case.rows[place][case.sinks :])
            table.append([layer, case.name, f"{found.cosine:.3f}", f"{found.jaccard:.3f}", f"{found.kept:.3f}"])
        figures.append(Figure(_pictures(cases, place), f"Layer {layer}.", wide=True))
    columns = ("layer", "tokens", "cosine of neighbours", "Jaccard of neighbours", "share kept from the first quarter")
    return Section(
        "Neuron activity",
        [
            "Relative magnitude of every neuron for every token. The paper (arXiv 2408.11393, Figures 3 to 10) finds "
            "that in a sequence the neurons which the first tokens flag stay active, even if the tokens are random: "
            "activity has inertia. The table says how far that holds here. In each picture neurons are sorted by their "
            f"score over the picture's first {first_quarter(len(words))} tokens (without a sink), and neighbours in "
            "that order are averaged: the more the first tokens tell, the more of the colours goes on below them.",
            f"Text: “{ACTIVITY_TEXT}” ({len(words)} tokens of it). Random tokens are drawn evenly from the vocabulary.",
            _sink_text(bool(prefix)),
        ],
        figures,
        [Table("Inertia, in numbers", columns, table, texts=2)],
        [
            "Cosine: of the relative magnitudes of adjacent tokens. Jaccard: of their most active 50 % of neurons "
            f"({CHANCE:.2f} by chance). Share kept: of the 50 % of neurons that are important for the first quarter of "
            "the tokens, those among the most active 50 % of a later token (0.50 by chance). Means over tokens."
        ],
    )


def read_cases(
    reader: Reader, kind: str, tokens: Sequence[int], prefix: Sequence[int], layers: Sequence[int], advance: Advance
) -> list[Case]:
    """Read each token alone, each after one other token (if the tokenizer puts none before a text), and all as one
    sequence."""
    cases = [Case(f"{kind}, each alone", read_alone(reader, tokens, prefix, layers, advance), 0, alone=True)]
    if not prefix:
        other = sorted(reader.artifact.eos_token_ids)[:1] or [0]
        rows = read_alone(reader, tokens, other, layers, advance)
        cases.append(Case(f"{kind}, each after one token", rows, 0, alone=True))
    rows = [r[len(prefix) :] for r in reader.relative_magnitudes([*prefix, *tokens], layers)]
    advance(1)
    return [*cases, Case(f"{kind}, as a sequence", rows, 0 if prefix else 1, alone=False)]


def similarity_section(reader: Reader, text: Text, advance: Advance) -> Section:
    """Compare the neuron scores of thirteen prompts."""
    labels = [prompt.label for prompt in SIMILARITY_PROMPTS]
    length = len(text.encode(SIMILARITY_PROMPTS[0].text or "", special_tokens=False))
    scores = []
    for number, prompt in enumerate(SIMILARITY_PROMPTS):
        if prompt.text is None:
            tokens = [*text.encode(""), *random_tokens(reader.artifact, length, RANDOM_SEED + number)]
        else:
            tokens = text.encode(prompt.text)
        scores.append(reader.scores(tokens))
        advance(1)
    found = similarity(np.stack(scores))
    charts = []
    for title, values in (
        ("Cosine similarity of the neuron scores", found.cosine),
        (f"Jaccard overlap of the 50 % of neurons with the largest scores ({CHANCE:.2f} by chance)", found.jaccard),
    ):
        low, high = colour_range(values)
        chart = matrix_chart(title, values, labels, low=low, high=high)
        charts.append(Figure(chart, f"{title}. Colours go from {low:.2f} to {high:.2f}."))
    rows = [
        [number + 1, prompt.label, prompt.text if prompt.text is not None else f"{length} random tokens"]
        for number, prompt in enumerate(SIMILARITY_PROMPTS)
    ]
    return Section(
        "Similarity of prompts",
        [
            "Neuron scores of thirteen prompts, compared pair by pair and averaged over layers. The sentences are this "
            "report's own, not those of the paper (arXiv 2408.11393, Table 5 and Figure 11)."
        ],
        charts,
        [Table("The prompts", ("number", "label", "text"), rows, folded=True, texts=3)],
    )


def uncertainty_section(reader: Reader, texts: dict[str, list[int]], advance: Advance) -> Section:
    """Show how much the important neurons of texts overlap, layer by layer. `texts` are token ids by name."""
    scores = []
    for tokens in texts.values():
        scores.append(reader.scores(tokens))
        advance(1)
    overlap = overlap_by_layer(np.stack(scores))  # [L, pairs]
    layers = list(range(len(overlap)))
    series = Series(
        "mean (band: least and most)",
        layers,
        overlap.mean(axis=1).tolist(),
        band=(overlap.min(axis=1).tolist(), overlap.max(axis=1).tolist()),
        names=[f"layer {layer}" for layer in layers],
    )
    chart = line_chart(
        "Overlap of important neurons, by layer",
        [series],
        Axis("layer", -0.5, len(layers) - 0.5),
        Axis("Jaccard overlap of the top 50 % of neurons", 0.0, 1.0),
        references=[(CHANCE, "by chance")],
    )
    return Section(
        "History-related uncertainty",
        [
            "How much the neurons that are important for one text are so for others: 1 means that the text does not "
            f"matter, {CHANCE:.2f} that one text says nothing about another. From {len(texts)} texts of the built-in "
            f"calibration data ({', '.join(texts)}), {max(map(len, texts.values()))} tokens each at most."
        ],
        [Figure(chart, f"Overlap of the important neurons of {overlap.shape[1]} pairs of texts.")],
    )


def uncertainty_texts(text: Text, limit: int) -> dict[str, list[int]]:
    """Take the beginning of each file of the built-in calibration data: token ids by the file's name."""
    from tda_export.calibration.corpus import builtin_folder

    files = sorted(builtin_folder().glob("*.txt"))
    tokens = min(UNCERTAINTY_TOKENS, limit)
    return {file.stem: text.encode(file.read_text(encoding="utf-8")[: 8 * tokens])[:tokens] for file in files}


def colour_range(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and largest similarity of different prompts [N, N], rounded outwards to multiples of 0.05."""
    others = values[~np.eye(len(values), dtype=bool)]
    low, high = math.floor(others.min() * 20) / 20, math.ceil(others.max() * 20) / 20
    return (low, high) if low < high else (low - 0.05, high)


def random_tokens(artifact: Artifact, count: int, seed: int) -> list[int]:
    """Draw tokens uniformly from the vocabulary, except those that end a generation."""
    drawn = np.random.default_rng(seed).permutation(artifact.shape.vocab_size)
    allowed = [int(token) for token in drawn if int(token) not in artifact.eos_token_ids]
    return [allowed[i % len(allowed)] for i in range(count)]


def read_alone(
    reader: Reader, tokens: Sequence[int], before: Sequence[int], layers: Sequence[int], advance: Advance
) -> list[np.ndarray]:
    """Read each token in its own sequence, after the tokens `before`: float32 [T, F] for each layer."""
    rows = []
    for token in tokens:
        rows.append([r[-1] for r in reader.relative_magnitudes([*before, token], layers)])
        advance(1)
    return [np.stack(layer) for layer in zip(*rows, strict=True)]


def brightness(r: np.ndarray, sinks: int = 0) -> np.ndarray:
    """Sort and shrink relative magnitudes [T, F] into a picture: brightness in [0, 1], [T, columns].

    Neurons are sorted by their score over the first quarter of the tokens, without the first `sinks`.
    """
    first = r[sinks : sinks + first_quarter(len(r) - sinks)]
    order = np.argsort(-np.square(first).mean(axis=0), kind="stable")
    mean_square = bucket(np.square(r[:, order]) * r.shape[1], PICTURE_COLUMNS)  # 1 is the mean over neurons
    level = np.log(np.maximum(np.sqrt(mean_square), 1e-9) / DIMMEST) / np.log(BRIGHTEST / DIMMEST)
    return np.clip(level, 0.0, 1.0)


def _pictures(cases: Sequence[Case], place: int) -> Markup:
    charts = []
    for letter, case in zip("abcdef", cases, strict=False):
        r = case.rows[place]
        y_label = "token (a sequence each)" if case.alone else "token"
        title = f"({letter}) {case.name}"
        charts.append(picture_chart(title, brightness(r, case.sinks), "neurons, sorted", y_label, r.shape[1]))
    return element("div", *charts, class_="pictures", style=f"--columns:{len(cases) // 2}")


def _legend() -> Markup:
    label = "relative magnitude, in root mean squares over neurons"
    return colour_bar(label, f"≤ {DIMMEST:g}", f"≥ {BRIGHTEST:g}")


def _sink_text(prefixed: bool) -> str:
    if prefixed:
        return (
            "This tokenizer begins every sequence with a token of its own, also before a token that is read alone. It "
            "is an attention sink with activations unlike any other's, and is not shown."
        )
    return (
        "The first token of a sequence is an attention sink with activations unlike any other's. A token read alone is "
        "the first of its sequence, so what tokens alone have in common is the sink, not inertia. The fair comparison "
        "is with tokens that are each read after one other (the end of text). A sequence's first token is shown, and "
        "left out of the numbers."
    )
