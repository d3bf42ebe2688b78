"""Fields that this server does not support: none is ignored silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tda_export.serve.fields import UNSUPPORTED, WITHOUT_EFFECT
from tda_export.serve.protocol import ChatRequest, CompletionRequest
from tests.serve.conftest import NAME, Served
from tests.serve.test_errors import CHAT, COMPLETIONS, HELLO, assert_error, post

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"model": NAME, "messages": HELLO, "max_tokens": 1},
    COMPLETIONS: {"model": NAME, "prompt": "Hi", "max_tokens": 1},
}


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("value", [1, "x", True, [], {}, None], ids=repr)
def test_unknown_fields(served: Served, path: str, value: Any) -> None:
    answer = post(served, path, REQUESTS[path] | {"field_of_the_future": value})
    text = "Unknown parameter: 'field_of_the_future'. Leave it out."
    assert_error(answer, 400, text, param="field_of_the_future", code="unknown_parameter")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("max_token", "max_tokens"),
        ("Temperature", "temperature"),
        ("stop_token_id", "stop_token_ids"),
        ("chat_template_kwarg", "chat_template_kwargs"),
    ],
)
def test_misspelt_fields(served: Served, given: str, meant: str) -> None:
    answer = post(served, CHAT, REQUESTS[CHAT] | {given: 1})
    text = f"Unknown parameter: '{given}'. Did you mean '{meant}'?"
    assert_error(answer, 400, text, param=given, code="unknown_parameter")


def test_fields_of_the_other_endpoint(served: Served) -> None:
    for path, name, value in ((CHAT, "prompt", "Hi"), (COMPLETIONS, "chat_template_kwargs", {})):
        answer = post(served, path, REQUESTS[path] | {name: value})
        assert_error(answer, 400, f"Unknown parameter: '{name}'", param=name, code="unknown_parameter")


@pytest.mark.parametrize(
    "name", ["x" * 10_000, "\ud800", "model_fields", "__class__", "a.b[0]", ""], ids=lambda n: n[:9]
)
def test_names_that_may_be_anything(served: Served, name: str) -> None:
    answer = post(served, CHAT, REQUESTS[CHAT] | {name: 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("unknown_parameter", "invalid_value")
    assert len(answer.text) < 400


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields(served: Served, path: str, name: str) -> None:
    """They are refused, unless their value has no effect."""
    answer = post(served, path, REQUESTS[path] | {name: ["something"]})
    assert_error(answer, 400, f"'{name}' is not supported by this server", param=name, code="unsupported_parameter")
    for meaningless in (None, *UNSUPPORTED[name]):
        assert post(served, path, REQUESTS[path] | {name: meaningless}).status_code == 200


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_fields_without_effect(served: Served, path: str, name: str) -> None:
    for value in ("something", {"a": "b"}, True, None):
        assert post(served, path, REQUESTS[path] | {name: value}).status_code == 200


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"} | fields]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (message(naem="x"), "messages[0].naem"),
        (message(content=[{"type": "text", "text": "Hi", "weight": 2}]), "messages[0].content[0].weight"),
        (message(metadata={}), "messages[0].metadata"),
        ({"stream_options": {"usage": True}}, "stream_options.usage"),
    ],
    ids=["message", "content", "without effect elsewhere", "stream"],
)
def test_unknown_fields_inside(served: Served, change: dict[str, Any], param: str) -> None:
    answer = post(served, CHAT, REQUESTS[CHAT] | change)
    assert_error(answer, 400, f"Unknown parameter: '{param}'", param=param, code="unknown_parameter")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        (message(role="assistant", refusal="No."), "messages[0].refusal"),
        (message(role="assistant", reasoning_content="Hm."), "messages[0].reasoning_content"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unsupported_fields_inside(served: Served, change: dict[str, Any], param: str) -> None:
    answer = post(served, CHAT, REQUESTS[CHAT] | change)
    assert_error(answer, 400, f"'{param}' is not supported", param=param, code="unsupported_parameter")


def test_an_answer_may_be_sent_back_as_it_came(served: Served) -> None:
    """With all the fields that clients fill in."""
    said = post(served, CHAT, REQUESTS[CHAT]).json()["choices"][0]["message"]
    filled = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None, "reasoning_content": None}
    messages = [*HELLO, said | filled, *HELLO]
    assert post(served, CHAT, REQUESTS[CHAT] | {"messages": messages}).status_code == 200


def test_all_fields_are_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    supported = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert not [name for name in (*supported, *WITHOUT_EFFECT, *UNSUPPORTED) if f"`{name}`" not in text]
