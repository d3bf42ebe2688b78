"""Chat templates: hostile ones, closing early, and variables."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tda_export.bench.random_model import byte_tokenizer
from tda_export.errors import TdaError, UsageError
from tda_export.runtime import chat_template, open_artifact
from tda_export.runtime.chat_template import ChatTemplate, check_template_kwargs
from tda_export.runtime.text import Text
from tests.runtime.test_text import with_template

HELLO = [{"role": "user", "content": "Hi"}]
GOOD = "{{ messages[0].content }}!"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
HOSTILE = {
    "nested ranges": ENDLESS,
    "recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "large number": "{{ 10 ** (10 ** 10) }}",
    "large text": "{{ ('a' * (2 * 10 ** 9)) | length }}",
    "large list": "{{ ([0] * 10 ** 9) | length }}",
    "doubled text": DOUBLING,
    "batch": "{{ [1] | batch(10 ** 9, 0) | list | length }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "center": "{{ 'a' | center(4 * 10 ** 9) | length }}",
    "method": "{{ 'a'.ljust(4 * 10 ** 9) | length }}",
    "format": "{{ '%4000000000d' % 1 }}",
    "replace": "{{ ('a' * 10 ** 5).replace('a', 'a' * 10 ** 5) | length }}",
    "lipsum": "{{ lipsum(10 ** 6) | length }}",
    "much text": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
}
REASON = (
    r"the chat template cannot be rendered \(it (takes more than 1 seconds|needs more than 512 MiB|writes more than)"
)


def template(folder: Path, source: str) -> ChatTemplate:
    path = folder / "chat_template.jinja"
    path.write_text(source, encoding="utf-8")
    return ChatTemplate(path)


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of memory")
@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """They leave nothing behind, and the next text is rendered."""
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 1)
    hostile = template(tmp_path, source)
    with pytest.raises(TdaError, match=REASON):
        hostile.render(HELLO, {})
    (tmp_path / "chat_template.jinja").write_text(GOOD)
    monkeypatch.undo()
    assert hostile.render(HELLO, {}) == "Hi!"


def test_long_messages_are_no_much_text(tmp_path: Path) -> None:
    """The limit of a rendered text grows with the messages."""
    content = "世" * 3_000_000
    assert template(tmp_path, GOOD).render([{"role": "user", "content": content}], {}) == content + "!"


def test_one_process_renders_all(tmp_path: Path) -> None:
    """It starts with the first text, and ends when the template is closed."""
    made = template(tmp_path, GOOD)
    assert made._process is None
    made.render(HELLO, {})
    process = made._process
    assert process is not None
    made.render(HELLO, {})
    assert made._process is process
    del made
    gc.collect()
    assert process.poll() is not None


def test_a_process_that_is_gone_is_replaced(tmp_path: Path) -> None:
    made = template(tmp_path, GOOD)
    made.render(HELLO, {})
    assert made._process is not None
    made._process.kill()
    made._process.wait()
    assert made.render(HELLO, {}) == "Hi!"
    made.close()
    made.close()
    assert made.render(HELLO, {}) == "Hi!"


def test_threads_take_turns(tmp_path: Path) -> None:
    made, said = template(tmp_path, GOOD), dict[int, str]()

    def ask(number: int) -> None:
        said[number] = made.render([{"role": "user", "content": f"{number}"}], {})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: f"{number}!" for number in range(20)}


def test_closing_ends_a_rendering(tmp_path: Path) -> None:
    made = template(tmp_path, ENDLESS)
    timer = threading.Timer(0.5, made.close)
    timer.start()
    with pytest.raises(TdaError, match="its process was ended"):
        made.render(HELLO, {})
    timer.join()


def test_closing_while_the_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no process to end yet. The rendering still ends, and the next text is rendered."""
    made, start = template(tmp_path, ENDLESS), subprocess.Popen

    def slow_start(*arguments: Any, **options: Any) -> Any:
        made.close()
        return start(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", slow_start)
        with pytest.raises(TdaError, match="its process was ended"):
            made.render(HELLO, {})
    (tmp_path / "chat_template.jinja").write_text(GOOD)
    assert made.render(HELLO, {}) == "Hi!"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = template(tmp_path, GOOD)
    for _ in range(5):
        made.render(HELLO, {})
        made.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_python_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(TdaError, match="process that renders chat templates cannot be started"):
        template(tmp_path, GOOD).render(HELLO, {})


@pytest.mark.parametrize("content", [None, b"\xff"], ids=["missing", "not UTF-8"])
def test_a_file_that_is_no_template(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "chat_template.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TdaError, match="cannot be rendered"):
        ChatTemplate(path).render(HELLO, {})


VARIABLES: dict[str, Any] = {"enable_thinking": False, "level": 1.5, "tags": ["ü", None, {"a": [1]}], "none": None}


def test_variables_reach_the_template(artifact_copy: Path) -> None:
    """As in transformers."""
    source = "{{ enable_thinking }} {{ level }} {{ tags | tojson }} {{ none is none }} {{ other is defined }}"
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    expected = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True, **VARIABLES)
    text: Text = with_template(artifact_copy, source)
    assert text.chat(HELLO, VARIABLES) == expected
    assert text.encode_chat(HELLO, VARIABLES) == text.encode(expected)


@pytest.mark.parametrize(
    "name", ["messages", "tools", "bos_token", "add_generation_prompt", "raise_exception", "range"]
)
def test_names_that_are_taken(artifact_copy: Path, name: str) -> None:
    text = Text(open_artifact(artifact_copy))
    with pytest.raises(UsageError, match=f"variable '{name}' cannot be set by the caller. Leave it out"):
        text.chat(HELLO, {name: "x"})


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "value", [object(), b"x", {"y": [float("inf")]}, {1, 2}, DEEP, 10**5000], ids=lambda value: str(type(value))
)
def test_variables_that_are_no_json(value: Any) -> None:
    with pytest.raises(UsageError, match="variable 'x' is not plain JSON"):
        check_template_kwargs({"x": value})
