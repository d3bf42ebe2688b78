"""The queue: order of arrival, a full queue, and clients that leave."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from typing import Any

import numpy as np
import openai
import pytest

from tda_export.runtime import Model, Sampling
from tda_export.serve import app, run
from tda_export.serve.protocol import Order
from tda_export.serve.replies import server_sent
from tda_export.serve.worker import Done, Event, Failed, Job, Piece
from tests.serve.conftest import NAME, PATIENCE, Gate, Served, serving, until

AT_ONCE = 50
PADDING = b": " + b"x" * 500_000 + b"\n\n"  # a comment after an event


def question(number: int) -> list[Any]:
    return [{"role": "user", "content": f"{number}: what of the sea, the tide and the moon?"}]


def answer_to(model: Model, number: int, tokens: int) -> str:
    generation = model.generate(model.text.encode_chat(question(number)), max_new_tokens=tokens)
    list(generation)
    return generation.text


def watch(served: Served, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Return two lists that get the numbers of requests: when they arrive, and when they end."""
    arrived, ended, worker = list[int](), list[int](), served.worker
    submit, end = worker.submit, worker._end

    def number(job: Job) -> int:
        return int(served.model.text.decode(job.order.prompt).split("user\n")[1].split(":")[0])

    def submitted(job: Job) -> None:
        submit(job)
        arrived.append(number(job))

    def finished(job: Job, outcome: Any, event: Done | Failed) -> None:
        ended.append(number(job))
        end(job, outcome, event)

    monkeypatch.setattr(worker, "submit", submitted)
    monkeypatch.setattr(worker, "_end", finished)
    return arrived, ended


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_fifty_at_once(model: Model, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """All get their own answer, in order of arrival."""
    with serving(model) as served:
        arrived, ended = watch(served, monkeypatch)

        async def ask(client: openai.AsyncOpenAI, number: int) -> str:
            options: dict[str, Any] = {"model": NAME, "messages": question(number), "temperature": 0, "max_tokens": 6}
            if not stream:
                return (await client.chat.completions.create(**options)).choices[0].message.content or ""
            chunks = await client.chat.completions.create(stream=True, **options)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        async def ask_all() -> list[str]:
            async with served.async_client() as client:
                return await asyncio.gather(*(ask(client, number) for number in range(AT_ONCE)))

        said = asyncio.run(ask_all())
        assert said == [answer_to(model, number, 6) for number in range(AT_ONCE)]
        assert sorted(arrived) == list(range(AT_ONCE))
        assert ended == arrived
        assert len(set(said)) > 1


def test_answers_come_in_the_order_of_questions(model: Model, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """Fifty requests arrive one after another while the model is busy with the first."""
    with serving(model) as served:
        arrived, ended = watch(served, monkeypatch)
        answers: dict[int, str] = {}

        def ask(number: int) -> None:
            answer = served.client().chat.completions.create(model=NAME, messages=question(number), max_tokens=3)
            answers[number] = answer.choices[0].message.content or ""

        threads = []
        for number in range(AT_ONCE):
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
            until(lambda count=number + 1: len(arrived) == count)
        assert ended == []
        gate.open()
        for thread in threads:
            thread.join()
        assert arrived == ended == list(range(AT_ONCE))
        assert answers == {number: answer_to(model, number, 3) for number in range(AT_ONCE)}


def test_a_full_queue(model: Model, gate: Gate) -> None:
    with serving(model, queue=2) as served:
        leaving = [_stream(served) for _ in range(3)]  # one runs, two wait
        until(lambda: served.worker.waiting == 2)
        with pytest.raises(openai.InternalServerError, match="2 requests are waiting already") as raised:
            served.client().completions.create(model=NAME, prompt="Hi")
        assert (raised.value.status_code, raised.value.code) == (503, "queue_full")
        assert int(raised.value.response.headers["retry-after"]) >= 1
        leaving[1].close()  # a place becomes free while the model waits
        until(lambda: served.worker.waiting == 1)
        assert gate.drawn == 0
        leaving.append(_stream(served))
        until(lambda: served.worker.waiting == 2)
        gate.open()
        for place in (0, 2, 3):
            assert b"[DONE]" in _rest(leaving[place])


def test_a_queue_of_none(model: Model, gate: Gate) -> None:
    with serving(model, queue=0) as served:
        running = _stream(served)
        until(lambda: served.worker._running is not None)
        with pytest.raises(openai.InternalServerError, match="0 requests are waiting already"):
            served.client().completions.create(model=NAME, prompt="Hi")
        gate.open()
        assert b"[DONE]" in _rest(running)
        assert served.client().completions.create(model=NAME, prompt="Hi", max_tokens=1).choices


@pytest.mark.parametrize("prompt", [[50], []], ids=["answered", "failed"])
def test_whoever_is_told_of_an_end_may_ask_again(model: Model, prompt: list[int]) -> None:
    """The place is free before the end is sent, so that a queue of length 0 takes one request after another."""
    with serving(model, queue=0) as served:
        told = list[type]()
        order = Order(prompt, 2, Sampling(), ())  # none may fail

        def deliver(event: Event) -> None:
            if not isinstance(event, Piece):
                told.append(type(event))
                if len(told) < 3:
                    served.worker.submit(Job("completions", order, deliver))

        served.worker.submit(Job("completions", order, deliver))
        until(lambda: len(told) == 3)
        assert set(told) == {Done if prompt else Failed}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_place_within_a_token(model: Model, gate: Gate, stream: bool) -> None:
    with serving(model) as served:
        worker = served.worker
        leaving = _stream(served) if stream else _connect(served, '"max_tokens": 400')
        gate.allow(5)
        until(lambda: gate.drawn == 5)
        job = worker._running
        assert job is not None
        waiting = _stream(served)
        until(lambda: worker.waiting == 1)
        leaving.close()
        until(lambda: job.cancelled)  # the server knows, while the model still waits for its sixth token
        assert worker._running is job
        gate.allow(1)
        until(lambda: worker._running is not job)
        assert job.generation is not None
        assert job.generation.metrics.new_tokens <= 6
        assert gate.drawn == 6
        gate.open()
        assert b"[DONE]" in _rest(waiting)


def test_a_client_that_leaves_the_queue(model: Model, gate: Gate) -> None:
    """Its request never reaches the model."""
    with serving(model) as served:
        running, leaving, staying = (_stream(served) for _ in range(3))
        until(lambda: served.worker.waiting == 2)
        leaving.close()
        until(lambda: served.worker.waiting == 1)
        assert gate.drawn == 0
        gate.open()
        assert b"[DONE]" in _rest(running)
        assert b"[DONE]" in _rest(staying)


def test_the_official_client_leaves(model: Model, gate: Gate) -> None:
    with serving(model) as served:
        stream = served.client().chat.completions.create(model=NAME, messages=question(1), stream=True)
        gate.allow(3)
        next(iter(stream))
        until(lambda: gate.drawn == 3)
        stream.close()
        job = served.worker._running
        assert job is not None
        until(lambda: job.cancelled)
        gate.open()
        until(lambda: served.worker._running is None)
        assert gate.drawn <= 4


def test_a_slow_client_holds_nobody_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing of a stream that is larger than all buffers. The next client still gets its answer."""
    written = list[bytes]()

    def padded(event: dict[str, Any]) -> bytes:
        written.append(server_sent(event))
        return written[-1] + PADDING

    monkeypatch.setattr(app, "server_sent", padded)
    with serving(model) as served:
        slow = _connect(served, '"stream": true, "max_tokens": 100, "temperature": 0')
        answer = served.client().completions.create(model=NAME, prompt="Hi", max_tokens=4)
        assert answer.choices
        assert served.worker.idle
        assert b'"finish_reason": "length"' not in b"".join(written)  # the model has finished, its client has not
        rest = _rest(slow)
        assert rest.count(PADDING) == len(written)
        assert b'"finish_reason": "length"' in written[-1]
        assert b"[DONE]" in rest


def test_answers_under_way_end_before_the_server_does(model: Model, gate: Gate) -> None:
    with serving(model) as served:
        stream, waiting = _stream(served), _stream(served)
        until(lambda: served.worker.waiting == 1)
        opener = threading.Timer(0.5, gate.open)
        opener.start()
    assert b"[DONE]" in _rest(stream)
    assert b"[DONE]" in _rest(waiting)


def test_answers_that_take_longer_than_the_grace(model: Model, gate: Gate) -> None:
    """They are cut off, waiting requests are refused, and all clients get a message."""
    gate.allow(3)
    with serving(model, grace=0.2) as served:
        stream, waiting, whole = _stream(served), _stream(served), _connect(served, '"max_tokens": 4')
        until(lambda: gate.drawn == 3)
        opener = threading.Thread(target=_open_when_stopping, args=(served, gate))
        opener.start()
    opener.join()
    assert gate.drawn == 4
    for cut_off in (stream, waiting):
        said = _rest(cut_off)
        assert b'"code": "shutting_down"' in said
        assert b"[DONE]" not in said
    assert b"503 Service Unavailable" in _rest(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminate"])
def test_told_twice_to_stop(model: Model, gate: Gate, number: int) -> None:
    """It then does not wait for the grace period."""
    gate.allow(3)
    with serving(model) as served:
        stream = _stream(served)
        until(lambda: gate.drawn == 3)
        served.server.handle_exit(number, None)
        until(lambda: served.worker._closed)
        health = openai.DefaultHttpxClient().get(f"{served.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopping")
        with pytest.raises(openai.InternalServerError, match="The server is shutting down"):
            served.client().completions.create(model=NAME, prompt="Hi")
        served.server.handle_exit(number, None)
        opener = threading.Thread(target=_open_when_stopping, args=(served, gate))
        opener.start()
    opener.join()
    assert gate.drawn == 4
    assert b'"code": "shutting_down"' in _rest(stream)


def test_a_client_that_never_reads_does_not_keep_the_server(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answer is larger than all buffers on the way. The server prints one line about it."""
    monkeypatch.setattr(app, "server_sent", lambda event: server_sent(event) + PADDING)
    monkeypatch.setattr(run, "LAST_SECONDS", 0.2)
    with serving(model) as served:
        stuck = _connect(served, '"stream": true, "max_tokens": 100, "temperature": 0')
        until(lambda: served.worker.idle)
    stuck.close()
    said = capsys.readouterr().err
    assert "timeout graceful shutdown exceeded" in said
    assert "Traceback" not in said


def _open_when_stopping(served: Served, gate: Gate) -> None:
    """The model cannot be interrupted inside a token, so open the gate only once the worker shall stop."""
    until(lambda: served.worker._stopping)
    gate.open()


def test_a_worker_that_stops_tells_those_who_wait(model: Model, gate: Gate) -> None:
    with serving(model) as served:
        running, waiting = _stream(served), _connect(served, '"max_tokens": 4')
        until(lambda: served.worker.waiting == 1)
        stopping = threading.Thread(target=served.worker.stop)
        stopping.start()
        until(lambda: served.worker.waiting == 0)
        with pytest.raises(openai.InternalServerError, match="The server is shutting down"):
            served.client().completions.create(model=NAME, prompt="Hi")
        gate.open()
        stopping.join()
        assert b"503 Service Unavailable" in _rest(waiting)
        assert b'"code": "shutting_down"' in _rest(running)
        health = openai.DefaultHttpxClient().get(f"{served.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopping")


def test_a_worker_that_breaks_down_tells_everybody(
    model: Model, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client of the answer, those who wait, and those who come later."""

    def broken(logits: np.ndarray) -> int:
        gate.sample(logits)
        raise SystemExit

    monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling: broken)
    with serving(model) as served:
        running, waiting = _stream(served), _connect(served, '"max_tokens": 4')
        until(lambda: served.worker.waiting == 1)
        gate.open()
        assert b'"code": "internal_error"' in _rest(running)
        assert b"500 Internal Server Error" in _rest(waiting)
        until(lambda: not served.worker.alive)
        with pytest.raises(openai.InternalServerError, match="The server failed"):
            served.client().completions.create(model=NAME, prompt="Hi")
        health = openai.DefaultHttpxClient().get(f"{served.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert "The model's thread broke down" in caplog.text


def _stream(served: Served) -> socket.socket:
    """Request a stream of many tokens, without reading it yet."""
    return _connect(served, '"stream": true, "max_tokens": 400')


def _connect(served: Served, options: str) -> socket.socket:
    """Send a request on its own connection, which ends with the answer, and wait until the worker has it."""
    worker, accepted = served.worker, threading.Event()
    submit = worker.submit

    def submitted(job: Job) -> None:
        submit(job)
        accepted.set()

    worker.submit = submitted  # type: ignore[method-assign]
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
    body = f'{{"model": "{NAME}", "prompt": "The sea is calm", {options}}}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    assert accepted.wait(PATIENCE)
    worker.submit = submit  # type: ignore[method-assign]
    return connection


def _rest(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
