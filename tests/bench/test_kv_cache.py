"""`benchmarks/kv_cache.py` with random weights of a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.test_scripts import load

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> list[dict[str, object]]:
    monkeypatch.setattr("sys.argv", ["kv_cache.py", *map(str, arguments)])
    load("kv_cache", monkeypatch).main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_times_and_kl_of_a_shape(
    shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--shape", shape, "--provider", "cpu", "--contexts", 30, 100)
    timed = run(monkeypatch, capsys, *common, "--time", "--turns", 2, "--sparsity", 0.3, 0.5)
    assert [line["context"] for line in timed] == [30, 100]
    for line in timed:
        ways = [kv + sparsity for kv in ("float", "float16", "int8") for sparsity in ("", " 0.3", " 0.5")]
        assert all(line[way]["ms"] > 0 for way in ways)  # type: ignore[index]
    compared = run(monkeypatch, capsys, *common, "--windows", 2, "--tokens", 8)
    assert [line["context"] for line in compared] == [30, 100]
    for line in compared:
        assert 0 < line["float16"]["kl"] < line["int8"]["kl"] < 0.1  # type: ignore[index]


def test_float_comes_first(shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tda_export.graph.kv_formats.KV_FORMATS", ("int8", "float"))
    with pytest.raises(
        SystemExit, match=r"^Keys and values are in int8 and float. Give float first, then others, each"
    ):
        run(monkeypatch, capsys, "--shape", shape, "--provider", "cpu", "--contexts", 30)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "give FLOAT and at least one other artifact, or --shape."),
        (("one",), "give FLOAT and at least one other artifact, or --shape."),
        (("--shape", "llama-2-7b", "one", "two"), "give FLOAT and at least one other artifact, or --shape."),
        (("one", "two", "--weights", "float"), "--weights needs --shape: artifacts have their weights already."),
        (("--shape", "llama-2-7b", "--sparsity", 0.5), "--sparsity takes at most two shares, with --shape and --time."),
    ],
)
def test_arguments_that_do_not_go_together(
    given: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        run(monkeypatch, capsys, *given)
    assert capsys.readouterr().err.splitlines()[-1] == f"kv_cache.py: error: {message}"
