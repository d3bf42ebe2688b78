"""What `tda-export eval --json` printed, read back and sorted into charts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tda_export.errors import TdaError, UsageError

NUMBERS = (
    "prompt_tokens",
    "continuation_tokens",
    "kl",
    "kl_stderr",
    "perplexity",
    "dense_perplexity",
    "agreement",
    "density",
    "ffn_bytes",
    "dense_ffn_bytes",
)
LOSSLESS = 1e-6  # KL in nats under which a difference is rounding, as between two dense graphs
TEXTS = ("model", "method", "text")


@dataclass(frozen=True)
class Result:
    """One evaluation. KL in nats a token, with its standard error; `method` names the rule of its budget too."""

    model: str
    method: str
    budget: dict[str, Any]
    text: str
    prompt_tokens: int
    continuation_tokens: int
    kl: float
    kl_stderr: float
    perplexity: float
    dense_perplexity: float
    agreement: float
    density: float
    ffn_bytes: float
    dense_ffn_bytes: float

    @property
    def group(self) -> tuple[str, str, int, int]:
        """What results of one chart share: model, text and lengths."""
        return self.model, self.text, self.prompt_tokens, self.continuation_tokens

    @property
    def lossless(self) -> bool:
        """Whether it differs from dense by no more than rounding."""
        return self.kl < LOSSLESS

    @property
    def share(self) -> float:
        """FFN bytes that a token reads, of those of the dense model."""
        return self.ffn_bytes / self.dense_ffn_bytes

    @property
    def line(self) -> str:
        """The line that it is a point of: the method, and the rule of its budget where there are several."""
        rules = [
            name if isinstance(value, int | float) else str(value)
            for name, value in self.budget.items()
            if name != "sparsity"
        ]
        return f"{self.method} ({', '.join(rules)})" if rules else self.method

    @property
    def budget_text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.budget.items())


def read_result(path: Path) -> Result:
    """Read one file.

    Raises:
        UsageError: There is no such file.
        TdaError: It is not the output of `tda-export eval --json`.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Give the output of 'tda-export eval --json' with --results.")
    way_out = "Give the output of 'tda-export eval --json'."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TdaError(f"{path}: not readable as JSON ({error}). {way_out}") from error
    if not isinstance(content, dict):
        raise TdaError(f"{path}: not a result. {way_out}")
    for name in TEXTS:
        if not isinstance(content.get(name), str):
            raise TdaError(f"{path}: not a result, {name!r} is not there or no text. {way_out}")
    for name in NUMBERS:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TdaError(f"{path}: not a result, {name!r} is not there or no number. {way_out}")
    if not isinstance(content.get("budget"), dict):
        raise TdaError(f"{path}: not a result, 'budget' is not there. {way_out}")
    if content["dense_ffn_bytes"] <= 0:
        raise TdaError(f"{path}: not a result, 'dense_ffn_bytes' is not positive. {way_out}")
    return Result(budget=content["budget"], **{name: content[name] for name in (*TEXTS, *NUMBERS)})


def grouped(results: Sequence[Result]) -> dict[tuple[str, str, int, int], list[Result]]:
    """Sort results into charts, and within them by line and share of bytes."""
    groups: dict[tuple[str, str, int, int], list[Result]] = {}
    for result in sorted(results, key=lambda one: (*one.group, one.line, one.share)):
        groups.setdefault(result.group, []).append(result)
    return groups
