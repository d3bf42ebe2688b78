"""Results: names and order of lines and charts."""

from __future__ import annotations

from typing import Any

import pytest

from tda_export.report.methods_section import methods_section
from tda_export.report.results import Result, grouped
from tests.report.svg import by_class, centre, parse, reader

CONTENT: dict[str, Any] = {
    "model": "tiny",
    "dtype": "float32",
    "method": "tda",
    "budget": {"sparsity": 0.5, "allocation": "uniform"},
    "text": "harbour.txt",
    "prompt_tokens": 16,
    "continuation_tokens": 4,
    "kl": 0.1,
    "kl_stderr": 0.01,
    "perplexity": 12.0,
    "dense_perplexity": 10.0,
    "agreement": 0.9,
    "density": 0.5,
    "ffn_bytes": 50.0,
    "dense_ffn_bytes": 100,
}


def result(**changes: Any) -> Result:
    content = CONTENT | changes
    if content["method"] != "tda" and "budget" not in changes:
        content["budget"] = {} if content["method"] == "dense" else {"sparsity": 0.5}
    return Result(**{name: content[name] for name in Result.__dataclass_fields__ if name in content})


@pytest.mark.parametrize(
    ("method", "budget", "line"),
    [
        ("tda", {"sparsity": 0.5, "allocation": "kl"}, "TDA (by KL)"),
        ("tda", {"max_kl": 0.5}, "TDA (by KL)"),
        ("tda", {"sparsity": 0.5, "allocation": "uniform"}, "TDA (uniform)"),
        ("uniform", {"sparsity": 0.5, "allocation": "uniform"}, "TDA (uniform)"),
        ("tda", {"cett": 0.2}, "TDA (equal CETT)"),
        ("paper", {"cett": 0.2}, "paper's method"),
        ("paper", {}, "paper's method"),
        ("griffin", {"sparsity": 0.5}, "Griffin"),
        ("tt", {"sparsity": 0.3}, "TT"),
        ("static", {"sparsity": 0.3}, "static masks"),
        ("cats", {"sparsity": 0.3}, "CATS"),
        ("dejavu", {"sparsity": 0.3}, "DejaVu's predictors"),
        ("dense", {}, "dense"),
        ("priced", {"sparsity": 0.5}, "priced rows"),
        ("priced", {"max_kl": 0.05}, "priced rows"),
        ("priced", {"price": 1e-6}, "priced rows"),
        ("priced", {"sparsity": 0.5, "parts": "ffn"}, "priced rows (ffn)"),
        ("teal", {"sparsity": 0.5, "densities": "greedy"}, "TEAL (greedy)"),
        ("wina", {"sparsity": 0.5, "parts": "ffn"}, "WINA (ffn)"),
        ("moe", {"sparsity": 0.5}, "MoEfication"),
        ("another", {"rule": "its own"}, "another (its own)"),
    ],
)
def test_line(method: str, budget: dict[str, Any], line: str) -> None:
    assert result(method=method, budget=budget).line == line


def test_budget_text() -> None:
    assert result(budget={"sparsity": 0.33079576, "allocation": "kl"}).budget_text == "sparsity 0.3308, allocation kl"


def test_groups() -> None:
    results = [result(ffn_bytes=60.0), result(prompt_tokens=64), result(method="griffin"), result(ffn_bytes=20.0)]
    groups = grouped(results)
    assert list(groups) == [("tiny", "harbour.txt", 16, 4), ("tiny", "harbour.txt", 64, 4)]
    assert [(one.method, one.share) for one in groups["tiny", "harbour.txt", 16, 4]] == [
        ("griffin", 0.5),
        ("tda", 0.2),
        ("tda", 0.6),
    ]


def test_section_without_labels() -> None:
    """Unknown values are left out of captions, and are a dash in the table."""
    unknown = result(model=None, continuation_tokens=None)
    section = methods_section([result(), unknown])
    assert [figure.caption for figure in section.figures] == [
        "FFN bytes: harbour.txt, prompts of 16 tokens. Bars: one standard error.",
        "FFN bytes: tiny on harbour.txt, prompts of 16 tokens and 4 decoded. Bars: one standard error.",
    ]
    assert [row[:4] for row in section.tables[0].rows] == [
        ["–", "harbour.txt", "16", "TDA (uniform)"],
        ["tiny", "harbour.txt", "16\u00a0+\u00a04", "TDA (uniform)"],
    ]


def test_bytes_of_linears_have_a_chart_and_a_column_where_they_are_known() -> None:
    known = result(method="priced", linear_bytes=120.0, dense_linear_bytes=200)
    assert (known.share, known.linear_share) == (0.5, 0.6)
    assert result().linear_share is None
    section = methods_section([result(), known])
    assert [figure.caption.partition(":")[0] for figure in section.figures] == [
        "Bytes of the layers' linears",
        "FFN bytes",
    ]
    legends = [[text.text for text in by_class(parse(figure.chart), "legend")] for figure in section.figures]
    assert legends == [["priced rows"], ["TDA (uniform)", "priced rows"]]
    root = parse(section.figures[0].chart)
    (mark,) = by_class(root, "mark")[1:]  # the first one is the legend's
    assert reader(root, "x")(centre(mark)[0]) == pytest.approx(0.6, rel=2e-2)
    column = section.tables[0].columns.index("bytes of the layers' linears, share of dense")
    assert [row[column] for row in section.tables[0].rows] == ["–", "0.600"]
