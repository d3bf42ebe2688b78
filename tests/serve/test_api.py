"""The API with the official client: answers, streams, usage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tda_export.graph import contract
from tda_export.runtime import Model, Sampling, load
from tda_export.serve import orders
from tda_export.serve.replies import server_sent
from tests.runtime.conftest import edit_manifest, replace_file
from tests.serve.conftest import CONTEXT, NAME, Served, serving

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The sea is calm tonight"},
]
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


def expected(model: Model, prompt: Any, **options: Any) -> Any:
    """Return the generation of the driver."""
    tokens = prompt if isinstance(prompt, str) else model.text.encode_chat(prompt)
    generation = model.generate(tokens, context=CONTEXT, **options)
    list(generation)
    return generation


def test_models(served: Served) -> None:
    client = served.client()
    (only,) = client.models.list().data
    assert (only.id, only.object, only.owned_by) == (NAME, "model", "tda-export")
    assert client.models.retrieve(NAME) == only


def test_chat(served: Served) -> None:
    answer = served.client().chat.completions.create(messages=MESSAGES, max_tokens=16, **GREEDY)
    ours = expected(served.model, MESSAGES, max_new_tokens=16)
    assert (answer.object, answer.model) == ("chat.completion", NAME)
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert (choice.message.role, choice.message.content) == ("assistant", ours.text)
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (ours.metrics.prompt_tokens, 16)
    assert usage.total_tokens == usage.prompt_tokens + 16


def test_chat_streams(served: Served) -> None:
    options: dict[str, Any] = {"messages": MESSAGES, "max_completion_tokens": 24, **GREEDY}
    ours = expected(served.model, MESSAGES, max_new_tokens=24)
    chunks = list(served.client().chat.completions.create(stream=True, **options))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(len(chunk.choices) == 1 and "usage" not in chunk.model_fields_set for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == ours.text
    assert sum(map(bool, pieces)) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_stream_with_usage(served: Served) -> None:
    options: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "stream_options": {"include_usage": True}}
    *chunks, last = served.client().chat.completions.create(stream=True, **options, **GREEDY)
    assert all(chunk.model_dump(exclude_unset=True)["usage"] is None for chunk in chunks)  # null, not absent
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.completion_tokens, last.usage.total_tokens) == (8, last.usage.prompt_tokens + 8)


@pytest.mark.parametrize("tokens", [False, True], ids=["text", "token ids"])
def test_completions(served: Served, tokens: bool) -> None:
    text = "The sea is calm tonight"
    prompt: Any = served.model.text.encode(text) if tokens else text
    answer = served.client().completions.create(prompt=prompt, max_tokens=12, **GREEDY)
    ours = expected(served.model, text, max_new_tokens=12)
    (choice,) = answer.choices
    assert (answer.object, choice.text, choice.finish_reason) == ("text_completion", ours.text, "length")
    chunks = list(served.client().completions.create(prompt=[prompt], max_tokens=12, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == ours.text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_limits_that_nobody_gave(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions then have 16 tokens, as in the API. Chats have the usual number, or what fits the context."""
    answer = served.client().completions.create(prompt="The sea", **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    chat = served.client().chat.completions.create(messages=MESSAGES, **GREEDY)
    ours = expected(served.model, MESSAGES, max_new_tokens=1000)
    assert chat.choices[0].message.content == ours.text
    assert chat.choices[0].finish_reason == {"context": "length"}.get(ours.metrics.finish_reason, "stop")
    assert chat.usage is not None
    assert chat.usage.total_tokens <= CONTEXT
    monkeypatch.setattr(orders, "USUAL_NEW_TOKENS", 20)
    chat = served.client().chat.completions.create(messages=MESSAGES, **GREEDY)
    assert (chat.choices[0].finish_reason, chat.usage and chat.usage.completion_tokens) == ("length", 20)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_no_limit(model: Model, field: str) -> None:
    """-1 means the rest of the context, or the server's own limit."""
    ask: dict[str, Any] = {"messages": MESSAGES, "extra_body": {field: -1}, **GREEDY}
    for new_tokens in (None, 30):
        with serving(model, new_tokens=new_tokens) as served:
            answer = served.client().chat.completions.create(**ask)
        ours = expected(model, MESSAGES, max_new_tokens=new_tokens or 1000)
        assert answer.choices[0].message.content == ours.text
        assert answer.usage is not None
        assert answer.usage.completion_tokens == ours.metrics.new_tokens > 16


def test_completions_without_limit(served: Served) -> None:
    answer = served.client().completions.create(prompt="The sea", extra_body={"max_tokens": -1}, **GREEDY)
    ours = expected(served.model, "The sea", max_new_tokens=1000)
    assert answer.choices[0].text == ours.text
    assert ours.metrics.new_tokens > 16


def test_limits_beyond_the_servers_are_its_own(model: Model) -> None:
    with serving(model, new_tokens=10) as served:
        client = served.client()
        for limit in ({"max_tokens": 10**9}, {"max_completion_tokens": 11}):
            chat = client.chat.completions.create(messages=MESSAGES, extra_body=limit, **GREEDY)
            assert chat.choices[0].finish_reason == "length"
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 10
        for path in (
            client.chat.completions.create(messages=MESSAGES, **GREEDY),
            client.completions.create(prompt="Hi", **GREEDY),
        ):
            assert path.usage is not None
            assert path.usage.completion_tokens == 10


def test_stop_tokens(served: Served) -> None:
    """In a chat and in a completion. They are not part of the answer."""
    tokens = [token.id for token in served.model.generate("The sea", max_new_tokens=16)]
    answer = served.client().completions.create(
        prompt="The sea", extra_body={"stop_token_ids": [258, tokens[5]]}, max_tokens=16, **GREEDY
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens.index(tokens[5])
    chat = expected(served.model, MESSAGES, max_new_tokens=16, stop_token_ids=[tokens[5]])
    said = served.client().chat.completions.create(
        messages=MESSAGES, extra_body={"stop_token_ids": [tokens[5]]}, max_tokens=16, **GREEDY
    )
    assert said.choices[0].message.content == chat.text


def test_end_tokens_can_be_ignored(artifact_copy: Path) -> None:
    model = load(artifact_copy, provider="cpu")
    tokens = [token.id for token in model.generate("The sea", max_new_tokens=16)]
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=[tokens[4]]))
    with serving(load(artifact_copy, provider="cpu")) as served:
        for ignore, count in ((None, tokens.index(tokens[4])), (False, tokens.index(tokens[4])), (True, 16)):
            answer = served.client().completions.create(
                prompt="The sea", extra_body={"ignore_eos": ignore}, max_tokens=16, **GREEDY
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == count


def test_variables_for_the_chat_template(artifact_copy: Path) -> None:
    """Qwen3 and SmolLM3 switch off thinking in this way."""
    template = b"{{ messages[0].content }}{% if enable_thinking is false %}<no>{% endif %}{{ messages[0].name }}"
    replace_file(artifact_copy, contract.CHAT_TEMPLATE_FILE, template)
    with serving(load(artifact_copy, provider="cpu")) as served:
        for variables, text in (
            (None, "Hi"),
            ({"enable_thinking": True}, "Hi"),
            ({"enable_thinking": False}, "Hi<no>"),
        ):
            answer = served.client().chat.completions.create(
                messages=[{"role": "user", "content": "Hi", "name": "Ada"}],
                max_tokens=1,
                extra_body={"chat_template_kwargs": variables},
                **GREEDY,
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(text) + len("Ada")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(served: Served, stream: bool) -> None:
    plain = expected(served.model, MESSAGES, max_new_tokens=24).text
    stop = plain[5:8]
    options: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 24, "stop": [stop, "never there"], **GREEDY}
    if stream:
        chunks = list(served.client().chat.completions.create(stream=True, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = served.client().chat.completions.create(**options).choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    assert (text, reason) == (plain[: plain.index(stop)], "stop")


def test_events_are_lines_whatever_their_text() -> None:
    """Also for Python's splitlines, which splits at some characters beyond ASCII."""
    event = {"text": "a\u2028b\u2029c\x85d\x0be\nf\u4e16"}
    data, empty = server_sent(event).decode().splitlines()
    assert (json.loads(data.removeprefix("data: ")), empty) == (event, "")


def test_sampling(served: Served) -> None:
    def ask(**options: Any) -> str:
        answer = served.client().chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=16, **options)
        return answer.choices[0].message.content or ""

    plain = ask(seed=7)
    assert plain == expected(served.model, MESSAGES, max_new_tokens=16, sampling=Sampling(1.0, seed=7)).text
    assert plain == ask(seed=7) != ask(seed=8)
    assert ask(seed=-1) == ask(seed=2**64 - 1)
    others = {"top_k": 20, "repetition_penalty": 1.2, "min_p": 0.02}
    every = ask(seed=7, temperature=0.7, top_p=0.9, extra_body=others)
    sampling = Sampling(0.7, 20, 0.9, 7, 1.2, 0.02)
    assert every == expected(served.model, MESSAGES, max_new_tokens=16, sampling=sampling).text
    assert plain == ask(seed=7, extra_body={"top_k": -1, "min_p": 0})
    assert ask(seed=7, extra_body={"min_p": 1}) == expected(served.model, MESSAGES, max_new_tokens=16).text


def test_what_means_nothing_is_taken(served: Served) -> None:
    """Fields without effect are accepted, because clients send defaults."""
    harmless: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "user": "someone",
        "stop": None,
    }
    extra = {"tools": [], "modalities": ["text"], "echo": None, "min_tokens": 0, "store": False}
    answer = served.client().chat.completions.create(
        messages=MESSAGES, max_tokens=4, extra_body=extra, **harmless, **GREEDY
    )
    assert answer.choices[0].message.content == expected(served.model, MESSAGES, max_new_tokens=4).text


def test_content_in_parts_and_developers(served: Served) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "The sea is calm tonight"}], "name": "x"},
    ]
    answer = served.client().chat.completions.create(messages=parts, max_tokens=8, **GREEDY)
    assert answer.choices[0].message.content == expected(served.model, MESSAGES, max_new_tokens=8).text


def test_a_chat_goes_on_where_it_was(model: Model) -> None:
    """The second request repeats the first and its answer. Only new tokens are read."""
    with serving(model) as served:
        client, messages = served.client(), list(MESSAGES)
        first = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
        assert first.usage is not None
        assert first.usage.prompt_tokens_details is not None
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        messages.append({"role": "assistant", "content": first.choices[0].message.content})
        messages.append({"role": "user", "content": "Why?"})
        second = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
        assert second.choices[0].message.content == expected(model, messages, max_new_tokens=8).text
        assert second.usage is not None
        assert second.usage.prompt_tokens_details is not None
        assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens


def test_health(served: Served) -> None:
    answer = openai.DefaultHttpxClient().get(f"{served.url}/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "model": NAME, "waiting": 0}
