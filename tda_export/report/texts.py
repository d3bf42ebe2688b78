"""The texts on which activity is measured, written for this report."""

from __future__ import annotations

import random
from dataclasses import dataclass

ACTIVITY_TEXT = (
    "The old bridge over the river was closed in spring, because the ice had moved two of its stone piers. "
    "Engineers measured the cracks every morning and wrote the numbers on a board beside the road."
)
ACTIVITY_TOKENS = 32
SHUFFLE_SEED = 0
RANDOM = "random"


@dataclass(frozen=True)
class Prompt:
    """A prompt of the similarity matrix: a short label, and its text, or None for random tokens."""

    label: str
    text: str | None


_FIRST = "The farmers of the valley bring their apples to the market every Saturday in autumn."


def shuffled(text: str) -> str:
    """Return the words of a text in a fixed random order."""
    words = text.rstrip(".").split()
    random.Random(SHUFFLE_SEED).shuffle(words)
    return " ".join(words) + "."


SIMILARITY_PROMPTS = (
    Prompt("apples", _FIRST),
    Prompt(
        "apples, in other words", "Each Saturday in autumn, apples from the valley are sold by its farmers in town."
    ),
    Prompt("apples, longer", "When autumn comes, the growers of the valley pick apples and sell them on Saturdays."),
    Prompt("apples, shuffled", shuffled(_FIRST)),
    Prompt("a star", "A star shines because hydrogen in its core turns into helium under enormous pressure."),
    Prompt(
        "a star, in other words", "Deep inside a star, hydrogen is fused to helium, and the energy leaves as light."
    ),
    Prompt("a contract", "The tenant shall pay the rent on the first day of each month without any deduction."),
    Prompt("a quarrel", '"You never told me!" she cried. "I did, twice," he said, and put down his hat.'),
    Prompt("German", "Die Bauern des Tales bringen ihre Äpfel im Herbst jeden Samstag auf den Markt."),
    Prompt("Python", "def total(prices):\n    result = 0\n    for price in prices:\n        result += price\n"),
    Prompt("C", "int total(const int *p, int n) {\n    int s = 0;\n    while (n--) s += *p++;\n    return s;\n}\n"),
    Prompt("random tokens", None),
    Prompt("other random tokens", None),
)
