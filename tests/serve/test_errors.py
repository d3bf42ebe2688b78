"""Errors, in the API's format and as exceptions of the official client."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.runtime import Model, load
from tda_export.runtime.decode_step import DecodeStep
from tda_export.serve import body_limit
from tda_export.serve.protocol import ChatRequest, CompletionRequest
from tests.runtime.conftest import add_token, edit_manifest
from tests.serve.conftest import BODY_BYTES, CONTEXT, NAME, PATIENCE, Served, serving

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
http = openai.DefaultHttpxClient(timeout=120)


def post(served: Served, path: str, body: Any) -> Any:
    return http.post(served.url + path, content=json.dumps(body), headers=JSON)


def assert_error(answer: Any, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
    """Require an error in the API's format, whose message contains `message`."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"model": ', b"\xff\xfe", b"[" * 30_000], ids=["none", "brace", "cut", "not UTF-8", "deep"]
)
def test_bodies_that_are_no_json(served: Served, path: str, content: bytes) -> None:
    answer = http.post(served.url + path, content=content, headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["param"] is None


def test_json_errors_are_named(served: Served) -> None:
    answer = http.post(served.url + CHAT, content=b'{"model": x}', headers=JSON)
    assert_error(answer, 400, "The body is not valid JSON: ", code="invalid_json")
    for body in (b"[]", b'"text"', b"3"):
        answer = http.post(served.url + CHAT, content=body, headers=JSON)
        assert_error(answer, 400, "The body is not a request: ", code="invalid_value")


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Field required"),
        ({"messages": [*HELLO, {"role": "x", "content": "x"}]}, "messages[1].role", "'user'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content", "valid string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "Field required",
        ),
        ({"stop": 5}, "stop", "valid string"),
        ({"stream_options": {"include_usage": "perhaps"}}, "stream_options.include_usage", "boolean"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": "0.5"}, "temperature", "valid number"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, or -1 for no limit"),
        ({"max_completion_tokens": -2}, "max_completion_tokens", "greater than or equal to 1, or -1 for no limit"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1"),
        ({"min_p": -0.1}, "min_p", "greater than or equal to 0"),
        ({"stop_token_ids": 5}, "stop_token_ids", "valid list"),
        (
            {"stop_token_ids": [5, 259]},
            "stop_token_ids",
            "Stop token 259 is not in the vocabulary: ids lie in [0, 259)",
        ),
        ({"ignore_eos": "perhaps"}, "ignore_eos", "boolean"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "valid dictionary"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages' cannot be set by the caller"),
        ({"chat_template_kwargs": {"range": 1}}, "chat_template_kwargs", "'range' cannot be set by the caller"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "integer"),
        ({"seed": "x"}, "seed", "integer"),
        ({"stop": ["a"] * 5}, "stop", "up to 4 strings"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stream": "perhaps"}, "stream", "boolean"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repetition_penalty": 1e39}, "repetition_penalty", "less than or equal to 100"),
        ({"model": None}, "model", "valid string"),
    ],
    ids=str,
)
def test_values(served: Served, change: dict[str, Any], param: str, text: str) -> None:
    answer = post(served, CHAT, {"model": NAME, "messages": HELLO} | change)
    code = "missing_required_parameter" if text == "Field required" else "invalid_value"
    assert_error(answer, 400, text, param=param, code=code)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (CompletionRequest, {"prompt": [{}] * 1000}),
        (CompletionRequest, {"prompt": [1, *["x"] * 1000]}),
        (CompletionRequest, {"prompt": [[{}] * 1000] * 3}),
        (CompletionRequest, {"prompt": "Hi", "stop": [1] * 1000}),
        (ChatRequest, {"messages": [1] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 1000}] * 3}),
    ],
    ids=["prompt", "token ids", "prompts", "stop", "messages", "content"],
)
def test_the_first_wrong_item_of_a_list_is_enough(kind: type[pydantic.BaseModel], change: dict[str, Any]) -> None:
    """Collecting all errors would take seconds, and other clients would wait."""
    with pytest.raises(pydantic.ValidationError) as raised:
        kind.model_validate({"model": NAME} | change)
    assert raised.value.error_count() <= 4


def test_numbers_that_json_does_not_have(served: Served) -> None:
    content = b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": NaN}'
    answer = http.post(served.url + CHAT, content=content, headers=JSON)
    assert_error(answer, 400, "temperature: ", param="temperature", code="invalid_value")


