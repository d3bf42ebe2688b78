"""Who may ask: hosts by which this server is called, and pages of other sites."""

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
    """`hosts` that requests may name in their header Host, None for any; `origins` whose pages may ask, `*` for any."""

    hosts: frozenset[str] | None
    origins: tuple[str, ...]


def make_access(*, host: str, loopback: bool, allowed_hosts: Iterable[str], origins: Iterable[str]) -> Access:
    """Decide who may ask.

    On loopback other names than this machine's own are refused: a page of another site may have let its name lead
    here, and its browser then takes this server for that site. Elsewhere any name may be right, unless some are given.

    Args:
        host: What the server was told to listen on.
        loopback: Whether only this machine reaches it.
        allowed_hosts: Further names.
        origins: As a browser's header Origin has them.

    Raises:
        UsageError: An origin or a host is none.
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
    """Return a host as headers and people spell it, without its port, in one spelling; nothing if it is none."""
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
    """Refuses requests that name another host, and leaves a slash at the end of a path out."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host")  # which only HTTP before 1.1 does without, and no browser
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
