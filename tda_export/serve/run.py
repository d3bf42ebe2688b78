"""Listen, serve until told to stop, and stop in good order."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from tda_export.errors import TdaError

BACKLOG = 1024


class Server(uvicorn.Server):
    """uvicorn's server; a signal that stopped it in good order is not raised again, so that the exit code is 0."""

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


def make_server(app: FastAPI, grace: int) -> Server:
    """Make a server for an app.

    Args:
        app: Of `create_app`.
        grace: Seconds that answers have to end when the server is told to stop.
    """
    return Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=grace, server_header=False))


def listen(host: str, port: int) -> socket.socket:
    """Open the socket to serve on; port 0 takes a free one.

    Raises:
        TdaError: The address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it lets two servers share a port
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
    """Tell whether only this machine reaches a socket."""
    return ipaddress.ip_address(opened.getsockname()[0]).is_loopback
