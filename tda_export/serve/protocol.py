"""Requests as the API defines them, and as the worker takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tda_export.errors import UsageError
from tda_export.runtime import Sampling
from tda_export.runtime.chat_template import check_template_kwargs
from tda_export.runtime.conversation import Message
from tda_export.runtime.deployment import AnyDeployment
from tda_export.runtime.sampling import LEAST_PENALTY, MOST_PENALTY
from tda_export.serve.errors import invalid
from tda_export.serve.fields import (
    LONGEST_NAME,
    UNSUPPORTED,
    UNSUPPORTED_OF_MESSAGES,
    UNSUPPORTED_OF_STREAMS,
    check_fields,
)

# Validation of a list stops at its first wrong item: a body of a megabyte holds some 300,000 items, and each would be
# reported for every type that the list may have, which takes seconds and blocks all other clients.
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]

MOST_STOPS = 4
BUDGETS = ("price", "sparsity", "max_kl")
SEEDS = 1 << 64

NO_LIMIT = -1


def _token_limit(value: int) -> int:
    if value < 1 and value != NO_LIMIT:
        raise ValueError(f"Input should be greater than or equal to 1, or {NO_LIMIT} for no limit")
    return value


TokenLimit = Annotated[int, AfterValidator(_token_limit)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """The fields that chat and completions have in common. Unknown fields are kept, so that they can be refused by
    name."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    usual_new_tokens: ClassVar[int | None] = None  # default length of an answer; None takes the server's

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Items[str] | None = None
    # Not in the API: named as other servers name them.
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 and -1 are off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=MOST_PENALTY)] | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    # This project's own: how much of the weights is read. At most one of them may be given.
    price: Annotated[float, Field(ge=0)] | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = None

    @property
    def new_tokens(self) -> int | None:
        """The most tokens of the answer, or NO_LIMIT, if given."""
        return self.max_tokens

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_supported(self) -> None:
        """Refuse fields that would silently be ignored.

        Raises:
            ApiError: A field is unknown or not supported.
        """
        check_fields(self.model_extra, type(self).model_fields, UNSUPPORTED)
        if self.stream_options is not None:
            options = self.stream_options
            check_fields(options.model_extra, ["include_usage"], UNSUPPORTED_OF_STREAMS, where="stream_options.")

    def sampling(self) -> Sampling:
        """Return how to choose tokens. The API's defaults sample."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else self.seed % SEEDS,
            repetition_penalty=self.repetition_penalty or 1.0,
        )

    def budget(self) -> dict[str, float]:
        """Return the budget by its name, or an empty dict where none is given.

        Raises:
            ApiError: Several budgets are given.
        """
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) > 1:
            first, second = list(given)[:2]
            raise invalid(
                f"'{first}' and '{second}' are two budgets. Give only one.", param=second, code="invalid_value"
            )
        return given

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings.

        Raises:
            ApiError: There are too many, or one is empty.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise invalid(
                f"stop: give up to {MOST_STOPS} strings, none of them empty.", param="stop", code="invalid_value"
            )
        return tuple(stops)


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Items[ContentPart] | None = None
    name: str | None = None

    def plain(self, number: int) -> Message:
        """Return the message as templates take it. Text parts are joined; other parts are refused.

        Raises:
            ApiError: The message has no text, or parts that are not text.
        """
        where = f"messages[{number}]"
        if self.role in ("tool", "function") or (self.model_extra or {}).get("tool_calls"):
            raise invalid(
                "Tool calls and their results are not supported by this server. Leave them out.",
                param=f"{where}.{'role' if self.role in ('tool', 'function') else 'tool_calls'}",
                code="unsupported_parameter",
            )
        check_fields(self.model_extra, ["role", "content", "name"], UNSUPPORTED_OF_MESSAGES, where=f"{where}.")
        if self.content is None:
            raise invalid(
                f"{where}.content: Field required.", param=f"{where}.content", code="missing_required_parameter"
            )
        parts = [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        for place, part in enumerate(parts):
            if part.type != "text":
                raise invalid(
                    f"Content of type '{part.type[:LONGEST_NAME]}' is not supported by this server. Send text.",
                    param=f"{where}.content[{place}]",
                    code="unsupported_content",
                )
            if part.text is None:
                text = f"{where}.content[{place}].text"
                raise invalid(f"{text}: Field required.", param=text, code="missing_required_parameter")
            check_fields(part.model_extra, ["type", "text"], {}, where=f"{where}.content[{place}].")
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "".join(part.text or "" for part in parts)}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: TokenLimit | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def template_kwargs(self) -> dict[str, Any]:
        """Return further variables for the chat template.

        Raises:
            ApiError: One has a reserved name, or is not plain JSON.
        """
        given = self.chat_template_kwargs or {}
        try:
            check_template_kwargs(given)
        except UsageError as error:
            raise invalid(str(error), param="chat_template_kwargs", code="invalid_value") from error
        return given

    def plain_messages(self) -> list[Message]:
        return [message.plain(number) for number, message in enumerate(self.messages)]


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    usual_new_tokens: ClassVar[int | None] = 16  # the API's default

    prompt: str | Items[int] | Items[str] | Items[Items[int]]

    def single_prompt(self) -> str | list[int]:
        """Return the prompt, text or token ids.

        Raises:
            ApiError: There is no prompt, or more than one.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if prompt and isinstance(prompt[0], int):
            return [token for token in prompt if isinstance(token, int)]
        if len(prompt) != 1:
            raise invalid(
                f"{len(prompt)} prompts in one request: this server takes one.", param="prompt", code="invalid_value"
            )
        only = prompt[0]
        assert not isinstance(only, int)
        return only


@dataclass(frozen=True)
class Order:
    """An order for the worker: an answer to `prompt` (token ids), decoded by `deployment` or, for None, by the server's
    own."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    deployment: AnyDeployment | None = None
