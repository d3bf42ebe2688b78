"""Connections: no more than there is room for, and none that keeps a place without using it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tda_export.errors import TdaError
from tda_export.serve.errors import ApiError

MOST_CONNECTIONS = 1000
SPARE_DESCRIPTORS = 24  # for files, for the process that renders templates, and for a connection before it has a place

HEAD_SECONDS = 20  # that a connection has to begin a request and to end its head
BODY_SECONDS = 20  # that a body has to come, and more for each of its bytes
LEAST_RATE = 10_000  # bytes a second
STUCK_SECONDS = 60  # for which a client may read nothing of its answer
CLOSING_SECONDS = 20  # that a client has to read the last of it
RETRY_SECONDS = 1  # after which to accept again, where others than connections took the last descriptor
LOOK_SECONDS = 0.1  # after which to look for room again
COMPLAINT_SECONDS = 60  # between two lines in the log

# What a connection does, by how little is lost when it is closed for another's sake.
CLOSING, HEAD, BODY, STUCK, ANSWER = range(5)

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """uvicorn's connection, which also knows for how long it has been at what it does."""

    def __init__(self, *arguments: Any, lost: Callable[[], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lost = lost
        self._received = self._resumed = 0
        self._doing: tuple[int, object, int] = (HEAD, None, 0)
        self._since, self._received_before = self.loop.time(), 0

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def resume_writing(self) -> None:
        self._resumed += 1
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost()

    def timeout_keep_alive_handler(self) -> None:
        self.end_if_late()

    def observe(self) -> tuple[int, float]:
        """Return what it does, and for how many seconds already."""
        doing = (self._stage(), self.cycle, self._resumed)
        if doing != self._doing:
            self._doing, self._since = doing, self.loop.time()
            if doing[0] == HEAD:  # a body may begin with its head's last bytes
                self._received_before = self._received
        return doing[0], self.loop.time() - self._since

    def end_if_late(self) -> None:
        """Close it if it has taken too long; called now and then."""
        stage, seconds = self.observe()
        received = self._received - self._received_before
        late = {
            HEAD: seconds > HEAD_SECONDS,
            BODY: seconds > BODY_SECONDS + received / LEAST_RATE,
            STUCK: seconds > STUCK_SECONDS,
            CLOSING: seconds > CLOSING_SECONDS,
        }
        if late.get(stage, False):
            if stage in (STUCK, CLOSING):
                self.abort()
                return
            if stage == BODY or self.conn.trailing_data[0]:
                self._answer_late()
            self.transport.close()

    def abort(self) -> None:
        """Close it; what its client has not read is lost."""
        self.transport.abort()

    def _stage(self) -> int:
        if self.transport is None or self.transport.is_closing():
            return CLOSING
        if self.cycle is None or self.cycle.response_complete:
            return HEAD
        if self.flow.write_paused:
            return STUCK
        return BODY if self.cycle.more_body and not self.cycle.response_started else ANSWER

    def _answer_late(self) -> None:
        error = ApiError(408, "The request did not arrive completely in time. Send it again.", code="request_timeout")
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")


class Acceptor:
    """Takes connections from a listening socket, one by one, while there is room.

    asyncio's own server takes as many as wait, which is more than there may be descriptors, and then complains
    hundreds of times a second.
    """

    def __init__(self, most: int, connections: Iterable[Connection]) -> None:
        """Prepare.

        Args:
            most: Connections at once. For one more, the one that has done nothing for longest is closed.
            connections: Those that are open, always current.
        """
        self._most, self._connections = most, connections
        self._freed = asyncio.Event()
        self._complained = -float("inf")

    def freed(self) -> None:
        """Say that a connection has ended."""
        self._freed.set()

    async def run(self, opened: socket.socket, make: Callable[[], Connection]) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        opened.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(opened)
            except ConnectionError:  # it has left already
                continue
            except OSError as error:
                self._complain(error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                await self._room()
                await loop.connect_accepted_socket(make, accepted)
            except OSError:  # likewise
                accepted.close()
            except BaseException:
                accepted.close()
                raise

    async def _room(self) -> None:
        while len(connections := list(self._connections)) >= self._most:
            self._freed.clear()
            idle = [connection for connection in connections if connection.observe()[0] != ANSWER]
            if idle:
                min(idle, key=_loss).abort()
            with contextlib.suppress(TimeoutError):  # one may have come to an end of its answer
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._freed.wait()

    def _complain(self, error: OSError) -> None:
        if time.monotonic() - self._complained > COMPLAINT_SECONDS:
            self._complained = time.monotonic()
            logger.error("Connections wait (%s). Allow the server more file descriptors: ulimit -n", error.strerror)


def _loss(connection: Connection) -> tuple[int, float]:
    stage, seconds = connection.observe()
    return stage, -seconds


def most_connections(wanted: int | None) -> int:
    """Return how many connections there is room for: `wanted`, or what this process has descriptors for.

    Raises:
        TdaError: It is less than `wanted`, or none.
    """
    free = _free_descriptors()
    if free is None:
        return wanted or MOST_CONNECTIONS
    room = free - SPARE_DESCRIPTORS
    if room < (wanted or 1):
        raise TdaError(
            f"There are {free} file descriptors left, and {wanted or 1} connections need "
            f"{(wanted or 1) + SPARE_DESCRIPTORS}. Allow more (ulimit -n)"
            + (" or fewer connections." if wanted else ".")
        )
    return wanted or min(room, MOST_CONNECTIONS)


def _free_descriptors() -> int | None:
    """Return how many files this process may open yet; None where that cannot be told."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):
        return None
    return None if most == resource.RLIM_INFINITY else most - used
