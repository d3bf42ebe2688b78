"""`tda-export serve` as a process: start, output and end."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.conftest import run_cli


@contextlib.contextmanager
def started(*arguments: object, descriptors: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start a server that may open this many `descriptors`. Yield the process, its first output, and the address."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test in the background ignores it
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    command = [sys.executable, "-m", "tda_export", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        preexec_fn=prepare,
    )
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"^Serving \S+ on (\S+)\. Ctrl-C stops\.\n", said, re.MULTILINE)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, said, found[1]
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminate"])
def test_it_serves_and_stops(tiny_artifact: Path, number: int) -> None:
    with started(tiny_artifact, "--provider", "cpu", "--name", "sea", "--max-new-tokens", "7") as (process, said, url):
        assert said.startswith("Serving sea on http://127.0.0.1:")
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="sea", messages=[{"role": "user", "content": "Hi"}])
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 7
        stream = client.completions.create(model="sea", prompt="The sea", max_tokens=7, stream=True)
        process.send_signal(number)
        assert list(stream)[-1].choices[0].finish_reason
        client.close()
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_options_reach_the_server(tiny_artifact: Path) -> None:
    options = ("--mask", "dense", "--context", 40, "--max-body", 500, "--host", "::1", "--queue", 3, "--grace", 0)
    with started(tiny_artifact, *options) as (_, said, url):
        assert re.fullmatch(r"Serving tiny on http://\[::1\]:\d+/v1\. Ctrl-C stops\.\n", said)
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        answer = client.completions.create(model="tiny", prompt="x" * 30, max_tokens=100, temperature=0)
        assert answer.usage is not None
        assert answer.usage.total_tokens <= 40
        with pytest.raises(openai.BadRequestError, match="maximum context length is 40 tokens"):
            client.completions.create(model="tiny", prompt="x" * 40)
        with pytest.raises(openai.APIStatusError, match="larger than 500 bytes"):
            client.completions.create(model="tiny", prompt="x" * 600)
        page = openai.DefaultHttpxClient().get(url.removesuffix("v1") + "metrics").text
        assert "tda_export_skippable_bytes_share 1.0" in page


def test_answers_are_kept(priced_artifact: Path) -> None:
    ask: dict[str, Any] = {"model": "priced", "max_tokens": 12, "temperature": 0}
    cached = {}
    for option in ("--reread-answers", "--keep-answers"):
        with started(priced_artifact, "--sparsity", 0.4, option) as (_, _, url):
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            first = client.completions.create(prompt="The sea is calm", **ask)
            second = client.completions.create(prompt="The sea is calm" + first.choices[0].text, **ask)
            assert second.usage is not None
            assert second.usage.prompt_tokens_details is not None
            cached[option] = second.usage.prompt_tokens_details.cached_tokens
    assert cached["--keep-answers"] >= cached["--reread-answers"]


def test_a_lookup(priced_artifact: Path) -> None:
    """Answers stay the same, with and without streaming, and accepted drafts are counted."""
    ask: dict[str, Any] = {"model": "priced", "prompt": "the sea, the sea, the sea", "max_tokens": 160}
    ask |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    answers, counted = [], []
    for lookup in (0, 4):
        with started(priced_artifact, "--lookup", lookup) as (_, _, url):
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            whole = client.completions.create(**ask).choices[0].text
            streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
            assert streamed == whole
            answers.append(whole)
            page = openai.DefaultHttpxClient().get(url.removesuffix("v1") + "metrics").text
        names = ("drafted", "accepted")
        found = [re.search(rf"^tda_export_{name}_tokens_total (\S+)$", page, re.MULTILINE) for name in names]
        counted.append([float(match.group(1)) for match in found if match])
    assert answers[0] == answers[1]
    assert counted[0] == [0, 0]
    assert 0 < counted[1][1] <= counted[1][0]


def test_an_address_that_others_reach_is_said(tiny_artifact: Path) -> None:
    with started(tiny_artifact, "--host", "0.0.0.0") as (_, said, _):
        assert re.match(r"Anyone who can reach http://0\.0\.0\.0:\d+ can use it: there is no authentication\.\n", said)


def test_hosts_and_sites(tiny_artifact: Path) -> None:
    """--allowed-host and --cors reach the server, together with the name in --host."""
    options = ("--host", "localhost", "--allowed-host", "a.example", "--cors", "https://b.example")
    with started(tiny_artifact, *options) as (_, _, url):
        http, health = openai.DefaultHttpxClient(), url.removesuffix("v1") + "health"
        for host, status in (("localhost:1", 200), ("a.example", 200), ("evil.example", 403)):
            answer = http.get(health, headers={"Host": host, "Origin": "https://b.example"})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://b.example"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--cors", "example.org"), "--cors 'example.org' is not an origin"),
        (("--allowed-host", "http://a.example"), "--allowed-host takes a name or an address"),
        (("--max-connections", "0"), "--max-connections"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_that_cannot_be(tiny_artifact: Path, options: tuple[str, ...], text: str) -> None:
    assert_error(run_cli("serve", tiny_artifact, "--port", 0, *options), USAGE, text)


def test_more_connections_than_descriptors(tiny_artifact: Path) -> None:
    result = run_cli("serve", tiny_artifact, "--port", 0, "--max-connections", 10**9)
    assert_error(
        result, FAILURE, "file descriptors left, and 1000000000 connections need 1000000024. Allow more (ulimit"
    )


def test_a_port_that_is_taken(tiny_artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run_cli("serve", tiny_artifact, "--port", port)
        text = f"Cannot listen on 127.0.0.1, port {port} (Address already in use). Choose another --host or --port."
        assert_error(result, FAILURE, text)


def test_a_host_that_is_none(tiny_artifact: Path) -> None:
    result = run_cli("serve", tiny_artifact, "--host", "no such host")
    assert_error(result, FAILURE, "Cannot listen on no such host, port 8000 (")


def test_failures_of_the_artifact(tmp_path: Path, tiny_artifact: Path) -> None:
    assert_error(run_cli("serve", tmp_path, "--port", 0), FAILURE, "this is not an artifact")
    result = run_cli("serve", tiny_artifact, "--port", 0, "--context", 9999)
    assert_error(result, USAGE, "A context of 9999 tokens is outside [2, 512]")


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra(tiny_artifact: Path, package: str) -> None:
    """None in sys.modules makes an import fail."""
    code = f"import sys; sys.modules[{package!r}] = None; from tda_export.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(tiny_artifact)], capture_output=True, text=True, check=False
    )
    text = f'Error: serve needs {package}, which is not installed. Install it: pip install "tda-export[serve]"\n'
    assert (done.returncode, done.stderr, done.stdout) == (FAILURE, text, "")
