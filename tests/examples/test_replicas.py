"""Two servers behind HAProxy, as in examples/replicas. Conversations stay, and the end of one loses no request."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

if sys.platform == "win32":
    pytest.skip("HAProxy is for POSIX", allow_module_level=True)

from tests.cli.test_serve import started
from tests.examples.applications import EXAMPLES

HAPROXY = shutil.which("haproxy", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy")
CONVERSATIONS = [f"conversation {number}" for number in range(12)]


@dataclass
class Replicas:
    """The front's address, and the servers by HAProxy's names for them."""

    url: str
    servers: dict[str, subprocess.Popen[str]]

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, conversation: str | None = None, tokens: int = 3) -> str:
        """Send a request, require an answer, and return the replica that gave it."""
        with self.client() as client:
            answer = client.completions.with_raw_response.create(
                model="sea",
                prompt="The sea",
                max_tokens=tokens,
                extra_body={"ignore_eos": True},
                extra_headers={} if conversation is None else {"X-Conversation": conversation},
            )
            assert answer.parse().choices[0].finish_reason == "length"
            return answer.headers["X-Replica"]

    def homes(self) -> dict[str, str]:
        """Return the replica of each conversation."""
        return {conversation: self.ask(conversation) for conversation in CONVERSATIONS}


@pytest.fixture
def replicas(tiny_artifact: Path) -> Iterator[Replicas]:
    with contextlib.ExitStack() as stack:
        options = ("--provider", "cpu", "--name", "sea", "--queue", 50, "--grace", 30)
        servers = [stack.enter_context(started(tiny_artifact, *options)) for _ in range(2)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            front = f"127.0.0.1:{free.getsockname()[1]}"
        addresses = [url.removeprefix("http://").removesuffix("/v1") for _, _, url in servers]
        environment = os.environ | dict(zip(("FRONT", "REPLICA_A", "REPLICA_B"), (front, *addresses), strict=True))
        command = [str(HAPROXY), "-db", "-f", EXAMPLES / "replicas" / "haproxy.cfg"]
        haproxy = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        stack.callback(haproxy.wait)
        stack.callback(haproxy.kill)
        found = Replicas(f"http://{front}", {"a": servers[0][0], "b": servers[1][0]})
        for _ in range(100):
            with contextlib.suppress(openai.APIConnectionError):
                found.ask()
                break
            time.sleep(0.1)
        yield found


def ask_slowly(replicas: Replicas, conversation: str) -> tuple[int, str | None]:
    """Send the head of a request, and later its body. Return the status, and the replica that answered."""
    connection = http.client.HTTPConnection(replicas.url.removeprefix("http://"), timeout=60)
    body = json.dumps({"model": "sea", "prompt": "The sea", "max_tokens": 3}).encode()
    connection.putrequest("POST", "/v1/completions")
    for name, value in {"Content-Type": "application/json", "X-Conversation": conversation}.items():
        connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    time.sleep(0.1)
    connection.send(body)
    with connection.getresponse() as answer:
        return answer.status, answer.getheader("X-Replica")


def test_requests_go_round_and_conversations_stay(replicas: Replicas) -> None:
    assert {replicas.ask() for _ in range(4)} == {"a", "b"}
    homes = replicas.homes()
    assert set(homes.values()) == {"a", "b"}
    assert replicas.homes() == homes


def test_one_is_killed_while_clients_talk(replicas: Replicas) -> None:
    """Every request is answered, and conversations of the other replica stay there."""
    homes = replicas.homes()
    failed: list[BaseException] = []
    killed, served = threading.Event(), {"a": 0, "b": 0}

    def talk(conversation: str) -> None:
        try:
            after = 0
            while after < 3:
                after += killed.is_set()
                served[replicas.ask(conversation, tokens=20)] += 1
        except BaseException as error:
            failed.append(error)

    clients = [threading.Thread(target=talk, args=(conversation,)) for conversation in CONVERSATIONS[:6]]
    for client in clients:
        client.start()
    while not served["a"]:
        time.sleep(0.01)
    replicas.servers["a"].kill()
    replicas.servers["a"].wait()
    killed.set()
    for client in clients:
        client.join()
    assert not failed
    assert set(replicas.homes().values()) == {"b"}
    assert served["a"] > 0
    assert "a" in homes.values()


def test_one_is_stopped_in_good_order(replicas: Replicas) -> None:
    """It finishes the answer that it has begun. Requests that come meanwhile go to the other."""
    ours = next(conversation for conversation, home in replicas.homes().items() if home == "a")
    with replicas.client() as client:
        stream = client.completions.create(
            model="sea",
            prompt="The sea",
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers={"X-Conversation": ours},
        )
        assert stream.response.headers["X-Replica"] == "a"
        next(stream)
        replicas.servers["a"].send_signal(signal.SIGTERM)
        while (answer := ask_slowly(replicas, ours)) == (200, "a"):
            pass  # it does not know of the end yet
        assert answer == (200, "b")
        assert {replicas.ask(ours) for _ in range(5)} <= {"a", "b"}
        assert list(stream)[-1].choices[0].finish_reason == "length"
    assert replicas.servers["a"].wait(60) == 0
    assert set(replicas.homes().values()) == {"b"}
