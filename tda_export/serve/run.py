"""Listen, serve until told to stop, and shut down cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from tda_export.errors import TdaError
from tda_export.serve import connections
from tda_export.serve.worker import Worker

BACKLOG = 1024
TICKS_A_SECOND = 10  # uvicorn's
LAST_SECONDS = 5  # time for clients to read the rest of their answers


class Server(uvicorn.Server):
    """uvicorn's server around one worker.

    When it is told to stop, it refuses new requests, and answers have `grace` seconds to end, or until it is told a
    second time. Then the remaining answers are cut off, and their clients get an error. The signal that stopped it is
    not raised again, so that the exit code is 0.
    """

    def __init__(self, app: FastAPI, worker: Worker, grace: float, most_connections: int) -> None:
        async def cut_off_in_silence(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:
                if not self.should_exit:
                    raise
                # A client does not read the rest of its answer. uvicorn would print a traceback.

        config = uvicorn.Config(
            cut_off_in_silence,
            interface="asgi3",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=LAST_SECONDS,
            timeout_keep_alive=connections.HEAD_SECONDS,
            http=connections.Connection,
            ws="none",
        )
        super().__init__(config)
        self._worker, self._grace, self._most_connections = worker, grace, most_connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # all of uvicorn's startup except accepting
        open_ones = cast(set[connections.Connection], self.server_state.connections)
        acceptor = connections.Acceptor(self._most_connections, open_ones)

        def make() -> connections.Connection:
            return connections.Connection(self.config, self.server_state, self.lifespan.state, lost=acceptor.freed)

        self._accepting = [asyncio.create_task(acceptor.run(opened, make)) for opened in sockets or []]

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_A_SECOND == 0:
            for connection in list(self.server_state.connections):
                cast(connections.Connection, connection).end_if_late()
            for accepting in self._accepting:
                if accepting.done():
                    accepting.result()  # accepting does not end by itself
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = time.monotonic() + self._grace
        self._worker.close()
        while not self._worker.idle and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self._worker.stop)
        for accepting in self._accepting:
            accepting.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        self.force_exit = False  # no answer is left to wait for
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at a second signal of any kind, stop without grace. uvicorn does that only for Ctrl-C."""
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Open the socket to serve on; port 0 takes a free one.

    Raises:
        TdaError: The address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere this option lets two servers share a port
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(BACKLOG)
        except BaseException:
            opened.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TdaError(f"Cannot listen on {host}, port {port} ({reason}). Choose another --host or --port.") from error
    return opened


def url(opened: socket.socket) -> str:
    """Return the address of a listening socket."""
    host, port = opened.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(opened: socket.socket) -> bool:
    """Return whether only this machine can reach a socket."""
    return ipaddress.ip_address(opened.getsockname()[0]).is_loopback
