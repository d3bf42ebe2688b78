"""The page of examples/browser: its script against a real server, without a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tda_export.runtime import Model, load
from tests.examples.applications import EXAMPLES, run
from tests.serve.conftest import NAME, Served, serving, until

PAGE = EXAMPLES / "browser" / "index.html"
pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def model(priced_artifact: Path) -> Model:
    return load(priced_artifact, provider="cpu")


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving(model, new_tokens=24) as running:  # answers of a random model fill the context quickly
        yield running


def steps(server: str, *wanted: dict[str, Any]) -> list[dict[str, Any]]:
    printed = run("node", Path(__file__).parent / "page.mjs", PAGE, server, json.dumps(wanted))
    return [json.loads(line) for line in printed.splitlines()]


def test_each_message_is_asked_with_the_slider(served: Served) -> None:
    first, second = steps(served.url, {"say": "Hello"}, {"skip": "0.3", "say": "Why?"})
    assert first["body"]["messages"] == [{"role": "user", "content": "Hello"}]
    assert second["body"]["messages"][1:] == [
        {"role": "assistant", "content": first["answer"]},
        {"role": "user", "content": "Why?"},
    ]
    for step, skip in ((first, 0.5), (second, 0.3)):
        assert step["body"]["model"] == NAME
        assert step["body"]["sparsity"] == skip
        assert step["skipped"] == f"{round(100 * skip)} %"
        assert step["answer"]
        assert step["button"] == "Send"
        speed, share = step["cost"].split(", ")
        assert float(speed.removesuffix(" tokens/s")) > 0
        assert int(share.removesuffix(" % of the weight bytes read")) == pytest.approx(100 * (1 - skip), abs=1)


def test_stop_cancels_the_answer(model: Model) -> None:
    with serving(model) as served:
        (step,) = steps(served.url, {"say": "Hello", "stop": True})
        until(lambda: served.worker.idle)
    assert step["answer"]
    assert "read" not in step["cost"]  # which comes only at the end of a whole answer
    assert step["button"] == "Send"


def test_errors_are_shown(served: Served) -> None:
    refused, answered = steps(served.url, {"skip": "0.9", "say": "Hello"}, {"skip": "0.5", "say": "Again"})
    assert "Sparsity 0.9 is more than was measured" in refused["cost"]
    assert answered["body"]["messages"] == [{"role": "user", "content": "Again"}]  # the refused message is forgotten
    (alone,) = steps("http://127.0.0.1:9", {"say": "Hello"})
    assert alone["cost"] == "No answer from http://127.0.0.1:9."


def test_page_takes_nothing_from_elsewhere() -> None:
    html = PAGE.read_text()
    assert "innerHTML" not in html
    assert html.count("http") == 1  # the server's usual address
