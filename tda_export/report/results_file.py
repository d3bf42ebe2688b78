"""Files of results: a JSON object as `eval --json` or `bench --json` prints, an array, or JSON Lines as of tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tda_export.errors import TdaError, UsageError
from tda_export.report.results import Result
from tda_export.report.speeds import Speed

TEXTS = ("method", "text")
NUMBERS = (
    "prompt_tokens",
    "kl",
    "kl_stderr",
    "perplexity",
    "dense_perplexity",
    "agreement",
    "density",
    "ffn_bytes",
    "dense_ffn_bytes",
)
LINEARS = ("linear_bytes", "dense_linear_bytes")  # both must be present, or neither
ALLOCATIONS = {"tda": "kl", "uniform": "uniform"}  # allocations of methods named by quality_table.py
SPEED_MARK = "copy_gb_per_second"  # only `bench` prints it
SPEED_TEXTS = ("model", "dtype", "device")
WAY_OUT = (
    "Give the output of 'tda-export eval --text … --json' or 'tda-export bench … --json', or of quality_table.py or "
    "baselines.py with --json."
)


class Results(NamedTuple):
    """The content of files of results: the loss of methods at the bytes that they read, and their speeds."""

    qualities: list[Result]
    speeds: list[Speed]


def read_results(path: Path) -> Results:
    """Read one file.

    Where a row lacks the model or the number of decoded tokens, it is taken from the file's other rows, if they agree.

    Raises:
        UsageError: There is no such file.
        TdaError: The file is not readable, or holds something other than results; the message names the line.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Give the output of 'tda-export eval --json' with --results.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TdaError(f"{path}: not readable as JSON ({error}). {WAY_OUT}") from error
    results: list[Result] = []
    speeds: list[Speed] = []
    for where, content in _contents(text, path):
        if isinstance(content, dict) and SPEED_MARK in content:
            speeds += _speeds(content, where)
        else:
            results.append(_result(content, where))
    if not results and not speeds:
        raise TdaError(f"{path}: it has no results. {WAY_OUT}")
    model = _only({one.model for one in results})
    continuation = _only({one.continuation_tokens for one in results})
    qualities = [
        replace(
            one,
            model=model if one.model is None else one.model,
            continuation_tokens=continuation if one.continuation_tokens is None else one.continuation_tokens,
        )
        for one in results
    ]
    return Results(qualities, speeds)


def _only(values: set[Any]) -> Any:
    """Return the only known value, or None if there is none or more than one."""
    known = values - {None}
    return known.pop() if len(known) == 1 else None


def _contents(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the items of a file, each with its place for messages."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        if not lines:
            return
        if text.lstrip().startswith("[") or not any(_is_object(line) for _, line in lines):
            raise _unreadable(error, path, 1) from error
        for number, line in lines:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as line_error:
                raise _unreadable(line_error, path, number) from line_error
            yield f"{path}, line {number}", content
        return
    if isinstance(content, list):
        yield from ((f"{path}, item {number}", item) for number, item in enumerate(content, 1))
    else:
        yield f"{path}", content


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unreadable(error: Exception, path: Path, line: int) -> TdaError:
    """Make the error for an unreadable text that begins at a line of the file."""
    if isinstance(error, json.JSONDecodeError):
        return TdaError(f"{path}, line {line + error.lineno - 1}: not readable as JSON ({error.msg}). {WAY_OUT}")
    return TdaError(f"{path}, line {line}: not readable as JSON ({error}). {WAY_OUT}")


def _result(content: Any, where: str) -> Result:
    """Check one result. Labels (`model`, `continuation_tokens`, `budget`), `LINEARS` and `head_share` are optional."""

    def refuse(reason: str) -> TdaError:
        return TdaError(f"{where}: not a result{reason}. {WAY_OUT}")

    if not isinstance(content, dict):
        raise refuse("")
    given = {name: value for name, value in content.items() if value is not None}
    for name in (*TEXTS, *({"model"} & given.keys())):
        if not isinstance(given.get(name), str):
            raise refuse(f", {name!r} is missing or not text")
    linears = LINEARS if given.keys() & set(LINEARS) else ()
    for name in (*NUMBERS, *linears, *({"continuation_tokens", "head_share"} & given.keys())):
        value = given.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refuse(f", {name!r} is missing or not a number")
    for name in ("dense_ffn_bytes", *linears[1:]):
        if given[name] <= 0:
            raise refuse(f", {name!r} is not positive")
    budget = given.get("budget", _asked_budget(given))
    if not isinstance(budget, dict):
        raise refuse(", 'budget' is not an object")
    return Result(
        model=given.get("model"),
        budget={name: value for name, value in budget.items() if value is not None},
        continuation_tokens=given.get("continuation_tokens"),
        **{name: given[name] for name in (*TEXTS, *NUMBERS, *linears, *({"head_share"} & given.keys()))},
    )


def _asked_budget(given: dict[str, Any]) -> dict[str, Any]:
    """Return the budget of a row of quality_table.py, which asks for a sparsity (or lets a method choose its own)."""
    asked = given.get("asked", given.get("sparsity"))
    if asked is None:
        return {}
    allocation = ALLOCATIONS.get(given["method"])
    return {"sparsity": asked} | ({} if allocation is None else {"allocation": allocation})


def _speeds(content: dict[str, Any], where: str) -> list[Speed]:
    """Check an output of `bench`, and return each way of decoding in it."""

    def number(row: dict[str, Any], name: str) -> float:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TdaError(f"{where}: not a result, {name!r} is missing or not a number. {WAY_OUT}")
        return value

    for name in SPEED_TEXTS:
        if not isinstance(content.get(name), str):
            raise TdaError(f"{where}: not a result, {name!r} is missing or not text. {WAY_OUT}")
    prompt_tokens, new_tokens = (int(number(content, name)) for name in ("prompt_tokens", "new_tokens"))
    ways = {name: row for name, row in content.items() if isinstance(row, dict) and "ms_per_token" in row}
    if not ways:
        raise TdaError(f"{where}: not a result, it has no way of decoding. {WAY_OUT}")
    speeds = []
    for name, row in ways.items():
        span = row.get("ms_per_token_range")
        if not isinstance(span, list) or len(span) != 2:
            raise TdaError(f"{where}: not a result, 'ms_per_token_range' is missing or not a pair. {WAY_OUT}")
        low, high = (number({"ms_per_token_range": end}, "ms_per_token_range") for end in span)
        speeds.append(
            Speed(
                model=content["model"],
                dtype=content["dtype"],
                device=content["device"],
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                name=name,
                share=1 - number(row, "sparsity"),
                ms=number(row, "ms_per_token"),
                low=low,
                high=high,
                speedup=number(row, "speedup") if "speedup" in row else None,
            )
        )
    return speeds