@pytest.mark.parametrize(
    "change",
    [
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"logprobs": True},
        {"top_logprobs": 3},
        {"logit_bias": {"50": 1}},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_supported(served: Served, change: dict[str, Any]) -> None:
    name = next(iter(change))
    answer = post(served, CHAT, {"model": NAME, "messages": HELLO} | change)
    assert_error(answer, 400, f"'{name}' is not supported", param=name, code="unsupported_parameter")


@pytest.mark.parametrize(
    "change", [{"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"logprobs": 0}, {"n": 3}], ids=str
)
def test_what_is_not_supported_of_completions(served: Served, change: dict[str, Any]) -> None:
    name = next(iter(change))
    answer = post(served, COMPLETIONS, {"model": NAME, "prompt": "Hi"} | change)
    assert_error(answer, 400, f"'{name}' is not supported", param=name, code="unsupported_parameter")


def test_content_that_is_not_supported(served: Served) -> None:
    content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    answer = post(served, CHAT, {"model": NAME, "messages": [{"role": "user", "content": content}]})
    message = "Content of type 'image_url' is not supported"
    assert_error(answer, 400, message, param="messages[0].content[1]", code="unsupported_content")


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}], ids=["empty", "null", "none"])
def test_tool_calls(served: Served, content: dict[str, Any]) -> None:
    """Messages with tool calls have no content."""
    message = "Tool calls and their results are not supported by this server. Leave them out."
    call = {"role": "assistant", "tool_calls": [{"id": "1"}]} | content
    answer = post(served, CHAT, {"model": NAME, "messages": [*HELLO, call]})
    assert_error(answer, 400, message, param="messages[1].tool_calls", code="unsupported_parameter")
    for role in ("tool", "function"):
        result = {"role": role, "tool_call_id": "1"} | content
        answer = post(served, CHAT, {"model": NAME, "messages": [*HELLO, result]})
        assert_error(answer, 400, message, param="messages[1].role", code="unsupported_parameter")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (["one", "two"], "2 prompts in one request"),
        ([[50], [51]], "2 prompts in one request"),
        ([], "0 prompts in one request"),
        ([50, 259], "Token ids must lie in [0, 259)"),
        ("", "The prompt is empty"),
        ([""], "The prompt is empty"),
        ("\ud800", "not valid UTF-8"),
    ],
    ids=repr,
)
def test_prompts(served: Served, prompt: Any, text: str) -> None:
    answer = post(served, COMPLETIONS, {"model": NAME, "prompt": prompt})
    assert_error(answer, 400, text, param="prompt", code="invalid_value")


def test_prompts_that_are_too_long(served: Served) -> None:
    text = f"maximum context length is {CONTEXT} tokens, and the prompt has {CONTEXT}. Shorten it."
    answer = post(served, COMPLETIONS, {"model": NAME, "prompt": "x" * CONTEXT})
    assert_error(answer, 400, text, param="prompt", code="context_length_exceeded")
    with pytest.raises(openai.BadRequestError, match="maximum context length") as raised:
        served.client().chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x" * 600}])
    assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")
    longest = served.client().completions.create(model=NAME, prompt="x" * (CONTEXT - 1), temperature=0)
    assert longest.usage is not None
    assert longest.usage.completion_tokens <= 1


def test_unknown_models(served: Served) -> None:
    client = served.client()
    text = f"The model 'gpt-9' does not exist; this server has '{NAME}'"
    for ask in (
        lambda: client.chat.completions.create(model="gpt-9", messages=HELLO),
        lambda: client.completions.create(model="gpt-9", prompt="Hi", stream=True),
        lambda: client.models.retrieve("gpt-9"),
    ):
        with pytest.raises(openai.NotFoundError, match=text) as raised:
            ask()
        assert (raised.value.param, raised.value.code) == ("model", "model_not_found")
    assert_error(http.get(f"{served.url}/v1/models/a/b"), 404, "'a/b'", param="model", code="model_not_found")


def test_halves_of_characters_are_shown_as_escapes(served: Served) -> None:
    answer = post(served, CHAT, {"model": "\ud800", "messages": HELLO})
    assert_error(answer, 404, r"The model '\ud800' does not exist", param="model", code="model_not_found")
    content = [{"type": "\udfff", "text": "x"}]
    answer = post(served, CHAT, {"model": NAME, "messages": [{"role": "user", "content": content}]})
    text = r"Content of type '\udfff' is not supported"
    assert_error(answer, 400, text, param="messages[0].content[0]", code="unsupported_content")


