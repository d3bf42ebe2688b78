"""Connections: limits their number, and closes those that keep a place without using it."""

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
SPARE_DESCRIPTORS = 24  # for files, the process that renders templates, and a connection without a place yet

HEAD_SECONDS = 20  # time for a connection to begin a request and to end its head
BODY_SECONDS = 20  # time for a body to arrive, plus time for each of its bytes
LEAST_RATE = 10_000  # bytes a second
STUCK_SECONDS = 60  # longest time in which a client reads nothing of its answer
CLOSING_SECONDS = 20  # time for a client to read the last of its answer
RETRY_SECONDS = 1  # wait before accepting again, when non-connections took the last descriptor
LOOK_SECONDS = 0.1  # wait before looking for room again
COMPLAINT_SECONDS = 60  # least time between two lines in the log

# What a connection is doing, ordered by how little is lost when it is closed to make room.
CLOSING, HEAD, BODY, STUCK, ANSWER = range(5)

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """uvicorn's connection, which also knows what it is doing and since when."""

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
        """Return what the connection is doing, and for how many seconds so far."""
        doing = (self._stage(), self.cycle, self._resumed)
        if doing != self._doing:
            self._doing, self._since = doing, self.loop.time()
            if doing[0] == HEAD:  # a body may begin in the same bytes as the end of its head
                self._received_before = self._received
        return doing[0], self.loop.time() - self._since

    def end_if_late(self) -> None:
        """Close the connection if it has taken too long; called periodically."""
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
        """Close the connection; what its client has not read is lost."""
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
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has already begun
            for event in (
                h11.Response(status_code=408, headers=headers, reason=b"Request Timeout"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")


class Acceptor:
    """Accepts connections from a listening socket, one by one, while there is room.

    asyncio's own server accepts all that wait, which may be more than there are descriptors, and then logs an error
    hundreds of times a second.
    """

    def __init__(self, most: int, connections: Iterable[Connection]) -> None:
        """Prepare.

        Args:
            most: The most connections at once. To accept one more, the one that has been idle for longest is closed.
            connections: The open connections, always up to date.
        """
        self._most, self._connections = most, connections
        self._freed = asyncio.Event()
        self._complained = -float("inf")

    def freed(self) -> None:
        """Signal that a connection has ended."""
        self._freed.set()

    async def run(self, opened: socket.socket, make: Callable[[], Connection]) -> None:
        """Accept until cancelled."""
        loop = asyncio.get_running_loop()
        opened.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(opened)
            except ConnectionError:  # the client has left already
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
            with contextlib.suppress(TimeoutError):  # one may have finished its answer
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
    """Return how many connections there is room for: `wanted`, or as many as this process has descriptors for.

    Raises:
        TdaError: There is room for fewer than `wanted`, or for none.
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
    """Return how many more files this process may open; None where that is unknown."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        used = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):
        return None
    return None if most == resource.RLIM_INFINITY else most - used
