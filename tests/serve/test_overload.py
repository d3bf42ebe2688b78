"""A server process under overload: it goes on, and keeps nothing of the clients afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from tests.cli.test_serve import started
from tests.serve.conftest import PATIENCE, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

DESCRIPTORS = 128
GOOD = {"model": "tiny", "prompt": "The sea is calm", "max_tokens": 3}


class Client:
    """Clients of one server, and what they share."""

    def __init__(self, url: str) -> None:
        self.base = url.removesuffix("/v1")
        host, _, port = self.base.removeprefix("http://").rpartition(":")
        self._address = host, int(port)
        self.http = openai.DefaultHttpxClient(timeout=PATIENCE)

    def connect(self, content: bytes = b"") -> socket.socket:
        connection = socket.create_connection(self._address, timeout=PATIENCE)
        connection.sendall(content)
        return connection

    def request(self, **change: object) -> bytes:
        body = json.dumps(GOOD | change).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def status(self, content: bytes, pause: float = 0.0) -> int:
        """Send bytes, one by one if there is a pause, and return the status of the answer."""
        with self.connect() as connection:
            for piece in [content] if not pause else [content[i : i + 8] for i in range(0, len(content), 8)]:
                connection.sendall(piece)
                time.sleep(pause)
            answer = b""
            while piece := connection.recv(64 if pause else 1 << 16):
                answer += piece
                time.sleep(pause)
            return int(answer.split()[1])

    def healthy(self) -> bool:
        return bool(self.http.get(f"{self.base}/health").status_code == 200)


def descriptors(process: subprocess.Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def threads(process: subprocess.Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


def warm(client: Client) -> None:
    """Let the server start what it keeps: the process for templates, and the thread that reads prompts."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert client.http.post(f"{client.base}/v1/chat/completions", json=chat).status_code == 200
    client.http.close()
    client.http = openai.DefaultHttpxClient(timeout=PATIENCE)


def good(client: Client, number: int) -> int:
    return client.status(client.request(stream=bool(number % 2)))


def bad(client: Client, number: int) -> int:
    faults = (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),  # TLS
        b"GET /health\r\nnonsense\r\n\r\n",
        client.request(unknown=1),
        client.request(prompt="x" * 1000),
        client.request().replace(b"application/json", b"text/plain"),
        client.request().replace(b"{", b"["),
        client.request().replace(b"localhost", b"evil.example"),
        client.request(prompt="x" * 5000),
    )
    return client.status(faults[number % len(faults)])


def slow(client: Client, number: int) -> int:
    return client.status(client.request(stream=bool(number % 2)), pause=0.01)


def leaving(client: Client, number: int) -> int:
    """Leave before the head, in it, in the body, before the answer, or in it."""
    whole = client.request(stream=True, max_tokens=200)
    part = (b"", whole[:20], whole[:-5], whole, whole)[number % 5]
    with client.connect(part) as connection:
        if number % 5 == 4:
            connection.recv(20)
    return 0


def test_many_clients_of_all_kinds(tiny_artifact: Path) -> None:
    """64 at once: valid requests are answered, invalid ones refused, and nothing stays afterwards."""
    with started(tiny_artifact, "--provider", "cpu", "--max-body", 4000) as (process, _, url):
        client = Client(url)
        warm(client)
        kinds: dict[Callable[[Client, int], int], set[int]] = {
            good: {200},
            bad: {400, 403, 413},
            slow: {200},
            leaving: {0},
        }
        said: dict[str, list[int]] = {kind.__name__: [] for kind in kinds}
        until(lambda: descriptors(process) > 0)
        before = descriptors(process), threads(process)

        def ask(kind: Callable[[Client, int], int], number: int) -> None:
            said[kind.__name__].append(kind(client, number))

        asking = [threading.Thread(target=ask, args=(kind, number)) for number in range(16) for kind in kinds]
        for thread in asking:
            thread.start()
        assert client.healthy()
        for thread in asking:
            thread.join()
        assert client.healthy()
        for kind, allowed in kinds.items():
            assert len(said[kind.__name__]) == 16
            assert set(said[kind.__name__]) <= allowed
        client.http.close()
        until(lambda: descriptors(process) <= before[0])
        until(lambda: threads(process) <= before[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert set(process.stderr.read().splitlines()) <= {"WARNING:  Invalid HTTP request received."}


def test_more_idle_connections_than_descriptors(tiny_artifact: Path) -> None:
    """The server answers without errors, and has its descriptors back once the connections are closed."""
    with started(tiny_artifact, "--provider", "cpu", descriptors=DESCRIPTORS) as (process, _, url):
        client = Client(url)
        warm(client)
        before = descriptors(process), threads(process)
        idle = [client.connect((b"", b"GET /health HTTP/1.1\r\n", client.request()[:-5])[i % 3]) for i in range(200)]
        for _ in range(10):
            assert client.healthy()
        assert good(client, 0) == 200
        assert descriptors(process) < DESCRIPTORS
        for connection in idle:
            connection.close()
        client.http.close()
        until(lambda: descriptors(process) <= before[0])
        until(lambda: threads(process) <= before[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
