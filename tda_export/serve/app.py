"""The routes of the API, and how answers get from the worker's thread to clients."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from tda_export import __version__
from tda_export.serve.access import Access, limit_access
from tda_export.serve.body_limit import BodyLimit
from tda_export.serve.errors import ApiError, add_handlers
from tda_export.serve.orders import Limits, check_model, check_request, make_order
from tda_export.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest
from tda_export.serve.replies import END_OF_STREAM, Reply, server_sent
from tda_export.serve.worker import Done, Event, Failed, Job, Piece, Worker

CLIENT_LEFT = 499  # the client has left; nobody reads this status


def create_app(worker: Worker, name: str, limits: Limits, access: Access) -> FastAPI:
    """Make the app. The worker starts and ends with it.

    Args:
        worker: Not started yet.
        name: The model's name, which requests ask for.
        limits: The limits of a request.
        access: Who may send requests.
    """
    api = Api(worker, name, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)
        api.close()

    app = FastAPI(
        title="tda-export",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    add_handlers(app)
    app.add_middleware(BodyLimit, most_bytes=limits.body_bytes)
    limit_access(app, access)
    app.include_router(api.router())
    return app


class Api:
    """The handlers.

    Each request with a valid body is counted once, however it ends: here if it is refused here, otherwise in the
    worker.
    """

    def __init__(self, worker: Worker, name: str, limits: Limits) -> None:
        self._worker, self._name, self._limits = worker, name, limits
        self._reply = Reply(chat=False, model=name)  # holds the time since which the model is available
        # Prompts are rendered and tokenized one after another, so that the queue keeps the order of arrival.
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        for path, answer in (
            ("/v1/models", self.models),
            ("/v1/models/{model:path}", self.model),
            ("/health", self.health),
            ("/metrics", self.metrics),
        ):
            router.add_api_route(path, answer, methods=["GET"], response_model=None)
            router.add_api_route(path, answer, methods=["HEAD"], response_model=None, include_in_schema=False)
        return router

    def close(self) -> None:
        """Read no more prompts."""
        self._reading.shutdown(wait=False, cancel_futures=True)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a chat."""
        return await self._answer("chat", body, request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt."""
        return await self._answer("completions", body, request)

    async def models(self) -> dict[str, object]:
        """List the one model."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> dict[str, object]:
        """Describe the model."""
        check_model(model, self._name)
        return self._model()

    async def health(self) -> JSONResponse:
        """Return whether requests are answered."""
        state = self._worker.state
        body = {"status": state, "model": self._name, "waiting": self._worker.waiting}
        return JSONResponse(body, 200 if state == "ok" else 503)

    async def metrics(self) -> Response:
        """Return what Prometheus collects."""
        return Response(self._worker.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> dict[str, object]:
        return {"id": self._name, "object": "model", "created": self._reply.created, "owned_by": "tda-export"}

    async def _answer(self, endpoint: str, body: GenerationRequest, request: Request) -> Response:
        loop, events, arrived = asyncio.get_running_loop(), asyncio.Queue[Event](), time.monotonic()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and its clients with it
                loop.call_soon_threadsafe(events.put_nowait, event)

        def read() -> Job:
            job = Job(endpoint, make_order(body, self._worker, self._limits), deliver, arrived)
            self._worker.submit(job)
            return job

        try:
            check_request(body, self._name)
            job = await loop.run_in_executor(self._reading, read)
        except ApiError:
            self._worker.metrics.ended(endpoint, "refused")
            raise
        reply = Reply(isinstance(body, ChatRequest), self._name, body.usage_wanted)
        if body.stream:
            return EventStream(_chunks(reply, events), self._worker, job)
        try:
            return await _unless_left(request, _whole(reply, events))
        finally:
            self._worker.cancel(job)


class EventStream(StreamingResponse):
    """A stream that takes its job from the worker when it ends, and when its client leaves."""

    def __init__(self, chunks: AsyncIterator[bytes], worker: Worker, job: Job) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._worker, self._job = worker, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._job)


async def _chunks(reply: Reply, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    if reply.chat:
        yield server_sent(reply.begin())
    while True:
        event = await events.get()
        if isinstance(event, Failed):  # too late for an HTTP status
            yield server_sent(event.error.body())
            return
        if event.text:
            yield server_sent(reply.piece(event.text))
            await asyncio.sleep(0)  # see that the client has left before writing more, since asyncio complains
        if isinstance(event, Done):
            yield server_sent(reply.end(event.metrics))
            if reply.ends_with_usage:
                yield server_sent(reply.usage(event.metrics))
            yield END_OF_STREAM
            return


async def _whole(reply: Reply, events: asyncio.Queue[Event]) -> Response:
    text = ""
    while isinstance(event := await events.get(), Piece):
        text += event.text
    if isinstance(event, Failed):
        raise event.error
    return JSONResponse(reply.whole(text + event.text, event.metrics))


async def _unless_left(request: Request, answer: Awaitable[Response]) -> Response:
    """Await an answer for as long as its client waits for it."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=CLIENT_LEFT)
    finally:
        answering.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
