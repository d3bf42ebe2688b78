"""The routes of the API, and how answers get from the worker's thread to clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from tda_export import __version__
from tda_export.errors import TdaError
from tda_export.serve.body_limit import BodyLimit
from tda_export.serve.errors import ApiError, add_handlers, invalid
from tda_export.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, Order
from tda_export.serve.replies import END_OF_STREAM, Reply, server_sent
from tda_export.serve.worker import Done, Event, Failed, Job, Piece, Worker

CLIENT_LEFT = 499  # nobody reads it
USUAL_NEW_TOKENS = 1024  # of a chat's answer whose length nobody gave: keys and values take their room beforehand


@dataclass(frozen=True)
class Limits:
    """What a request may ask for: `body_bytes` of its body, `new_tokens` of an answer.

    For None an answer has what the context allows, and where nobody says how many, `USUAL_NEW_TOKENS`.
    """

    body_bytes: int
    new_tokens: int | None


def create_app(worker: Worker, name: str, limits: Limits) -> FastAPI:
    """Make the app. Its start and end are the worker's.

    Args:
        worker: Not started yet.
        name: Of the model, which requests ask for.
        limits: Of a request.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="tda-export", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    add_handlers(app)
    app.add_middleware(BodyLimit, most_bytes=limits.body_bytes)
    app.include_router(Api(worker, name, limits).router())
    return app


class Api:
    """The handlers.

    Each request whose body is valid counts once, however it ends: those that are refused here, others in the worker.
    """

    def __init__(self, worker: Worker, name: str, limits: Limits) -> None:
        self._worker, self._name, self._limits = worker, name, limits
        self._reply = Reply(chat=False, model=name)  # says since when the model is here

    def router(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        router.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"])
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        return router

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer the last of some messages."""
        return await self._answer("chat", body, request)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt."""
        return await self._answer("completions", body, request)

    async def models(self) -> dict[str, object]:
        """List the one model."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> dict[str, object]:
        """Describe it."""
        self._check_model(model)
        return self._model()

    async def health(self) -> JSONResponse:
        """Say whether requests are answered."""
        state = self._worker.state
        body = {"status": state, "model": self._name, "waiting": self._worker.waiting}
        return JSONResponse(body, 200 if state == "ok" else 503)

    async def metrics(self) -> Response:
        """Return what Prometheus collects."""
        return Response(self._worker.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    def _model(self) -> dict[str, object]:
        return {"id": self._name, "object": "model", "created": self._reply.created, "owned_by": "tda-export"}

    async def _answer(self, endpoint: str, body: GenerationRequest, request: Request) -> Response:
        # Nothing is awaited before the job is in the queue, so that the order of arrival is the queue's.
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its clients with it
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            job = Job(endpoint, self._order(body), deliver)
            self._worker.submit(job)
        except ApiError:
            self._worker.metrics.ended(endpoint, "refused")
            raise
        reply = Reply(chat=isinstance(body, ChatRequest), model=self._name)
        if body.stream:
            return EventStream(_chunks(reply, events, with_usage=body.usage_wanted), self._worker, job)
        try:
            return await _unless_left(request, _whole(reply, events))
        finally:
            self._worker.cancel(job)

    def _order(self, body: GenerationRequest) -> Order:
        """Check a request and tokenize its prompt."""
        self._check_model(body.model)
        body.check_supported()
        stops = body.stops()
        most = self._limits.new_tokens
        if most is not None and body.new_tokens is not None and body.new_tokens > most:
            raise invalid(
                f"{body.new_tokens} new tokens: this server gives up to {most}.",
                param=body.new_tokens_field,
                code="invalid_value",
            )
        model, param = self._worker.model, "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            if isinstance(body, ChatRequest):
                tokens = model.text.encode_chat(body.plain_messages())
            else:
                assert isinstance(body, CompletionRequest)
                tokens = model.tokenize(body.single_prompt())
        except TdaError as error:
            raise invalid(str(error), param=param, code="invalid_value") from error
        if len(tokens) >= self._worker.context:
            raise invalid(
                f"This model's maximum context length is {self._worker.context} tokens, and the prompt has "
                f"{len(tokens)}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        wanted = body.new_tokens or body.usual_new_tokens or most or USUAL_NEW_TOKENS
        room = self._worker.context - len(tokens)
        return Order(tokens, min(wanted, most or wanted, room), body.sampling(), stops)

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404,
                f"The model '{name}' does not exist; this server has '{self._name}'.",
                param="model",
                code="model_not_found",
            )


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


async def _chunks(reply: Reply, events: asyncio.Queue[Event], *, with_usage: bool) -> AsyncIterator[bytes]:
    if reply.chat:
        yield server_sent(reply.begin())
    while True:
        event = await events.get()
        if isinstance(event, Failed):  # too late for a status
            yield server_sent(event.error.body())
            return
        if event.text:
            yield server_sent(reply.piece(event.text))
        if isinstance(event, Done):
            yield server_sent(reply.end(event.metrics))
            if with_usage:
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
    """Await an answer for as long as its client does."""
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
