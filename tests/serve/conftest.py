"""A real server on a free port of this machine, around the tiny artifact."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai
import pytest

from tda_export.runtime import Model, load
from tda_export.runtime.generate import MaskMode
from tda_export.serve.access import Access, make_access
from tda_export.serve.app import create_app
from tda_export.serve.metrics import ServerMetrics
from tda_export.serve.orders import Limits
from tda_export.serve.run import Server, listen, url
from tda_export.serve.worker import Worker

NAME = "tiny"
CONTEXT = 500
BODY_BYTES = 40_000
PATIENCE = 120  # seconds to wait for things that take a fraction of one
LOOPBACK_ALONE = make_access(host="127.0.0.1", loopback=True, allowed_hosts=(), origins=())


@dataclass
class Served:
    """A running server and its `worker`."""

    url: str
    worker: Worker
    server: Server

    @property
    def model(self) -> Model:
        return self.worker.model

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


@contextlib.contextmanager
def serving(
    model: Model,
    *,
    queue: int = 64,
    context: int = CONTEXT,
    new_tokens: int | None = None,
    grace: float = PATIENCE,
    access: Access = LOOPBACK_ALONE,
    most_connections: int = 200,
    mask: MaskMode | None = None,
    keep_answers: bool = False,
) -> Iterator[Served]:
    """Serve a model in threads of this process."""
    opened = listen("127.0.0.1", 0)
    worker = Worker(
        model,
        queue_size=queue,
        context=context,
        mask=mask,
        deployment=model.artifact.deployment,
        metrics=ServerMetrics(),
        keep_answers=keep_answers,
    )
    app = create_app(worker, NAME, Limits(BODY_BYTES, new_tokens), access)
    server = Server(app, worker, grace, most_connections)
    address = url(opened)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Served(address, worker, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not worker.alive


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition, which another thread makes true, holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@dataclass
class Gate:
    """Lets the model choose tokens one by one, always the likeliest. `drawn`: the number chosen so far."""

    drawn: int = 0
    _allowed: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def allow(self, tokens: int) -> None:
        with self._changed:
            self._allowed += tokens
            self._changed.notify_all()

    def open(self) -> None:
        self.allow(1 << 40)

    def sample(self, logits: np.ndarray) -> int:
        with self._changed:
            assert self._changed.wait_for(lambda: self.drawn < self._allowed, PATIENCE)
            self.drawn += 1
        return int(logits.argmax())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    made = Gate()
    monkeypatch.setattr("tda_export.runtime.model.make_sampler", lambda sampling: made.sample)
    return made


@pytest.fixture(scope="session")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact, provider="cpu")


@pytest.fixture(scope="session")
def priced_model(priced_artifact: Path) -> Model:
    return load(priced_artifact, provider="cpu")


@pytest.fixture(scope="session")
def priced_served(priced_model: Model) -> Iterator[Served]:
    """A server of the tiny artifact of priced rows."""
    with serving(priced_model) as running:
        yield running


@pytest.fixture(scope="session")
def served(model: Model) -> Iterator[Served]:
    """One server for all tests that do not change it."""
    with serving(model) as running:
        yield running


@pytest.fixture
def artifact_copy(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact, to be damaged."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