def test_unknown_urls_and_methods(served: Served) -> None:
    assert_error(http.get(f"{served.url}/v1/nothing"), 404, "Unknown URL: GET /v1/nothing.", code="unknown_url")
    answer = http.get(served.url + CHAT)
    assert_error(answer, 405, f"Not supported: GET {CHAT}.", code="method_not_supported")
    assert answer.headers["allow"] == "POST"
    assert_error(http.get(f"{served.url}/docs"), 404, "Unknown URL", code="unknown_url")


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_bodies_that_are_too_large(served: Served, chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model": "tiny", "prompt": "'
        for _ in range(100):
            yield b"x" * 10_000

    content = pieces() if chunked else b"".join(pieces())
    answer = http.post(served.url + COMPLETIONS, content=content, headers=JSON)
    assert_error(answer, 413, f"The body is larger than {BODY_BYTES} bytes. Shorten it.", code="body_too_large")


@pytest.mark.parametrize("length", [f"Content-Length: {2 * BODY_BYTES}", "Transfer-Encoding: chunked"])
def test_a_body_that_is_too_large_and_never_ends(served: Served, monkeypatch: pytest.MonkeyPatch, length: str) -> None:
    monkeypatch.setattr(body_limit, "DRAIN_SECONDS", 0.1)
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
        chunk = f"{BODY_BYTES + 1:x}\r\n".encode() if "chunked" in length else b""
        connection.sendall(head.encode() + chunk + b"x" * (BODY_BYTES + 1))
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_is_just_small_enough(served: Served) -> None:
    text = '{"model": "tiny", "prompt": "Hi", "temperature": 0, "max_tokens": 2, "user": "%s"}'
    body = text % ("x" * (BODY_BYTES - len(text) + 2))
    assert len(body) == BODY_BYTES
    assert http.post(served.url + COMPLETIONS, content=body, headers=JSON).status_code == 200
    assert http.post(served.url + COMPLETIONS, content=body + " ", headers=JSON).status_code == 413


def test_a_page_of_another_site_cannot_post(served: Served) -> None:
    """Browsers send text/plain to any site without a preflight request, but not JSON."""
    body = b'{"model": "tiny", "prompt": "Hi"}'
    form = "application/x-www-form-urlencoded"  # curl -d
    text = "it does not say that it is JSON. Add the header: -H 'Content-Type: application/json'."
    for kind in ("text/plain", form, "multipart/form-data; boundary=x", "text/json", ""):
        answer = http.post(served.url + COMPLETIONS, content=body, headers={"Content-Type": kind} if kind else {})
        assert_error(answer, 400, text, code="unsupported_content_type")
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/x+json"):
        assert http.post(served.url + COMPLETIONS, content=body, headers={"Content-Type": kind}).status_code == 200


def test_a_model_without_a_chat_template(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CHAT_TEMPLATE_FILE))
    with serving(load(artifact_copy, provider="cpu")) as served:
        answer = post(served, CHAT, {"model": NAME, "messages": HELLO})
        text = "no chat template, so it cannot chat. Send text to continue to /v1/completions."
        assert_error(answer, 400, text, param="messages", code="invalid_value")
        assert post(served, COMPLETIONS, {"model": NAME, "prompt": "Hi"}).status_code == 200


def test_a_token_that_the_model_does_not_have(artifact_copy: Path) -> None:
    add_token(artifact_copy, "<image_soft_token>")
    text = "The text contains '<image_soft_token>', token 259 of the tokenizer"
    with serving(load(artifact_copy, provider="cpu")) as served:
        messages = [{"role": "user", "content": "see <image_soft_token>"}]
        for extra in ({}, {"repetition_penalty": 1.5}, {"stream": True}):
            answer = post(served, CHAT, {"model": NAME, "messages": messages} | extra)
            assert_error(answer, 400, text, param="messages", code="invalid_value")
            answer = post(served, COMPLETIONS, {"model": NAME, "prompt": "<image_soft_token>"} | extra)
            assert_error(answer, 400, text, param="prompt", code="invalid_value")
        assert post(served, COMPLETIONS, {"model": NAME, "prompt": "Hi"}).status_code == 200


def test_a_request_that_only_the_driver_refuses(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still an error of the request."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise UsageError("Not so. Do otherwise.")

    monkeypatch.setattr(model, "generate", refuse)
    with serving(model) as served:
        answer = post(served, COMPLETIONS, {"model": NAME, "prompt": "Hi"})
        assert_error(answer, 400, "Not so. Do otherwise.", code="invalid_value")


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (TdaError("Out of luck. Try again."), "Out of luck. Try again.", "model_error"),
        (RuntimeError("secret"), "The server failed. Its log says why.", "internal_error"),
    ],
    ids=["foreseen", "unforeseen"],
)
def test_failures_of_the_model(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    text: str,
    code: str,
) -> None:
    """Before the first token, and in the middle of a stream. The next request is answered."""
    run, steps = DecodeStep._start, iter(range(100))

    def failing(step: DecodeStep, tokens: Any, *uncommitted: int) -> Any:
        if next(steps) == 3:
            raise error
        return run(step, tokens, *uncommitted)

    with serving(model) as served, caplog.at_level(logging.ERROR):
        with monkeypatch.context() as patch:
            patch.setattr(DecodeStep, "_start", failing)
            answer = post(served, COMPLETIONS, {"model": NAME, "prompt": "Hi", "temperature": 0})
            assert_error(answer, 500, text, code=code)
            steps = iter(range(100))
            stream = served.client().chat.completions.create(model=NAME, messages=HELLO, stream=True, temperature=0)
            with pytest.raises(openai.APIError, match=text):
                list(stream)
        assert str(error) in caplog.text
        assert post(served, COMPLETIONS, {"model": NAME, "prompt": "Hi"}).status_code == 200
