"""Slow chat templates: only requests that come later wait for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tda_export.graph import contract
from tda_export.runtime import chat_template, load
from tests.runtime.conftest import replace_file
from tests.runtime.test_chat_template import ENDLESS
from tests.serve.conftest import NAME, serving, until
from tests.serve.test_errors import CHAT, COMPLETIONS, HELLO, assert_error, http, post

SLOW_FOR_SOME = "{% if messages[0].content == 'slow' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"


def test_the_event_loop_does_not_wait_for_a_template(artifact_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile /health is answered, and a running answer goes on. Later requests wait for their turn."""
    replace_file(artifact_copy, contract.CHAT_TEMPLATE_FILE, SLOW_FOR_SOME.encode())
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1000)
    answers: dict[str, Any] = {}

    def ask(content: str) -> None:
        messages = [{"role": "user", "content": content}]
        answers[content] = post(served, CHAT, {"model": NAME, "messages": messages, "max_tokens": 2})

    with serving(load(artifact_copy, provider="cpu")) as served:
        stream = served.client().completions.create(model=NAME, prompt="Hi", max_tokens=8, stream=True)
        process = served.model.text._template
        slow, usual = (threading.Thread(target=ask, args=(content,)) for content in ("slow", "usual"))
        slow.start()
        until(lambda: process._lock.locked())
        usual.start()
        for _ in range(20):
            assert http.get(f"{served.url}/health").json()["status"] == "ok"
        assert http.get(f"{served.url}/metrics").status_code == 200
        assert list(stream)[-1].choices[0].finish_reason
        assert answers == {}  # the template is still running
        served.model.text.close()  # as after its time limit
        slow.join()
        usual.join()
    text = "the chat template cannot be rendered (its process was ended)"
    assert_error(answers["slow"], 400, text, param="messages", code="invalid_value")
    assert answers["usual"].status_code == 200


def test_stopping_does_not_wait_for_a_template(artifact_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends, and waiting clients get an error."""
    replace_file(artifact_copy, contract.CHAT_TEMPLATE_FILE, ENDLESS.encode())
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1000)
    answers = list[Any]()

    def ask(path: str, body: dict[str, Any]) -> None:
        answers.append(post(served, path, {"model": NAME} | body))

    with serving(load(artifact_copy, provider="cpu")) as served:
        process = served.model.text._template
        threads = [threading.Thread(target=ask, args=(CHAT, {"messages": HELLO}))]
        threads[0].start()
        until(lambda: process._lock.locked())
        threads += [
            threading.Thread(target=ask, args=(CHAT, {"messages": HELLO})),
            threading.Thread(target=ask, args=(COMPLETIONS, {"prompt": "Hi"})),
        ]
        for thread in threads[1:]:
            thread.start()
        until(lambda: served.server.server_state.tasks and len(served.server.server_state.tasks) == 3)
    for thread in threads:
        thread.join()
    assert len(answers) == 3
    for answer in answers:
        assert_error(answer, 503, "The server is shutting down", code="shutting_down")
    assert process._process is not None
    assert process._process.poll() is not None


def test_prompts_are_read_in_the_order_in_which_they_come(artifact_copy: Path) -> None:
    """A completion does not overtake a chat whose template is slow."""
    waste = "{% for i in range(300) %}{% for j in range(1000) %}{% endfor %}{% endfor %}"
    replace_file(artifact_copy, contract.CHAT_TEMPLATE_FILE, f"{waste}chat".encode())
    with serving(load(artifact_copy, provider="cpu")) as served:
        order, submit = list[str](), served.worker.submit

        def submitted(job: Any) -> None:
            order.append(job.endpoint)
            submit(job)

        served.worker.submit = submitted  # type: ignore[method-assign]
        chat = threading.Thread(target=post, args=(served, CHAT, {"model": NAME, "messages": HELLO, "max_tokens": 1}))
        chat.start()
        until(lambda: served.model.text._template._lock.locked() or order)
        post(served, COMPLETIONS, {"model": NAME, "prompt": "Hi", "max_tokens": 1})
        chat.join()
        assert order == ["chat", "completions"]
