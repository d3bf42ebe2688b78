"""Turn a request into an order for the worker: checked, rendered, tokenized and within the server's limits."""

from __future__ import annotations

from dataclasses import dataclass

from tda_export.errors import TdaError, UsageError
from tda_export.runtime import Model
from tda_export.runtime.deployment import PriceDeployment
from tda_export.serve.errors import ApiError, invalid
from tda_export.serve.protocol import NO_LIMIT, ChatRequest, CompletionRequest, GenerationRequest, Order
from tda_export.serve.worker import Worker

USUAL_NEW_TOKENS = 1024  # default length of a chat's answer: room for keys and values is reserved beforehand


@dataclass(frozen=True)
class Limits:
    """What a request may ask for: at most `body_bytes` in its body, and `new_tokens` in its answer.

    For None, an answer may have as many tokens as the context allows, and `USUAL_NEW_TOKENS` where the request gives no
    number.
    """

    body_bytes: int
    new_tokens: int | None


def check_request(body: GenerationRequest, model: str) -> None:
    """Refuse requests that this server cannot answer, without reading the prompt.

    Raises:
        ApiError: The request is for another model, or has a field that is unknown or not supported.
    """
    check_model(body.model, model)
    body.check_supported()
    body.stops()
    body.budget()


def check_model(asked: str, name: str) -> None:
    """Refuse requests for another model than `name`.

    Raises:
        ApiError: The request is for another model.
    """
    if asked != name:
        raise ApiError(
            404,
            f"The model '{asked}' does not exist; this server has '{name}'.",
            param="model",
            code="model_not_found",
        )


def make_order(body: GenerationRequest, worker: Worker, limits: Limits) -> Order:
    """Render and tokenize a request's prompt. A chat template may take long, so do not call this in the event loop.

    Raises:
        ApiError: The prompt is invalid or too long, the queue is full, or the server is shutting down.
    """
    worker.check_room()
    prompt = _prompt(body, worker)
    deployment = _deployment(body.budget(), worker.model, len(prompt))
    room = worker.context - len(prompt)
    if room <= 0:
        raise invalid(
            f"This model's maximum context length is {worker.context} tokens, and the prompt has {len(prompt)}. "
            "Shorten it.",
            param=_prompt_field(body),
            code="context_length_exceeded",
        )
    most = room if limits.new_tokens is None else min(limits.new_tokens, room)
    wanted = body.new_tokens or body.usual_new_tokens or limits.new_tokens or USUAL_NEW_TOKENS
    stop_token_ids = tuple(body.stop_token_ids or ())
    try:
        worker.model.end_tokens(stop_token_ids)
    except TdaError as error:
        raise invalid(str(error), param="stop_token_ids", code="invalid_value") from error
    return Order(
        prompt,
        most if wanted == NO_LIMIT else min(wanted, most),
        body.sampling(),
        body.stops(),
        stop_token_ids,
        bool(body.ignore_eos),
        deployment,
    )


def _deployment(budget: dict[str, float], model: Model, prompt_tokens: int) -> PriceDeployment | None:
    """Choose a price for a request's budget and the length of its prompt."""
    if not budget:
        return None
    (name,) = budget
    table = model.artifact.price_table
    if model.artifact.layout != "priced":
        problem = (
            "this server's artifact has masks and no prices, so a request cannot say how much is read. Leave it out, "
            "or serve an artifact that 'tda-export build --method priced' made."
        )
        raise invalid(f"'{name}': {problem}", param=name, code="unsupported_parameter")
    if table is None and name != "price":
        raise invalid(
            f"'{name}': this server's artifact was built without a table of prices. Give 'price', or leave it out.",
            param=name,
            code="unsupported_parameter",
        )
    try:
        return model.at(**budget, prompt_tokens=prompt_tokens)
    except UsageError as error:
        raise invalid(str(error), param=name, code="invalid_value") from error


def _prompt(body: GenerationRequest, worker: Worker) -> list[int]:
    model = worker.model
    try:
        if isinstance(body, CompletionRequest):
            return model.tokenize(body.single_prompt())
        assert isinstance(body, ChatRequest)
        if not model.text.has_chat_template:
            raise invalid(
                "This model has no chat template, so it cannot chat. Send text to continue to /v1/completions.",
                param="messages",
                code="invalid_value",
            )
        return model.tokenize_chat(body.plain_messages(), body.template_kwargs())
    except TdaError as error:
        worker.check_open()  # the worker's end also ends a rendering
        raise invalid(str(error), param=_prompt_field(body), code="invalid_value") from error


def _prompt_field(body: GenerationRequest) -> str:
    return "messages" if isinstance(body, ChatRequest) else "prompt"
