"""Connections that take too long, and too many connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tda_export.errors import TdaError
from tda_export.runtime import Model
from tda_export.serve import app, connections
from tda_export.serve.connections import Acceptor, most_connections
from tda_export.serve.replies import server_sent
from tests.serve.conftest import NAME, PATIENCE, Gate, Served, serving, until
from tests.serve.test_errors import COMPLETIONS, http

BODY = json.dumps({"model": NAME, "prompt": "Hi", "max_tokens": 2}).encode()
HEAD = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode()


def connect(served: Served, content: bytes = b"") -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    connection.sendall(content)
    return connection


def rest(connection: socket.socket) -> bytes:
    """Return the bytes until the server closes the connection."""
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.fixture
def hasty(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server without patience."""
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "STUCK_SECONDS", "CLOSING_SECONDS"):
        monkeypatch.setattr(connections, name, 1)
    with serving(model) as served:
        yield served


def test_a_silent_connection_is_closed(hasty: Served) -> None:
    """It sent no request, so it gets no answer."""
    assert rest(connect(hasty)) == b""


def test_an_idle_connection_is_closed_after_its_answer(hasty: Served) -> None:
    said = rest(connect(hasty, HEAD + BODY))
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert said.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "content",
    [b"G", HEAD[:-2], HEAD, HEAD + BODY[:-1], HEAD + BODY + b"GET /he"],
    ids=["letter", "head", "no body", "part of a body", "second head"],
)
def test_what_is_unfinished_is_told_so(hasty: Served, content: bytes) -> None:
    head, _, body = rest(connect(hasty, content)).rpartition(b"\r\n\r\n")
    assert b"HTTP/1.1 408 Request Timeout\r\n" in head
    assert json.loads(body)["error"]["code"] == "request_timeout"


@pytest.mark.parametrize(
    "content", [HEAD[:-2] + b"X: ", HEAD[:-2] + b"Transfer-Encoding: x\r\n"], ids=["head", "error"]
)
def test_a_trickle_keeps_no_connection(hasty: Served, content: bytes) -> None:
    connection = connect(hasty, content)
    with connection, contextlib.suppress(OSError):
        while True:  # until the server has closed
            connection.sendall(b"x")
            time.sleep(0.05)
    until(lambda: not hasty.server.server_state.connections)


def test_a_trickle_of_a_body_keeps_no_connection(hasty: Served) -> None:
    head = HEAD.replace(str(len(BODY)).encode(), b"30000")
    with connect(hasty, head) as connection, contextlib.suppress(OSError):
        while True:
            connection.sendall(b" ")
            time.sleep(0.05)
    until(lambda: not hasty.server.server_state.connections and not hasty.server.server_state.tasks)


