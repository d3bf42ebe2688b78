"""Results of `eval --json`, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.report.results import Result, grouped, read_result

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
    if content["method"] != "tda":
        content["budget"] = {} if content["method"] == "dense" else {"sparsity": 0.5}
    return Result(**{name: content[name] for name in Result.__dataclass_fields__})


def test_read(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(CONTENT))
    assert read_result(path) == result()
    assert read_result(path).share == 0.5


@pytest.mark.parametrize(
    ("method", "budget", "line"),
    [
        ("tda", {"sparsity": 0.5, "allocation": "uniform"}, "tda (uniform)"),
        ("tda", {"cett": 0.2}, "tda (cett)"),
        ("griffin", {"sparsity": 0.5}, "griffin"),
        ("dense", {}, "dense"),
    ],
)
def test_line(method: str, budget: dict[str, Any], line: str) -> None:
    one = Result(
        **{name: (CONTENT | {"method": method, "budget": budget})[name] for name in Result.__dataclass_fields__}
    )
    assert one.line == line


def test_missing() -> None:
    with pytest.raises(UsageError, match=r"nowhere.json: no such file. .*--results"):
        read_result(Path("nowhere.json"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not readable as JSON"),
        ("\xff", "not readable as JSON"),
        ("[]", "not a result"),
        ("{}", "'model' is not there or no text"),
        (json.dumps(CONTENT | {"text": 3}), "'text' is not there or no text"),
        (json.dumps(CONTENT | {"kl": None}), "'kl' is not there or no number"),
        (json.dumps(CONTENT | {"kl": float("nan")}), "'kl' is not there or no number"),
        (json.dumps(CONTENT | {"kl_stderr": True}), "'kl_stderr' is not there or no number"),
        (json.dumps(CONTENT | {"budget": None}), "'budget' is not there"),
        (json.dumps(CONTENT | {"dense_ffn_bytes": 0}), "'dense_ffn_bytes' is not positive"),
    ],
)
def test_no_result(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TdaError, match=reason) as raised:
        read_result(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert str(raised.value).endswith("Give the output of 'tda-export eval --json'.")


def test_groups() -> None:
    results = [result(ffn_bytes=60.0), result(prompt_tokens=64), result(method="griffin"), result(ffn_bytes=20.0)]
    groups = grouped(results)
    assert list(groups) == [("tiny", "harbour.txt", 16, 4), ("tiny", "harbour.txt", 64, 4)]
    assert [(one.method, one.share) for one in groups["tiny", "harbour.txt", 16, 4]] == [
        ("griffin", 0.5),
        ("tda", 0.2),
        ("tda", 0.6),
    ]
