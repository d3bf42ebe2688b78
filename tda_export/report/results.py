"""Results of evaluations, named and sorted into charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LOSSLESS = 1e-6  # KL in nats below which a difference is only rounding, as between two dense graphs
METHODS = {
    "tda": "TDA",
    "uniform": "TDA",
    "paper": "paper's method",
    "griffin": "Griffin",
    "tt": "TT",
    "static": "static masks",
    "cats": "CATS",
    "dejavu": "DejaVu's predictors",
    "priced": "priced rows",
    "teal": "TEAL",
    "wina": "WINA",
    "moe": "MoEfication",
    "moe-true": "MoEfication by true activation",
    "teal-greedy": "TEAL",
}
RULES = {"kl": "by KL", "max_kl": "by KL", "cett": "equal CETT"}  # other rules keep their names
AMOUNTS = {"priced": ("sparsity", "max_kl", "price")}  # fields that say how much; by default the sparsity


class Group(NamedTuple):
    """The fields that the results of one chart share. None: unknown."""

    model: str | None
    text: str
    prompt_tokens: int
    continuation_tokens: int | None


@dataclass(frozen=True)
class Result:
    """One evaluation. KL in nats per token, with its standard error; the bytes that a token reads, of the FFN and of
    the layers' linears, and the share of the head's. `model`, `continuation_tokens` and the bytes of linears may be
    unknown."""

    model: str | None
    method: str
    budget: dict[str, Any]
    text: str
    prompt_tokens: int
    continuation_tokens: int | None
    kl: float
    kl_stderr: float
    perplexity: float
    dense_perplexity: float
    agreement: float
    density: float
    ffn_bytes: float
    dense_ffn_bytes: float
    linear_bytes: float | None = None
    dense_linear_bytes: float | None = None
    head_share: float = 1.0

    @property
    def group(self) -> Group:
        return Group(self.model, self.text, self.prompt_tokens, self.continuation_tokens)

    @property
    def lossless(self) -> bool:
        """Whether it differs from dense by no more than rounding."""
        return self.kl < LOSSLESS

    @property
    def share(self) -> float:
        """The share of the dense model's FFN bytes that a token reads."""
        return self.ffn_bytes / self.dense_ffn_bytes

    @property
    def linear_share(self) -> float | None:
        """The share of the dense model's bytes of the layers' linears that a token reads, if known."""
        if self.linear_bytes is None or self.dense_linear_bytes is None:
            return None
        return self.linear_bytes / self.dense_linear_bytes

    @property
    def line(self) -> str:
        """The name of the line of this point: the method, and the rule of its budget where there are several rules."""
        name = METHODS.get(self.method, self.method)
        rules = [
            key if isinstance(value, int | float) else str(value)
            for key, value in self.budget.items()
            if key not in AMOUNTS.get(self.method, ("sparsity",))
        ]
        if self.method == "paper" or not rules:  # the paper's method has only the rule of equal CETT
            return name
        return f"{name} ({', '.join(RULES.get(rule, rule) for rule in rules)})"

    @property
    def budget_text(self) -> str:
        return ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self.budget.items()
        )


def grouped(results: Sequence[Result]) -> dict[Group, list[Result]]:
    """Sort results into charts, and within them by line and share of bytes."""

    def order(one: Result) -> tuple[Any, ...]:
        return one.model or "", one.text, one.prompt_tokens, one.continuation_tokens or 0, one.line, one.share

    groups: dict[Group, list[Result]] = {}
    for result in sorted(results, key=order):
        groups.setdefault(result.group, []).append(result)
    return groups
