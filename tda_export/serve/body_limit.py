"""Refuse bodies that are too large, whatever length they declare."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tda_export.serve.errors import ApiError

MOST_DRAINED = 64 << 20  # bytes read of a refused body at most, so that its sender gets to read the answer

DRAIN_SECONDS = 10  # the longest wait for the sender meanwhile


class BodyLimit:
    """Lets no body of more than `most_bytes` through to the app."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._most_bytes:
            await _drain(receive)
            await self._error().response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most_bytes:
                await _drain(receive)
                raise self._error()  # raised while the app reads the body; its handler answers
            return message

        await self._app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._most_bytes} bytes. Shorten it.", code="body_too_large")


async def _drain(receive: Receive) -> None:
    drained = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while drained < MOST_DRAINED:
                message = await receive()
                drained += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