def test_a_body_has_time_by_its_length(hasty: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LEAST_RATE", 0.1)
    connection = connect(hasty, HEAD + BODY[:-1])
    time.sleep(3)
    connection.sendall(BODY[-1:])
    assert rest(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_an_answer_has_all_the_time_it_needs(hasty: Served, gate: Gate) -> None:
    connection = connect(hasty, HEAD + BODY)
    until(lambda: hasty.worker._running is not None)
    time.sleep(3)
    gate.open()
    assert rest(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_client_that_reads_nothing_is_cut_off(hasty: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer does not fit all buffers on the way."""
    monkeypatch.setattr(app, "server_sent", lambda event: server_sent(event) + b":" * (1 << 20) + b"\n\n")
    body = json.dumps({"model": NAME, "prompt": "Hi", "max_tokens": 100, "stream": True}).encode()
    stuck = connect(hasty, HEAD.replace(str(len(BODY)).encode(), str(len(body)).encode()) + body)
    until(lambda: hasty.server.server_state.connections)
    until(lambda: not hasty.server.server_state.connections)
    until(lambda: hasty.worker.idle and not hasty.server.server_state.tasks)
    stuck.close()


def test_one_too_many_closes_the_idlest(model: Model) -> None:
    with serving(model, most_connections=4) as served:
        idle = []
        for count in range(4):
            idle.append(connect(served, b"GET /" if count % 2 else b""))
            until(lambda count=count: len(served.server.server_state.connections) == count + 1)
        for connection in idle[:3]:  # each by a connection with a request
            answer = http.get(f"{served.url}/health", headers={"Connection": "close"})
            assert answer.status_code == 200
            assert rest(connection) == b""
            # The connection that it made room for has ended, so there is room for this one.
            until(lambda: len(served.server.server_state.connections) <= 3)
            idle.append(connect(served))
            until(lambda: len(served.server.server_state.connections) == 4)
        for connection in idle[3:]:
            connection.close()


def test_those_that_are_answered_stay(model: Model, gate: Gate) -> None:
    """A further connection waits until one of them ends."""
    with serving(model, most_connections=3) as served:
        answered = [connect(served, HEAD.replace(b"Host", b"Connection: close\r\nHost") + BODY) for _ in range(3)]
        until(lambda: served.worker.waiting == 2)
        said = list[int]()
        asking = threading.Thread(target=lambda: said.append(http.get(f"{served.url}/health").status_code))
        asking.start()
        time.sleep(0.5)
        assert said == []
        assert len(served.server.server_state.connections) == 3
        gate.open()
        asking.join()
        assert said == [200]
        for connection in answered:
            assert rest(connection).startswith(b"HTTP/1.1 200 OK\r\n")


def test_descriptors_that_others_have_taken(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line reports it. The next connection is accepted once a descriptor is free."""
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0)
    took = list[bytes]()

    class Taker(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            took.append(data)

    async def accept() -> None:
        loop, failures = (
            asyncio.get_running_loop(),
            iter([errno.EMFILE, errno.ECONNABORTED, errno.EMFILE, errno.ENFILE]),
        )
        accept_one = loop.sock_accept

        async def failing(opened: socket.socket) -> Any:
            for number in failures:
                raise OSError(number, "none left")
            return await accept_one(opened)

        loop.sock_accept = failing  # type: ignore[method-assign]
        with socket.create_server(("127.0.0.1", 0)) as opened, socket.create_connection(opened.getsockname()) as client:
            client.sendall(b"Hi")
            task = asyncio.create_task(Acceptor(5, []).run(opened, Taker))  # type: ignore[arg-type]
            while not took:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    with caplog.at_level(logging.ERROR):
        asyncio.run(asyncio.wait_for(accept(), PATIENCE))
    assert took == [b"Hi"]
    assert [record.getMessage() for record in caplog.records] == [
        "Connections wait (none left). Allow the server more file descriptors: ulimit -n"
    ]


@pytest.mark.parametrize(
    ("free", "wanted", "most"),
    [(100, None, 76), (100, 76, 76), (100, 5, 5), (25, None, 1), (10**6, None, 1000), (None, None, 1000), (None, 5, 5)],
)
def test_room_for_connections(monkeypatch: pytest.MonkeyPatch, free: int | None, wanted: int | None, most: int) -> None:
    monkeypatch.setattr(connections, "_free_descriptors", lambda: free)
    assert most_connections(wanted) == most


@pytest.mark.parametrize(
    ("free", "wanted", "text"),
    [
        (24, None, r"24 file descriptors left, and 1 connections need 25\. Allow more \(ulimit -n\)\.$"),
        (100, 77, r"100 file descriptors left, and 77 connections need 101\. Allow more .* or fewer connections\.$"),
    ],
)
def test_no_room_for_connections(monkeypatch: pytest.MonkeyPatch, free: int, wanted: int | None, text: str) -> None:
    monkeypatch.setattr(connections, "_free_descriptors", lambda: free)
    with pytest.raises(TdaError, match=text):
        most_connections(wanted)
