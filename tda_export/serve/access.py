"""Who may send requests: accepted Host names of this server, and origins of other sites' pages."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tda_export.errors import UsageError
from tda_export.serve.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?", re.ASCII)
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Access:
    """`hosts`: names that a request's Host header may have, None for any. `origins`: origins whose pages may send
    requests, `*` for any."""

    hosts: frozenset[str] | None
    origins: tuple[str, ...]


def make_access(*, host: str, loopback: bool, allowed_hosts: Iterable[str], origins: Iterable[str]) -> Access:
    """Decide who may send requests.

    On loopback, names other than this machine's own are refused: another site may point its name at this address (DNS
    rebinding), and a browser then takes this server for that site. Elsewhere any name is accepted, unless some are
    given.

    Args:
        host: The host that the server was told to listen on.
        loopback: Whether only this machine can reach the server.
        allowed_hosts: Further accepted names.
        origins: Origins as spelt in a browser's Origin header.

    Raises:
        UsageError: An origin or a host is malformed.
    """
    origins = tuple(origin if origin == "*" else origin.lower().removesuffix("/") for origin in origins)
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise UsageError(f"--cors {origin[:100]!r} is not an origin. Give one like https://example.org, or '*'.")
    names = frozenset(map(plain_host, allowed_hosts))
    if "" in names:
        raise UsageError("--allowed-host takes a name or an address, without a path.")
    if not names and not loopback:
        return Access(None, origins)
    return Access(names | {plain_host(host), *LOOPBACK}, origins)


def plain_host(header: str) -> str:
    """Return a host, as spelt in headers or by people, in one normal spelling without its port; empty if it is
    malformed."""
    try:
        return str(ipaddress.ip_address(header))  # a bare IPv6 address
    except ValueError:
        pass
    if not (found := HOST.fullmatch(header.strip())):
        return ""
    name = found[1].strip("[]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return "" if "/" in name else name


def limit_access(app: FastAPI, access: Access) -> None:
    """Pass only allowed requests on to an app."""
    app.add_middleware(AllowedHosts, hosts=access.hosts)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
        )


class AllowedHosts:
    """Refuses requests that name another host, and drops a slash at the end of a path."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")  # missing only before HTTP/1.1, and never from browsers
            if self._hosts is not None and host is not None and plain_host(host) not in self._hosts:
                error = ApiError(
                    403,
                    f"This server does not answer to the host name '{host[:100]}'. "
                    "Start it with --allowed-host for that name.",
                    code="host_not_allowed",
                )
                await error.response()(scope, receive, send)
                return
            if scope["path"].endswith("/") and scope["path"] != "/":
                scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)
