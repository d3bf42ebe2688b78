"""Files of results: output of eval and the benchmarks is read back, and other files are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.report.methods_section import methods_section
from tda_export.report.results import grouped
from tda_export.report.results_file import read_results
from tda_export.report.speeds import Speed
from tests.report.svg import by_class, parse
from tests.report.test_results import CONTENT, result

QUALITY: dict[str, Any] = {
    "prompts": 32,
    "kl": 0.134,
    "kl_stderr": 0.005,
    "perplexity": 38.8,
    "perplexity_stderr": 2.9,
    "dense_perplexity": 34.8,
    "dense_perplexity_stderr": 2.7,
    "agreement": 0.79,
    "agreement_stderr": 0.008,
    "density": 0.95,
    "ffn_bytes": 225847314.0,
    "refresh_ffn_bytes": 0.0,
    "dense_ffn_bytes": 318504960,
}


def baseline_row(method: str, sparsity: float, **changes: Any) -> dict[str, Any]:
    """Return a row of `benchmarks/baselines.py --json`."""
    return {
        "model": "smollm2-135m",
        "dtype": "float32",
        "provider": "pytorch",
        "method": method,
        "budget": {"sparsity": sparsity},
        "text": "stories.txt",
        "prompt_tokens": 384,
        "continuation_tokens": 128,
        **QUALITY,
        "predictor_bytes": 0,
    } | changes


def table_row(method: str, sparsity: float | None, asked: float | None, **changes: Any) -> dict[str, Any]:
    """Return a row of `benchmarks/quality_table.py --json` that was measured on the artifact."""
    row = QUALITY | {"method": method, "sparsity": sparsity, "asked": asked, "text": "stories", "prompt_tokens": 32}
    return row | {"ffn_share": QUALITY["ffn_bytes"] / QUALITY["dense_ffn_bytes"]} | changes


def table_rows(**changes: Any) -> list[dict[str, Any]]:
    """Return a row of each method in the script's order. Those of baselines.py have a baseline's keys."""
    rows = [
        table_row("dense", None, None, kl=0.0),
        table_row("tda", 0.3, 0.33079576492309565),
        table_row("uniform", 0.3, 0.14459684805969625),
        table_row("griffin", 0.3, 0.3),
        table_row("tt", 0.3, 0.3),
        table_row("paper", None, None),
    ]
    place = {"text": "stories", "prompt_tokens": 32, "sparsity": 0.3, "asked": 0.3, "ffn_share": 0.7}
    return [row | changes for row in rows] + [
        baseline_row(method, 0.3) | place for method in ("static", "cats", "dejavu")
    ]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, text: str) -> Path:
    path = folder / "results.json"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(CONTENT),
        json.dumps(CONTENT, indent=2),
        json.dumps([CONTENT]),
        json.dumps(CONTENT) + "\n\n",
    ],
    ids=["object", "indented", "array", "line"],
)
def test_one_result(tmp_path: Path, text: str) -> None:
    assert read_results(write(tmp_path, text)).qualities == [result()]


def test_bytes_of_linears(tmp_path: Path) -> None:
    rows = [CONTENT, CONTENT | {"method": "teal", "linear_bytes": 70.0, "dense_linear_bytes": 140}]
    assert [one.linear_share for one in read_results(write(tmp_path, lines(rows))).qualities] == [None, 0.5]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_baselines(tmp_path: Path, form: str) -> None:
    rows = [baseline_row(method, sparsity) for method in ("static", "cats", "dejavu") for sparsity in (0.3, 0.5)]
    results = read_results(write(tmp_path, lines(rows) if form == "lines" else json.dumps(rows))).qualities
    assert list(grouped(results)) == [("smollm2-135m", "stories.txt", 384, 128)]
    assert [(one.line, one.budget_text) for one in results] == [
        (line, f"sparsity {sparsity}")
        for line in ("static masks", "CATS", "DejaVu's predictors")
        for sparsity in (0.3, 0.5)
    ]


NAMED = [
    "CATS",
    "DejaVu's predictors",
    "Griffin",
    "TDA (by KL)",
    "TDA (uniform)",
    "TT",
    "paper's method",
    "static masks",
]


@pytest.mark.parametrize("labels", [{}, {"model": "smollm2-135m", "continuation_tokens": 128}], ids=["bare", "labels"])
def test_quality_table(tmp_path: Path, labels: dict[str, Any]) -> None:
    """Rows of one text and length make one chart, whether they name the model or not."""
    rows = table_rows(**labels)
    results = read_results(write(tmp_path, lines([*rows, *(row | {"prompt_tokens": 384} for row in rows)]))).qualities
    assert list(grouped(results)) == [("smollm2-135m", "stories", prompt, 128) for prompt in (32, 384)]
    section = methods_section(results)
    for figure in section.figures:
        assert [text.text for text in by_class(parse(figure.chart), "legend")] == NAMED
    budgets = {row[3]: row[4] for row in section.tables[0].rows}
    assert budgets["TDA (by KL)"] == "sparsity 0.3308, allocation kl"
    assert budgets["TDA (uniform)"] == "sparsity 0.1446, allocation uniform"
    assert (budgets["Griffin"], budgets["paper's method"], budgets["dense"]) == ("sparsity 0.3", "", "")


def test_quality_table_with_budgets(tmp_path: Path) -> None:
    rows = [
        table_row("tda", 0.3, 0.33, budget={"sparsity": 0.33, "allocation": "kl"}),
        table_row("uniform", 0.3, 0.15, budget={"sparsity": 0.15, "allocation": "uniform"}),
        table_row("paper", None, None, budget={"cett": 0.2}),
        table_row("griffin", 0.3, 0.3, budget={"sparsity": 0.3, "allocation": None}),
        table_row("dense", None, None, budget=None, model=None),
    ]
    results = read_results(write(tmp_path, lines(rows))).qualities
    assert [one.line for one in results] == ["TDA (by KL)", "TDA (uniform)", "paper's method", "Griffin", "dense"]
    assert [one.budget_text for one in results][2:4] == ["cett 0.2", "sparsity 0.3"]


def test_labels_of_which_the_file_has_several_are_not_guessed(tmp_path: Path) -> None:
    rows = [table_row("tda", 0.3, 0.3), baseline_row("cats", 0.3), baseline_row("cats", 0.3, model="another")]
    results = read_results(write(tmp_path, lines(rows))).qualities
    assert [(one.model, one.continuation_tokens) for one in results] == [
        (None, 128),
        ("smollm2-135m", 128),
        ("another", 128),
    ]


SPEEDS: dict[str, Any] = {
    "model": "m",
    "dtype": "float32",
    "device": "a processor",
    "prompt_tokens": 8,
    "new_tokens": 16,
    "copy_gb_per_second": 20.0,
    "dense": {"ms_per_token": 10.0, "ms_per_token_range": [9.0, 11.0], "sparsity": 0.0},
    "priced": {"ms_per_token": 8.0, "ms_per_token_range": [7.5, 8.5], "sparsity": 0.375, "speedup": 1.25},
}


def test_speeds_beside_qualities(tmp_path: Path) -> None:
    dense = Speed("m", "float32", "a processor", 8, 16, "dense", 1.0, 10.0, 9.0, 11.0)
    priced = replace(dense, name="priced", share=0.625, ms=8.0, low=7.5, high=8.5, speedup=1.25)
    assert read_results(write(tmp_path, lines([SPEEDS, CONTENT]))) == ([result()], [dense, priced])
    assert read_results(write(tmp_path, json.dumps(SPEEDS))) == ([], [dense, priced])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": 3}, "'device' is missing or not text"),
        ({"new_tokens": None}, "'new_tokens' is missing or not a number"),
        ({"dense": 1, "priced": 2}, "it has no way of decoding"),
        ({"dense": {"ms_per_token": 1.0}}, "'ms_per_token_range' is missing or not a pair"),
        ({"dense": SPEEDS["dense"] | {"sparsity": "half"}}, "'sparsity' is missing or not a number"),
        ({"dense": SPEEDS["dense"] | {"ms_per_token_range": [1.0, True]}}, "'ms_per_token_range' is missing or not a"),
        ({"dense": SPEEDS["dense"] | {"speedup": float("inf")}}, "'speedup' is missing or not a number"),
    ],
    ids=str,
)
def test_no_speed(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(TdaError) as raised:
        read_results(write(tmp_path, json.dumps(SPEEDS | changes)))
    assert f": not a result, {reason}" in str(raised.value)


# Refusals


def test_missing() -> None:
    with pytest.raises(UsageError, match=r"nowhere.json: no such file. .*--results"):
        read_results(Path("nowhere.json"))


GOOD = json.dumps(CONTENT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", ", line 1: not readable as JSON"),
        ("\xff", ": not readable as JSON"),
        ("", ": it has no results"),
        ("[]", ": it has no results"),
        ("3", ": not a result."),
        ("{}", ": not a result, 'method' is missing or not text"),
        (json.dumps(CONTENT | {"text": 3}), ": not a result, 'text' is missing or not text"),
        (json.dumps(CONTENT | {"model": 3}), ": not a result, 'model' is missing or not text"),
        (json.dumps(CONTENT | {"kl": None}), ": not a result, 'kl' is missing or not a number"),
        (json.dumps(CONTENT | {"kl": float("nan")}), ": not a result, 'kl' is missing or not a number"),
        (json.dumps(CONTENT | {"kl_stderr": True}), ": not a result, 'kl_stderr' is missing or not a number"),
        (json.dumps(CONTENT | {"continuation_tokens": "4"}), ": not a result, 'continuation_tokens' is missing"),
        (json.dumps(CONTENT | {"budget": [1]}), ": not a result, 'budget' is not an object"),
        (json.dumps(CONTENT | {"dense_ffn_bytes": 0}), ": not a result, 'dense_ffn_bytes' is not positive"),
        (json.dumps(CONTENT | {"linear_bytes": 1}), ": not a result, 'dense_linear_bytes' is missing or not a number"),
        (json.dumps(CONTENT | {"dense_linear_bytes": 1}), ": not a result, 'linear_bytes' is missing or not a number"),
        (
            json.dumps(CONTENT | {"linear_bytes": 1, "dense_linear_bytes": 0}),
            ": not a result, 'dense_linear_bytes' is not positive",
        ),
        (f"{GOOD}\n\n{GOOD[:40]}\n{GOOD}\n", ", line 3: not readable as JSON"),
        (f"{GOOD[:40]}\n{GOOD}\n", ", line 1: not readable as JSON"),
        (f"{GOOD}\n{GOOD}\nkilled\n", ", line 3: not readable as JSON (Expecting value)"),
        (f"{GOOD}\n[]\n", ", line 2: not a result."),
        (f'{GOOD}\n{{"method": "tda"}}\n', ", line 2: not a result, 'text' is missing or not text"),
        (json.dumps([CONTENT, {}]), ", item 2: not a result, 'method' is missing or not text"),
        (f"[\n{GOOD},\n{GOOD}\n", ", line 4: not readable as JSON"),
        (json.dumps(CONTENT, indent=2).replace("0.1,", "0.1"), ", line 13: not readable as JSON"),
        ("[" * 100_000, ", line 1: not readable as JSON"),
    ],
)
def test_no_result(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TdaError) as raised:
        read_results(path)
    message = str(raised.value)
    assert message.startswith(f"{path}{reason}")
    assert message.endswith(".py with --json.")
    assert "\n" not in message
