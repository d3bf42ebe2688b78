"""Requests of the API as they come, and as the worker takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from tda_export.runtime import Sampling
from tda_export.runtime.conversation import Message
from tda_export.runtime.sampling import LEAST_PENALTY, MOST_PENALTY
from tda_export.serve.errors import invalid

# The first wrong item of a list ends its reading: a body of a megabyte holds some 300,000, and each would be reported
# for every type that the list may have, in seconds for which no other client is heard.
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]

MOST_STOPS = 4
SEEDS = 1 << 64

# Fields of the API that are not supported, and the values that mean nothing. None always means nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class GenerationRequest(BaseModel):
    """What chat and completions have in common. Other fields are kept, so that those of UNSUPPORTED are seen."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    usual_new_tokens: ClassVar[int | None] = None  # of an answer whose length nobody gave; None: the server's

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Items[str] | None = None
    # Not of the API: by the names that other servers use.
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=MOST_PENALTY)] | None = None

    @property
    def new_tokens(self) -> int | None:
        """The most tokens of the answer, if they are given."""
        return self.max_tokens

    @property
    def new_tokens_field(self) -> str:
        """Where `new_tokens` comes from."""
        return "max_tokens"

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_supported(self) -> None:
        """Refuse what would silently be ignored.

        Raises:
            ApiError: A field of UNSUPPORTED says something.
        """
        for name, value in (self.model_extra or {}).items():
            meaningless = [value == other and type(value) is type(other) for other in UNSUPPORTED.get(name, ())]
            if name in UNSUPPORTED and value is not None and not any(meaningless):
                raise invalid(
                    f"'{name}' is not supported by this server. Leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )

    def sampling(self) -> Sampling:
        """Return how to choose tokens: by the API's defaults, which sample."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            seed=None if self.seed is None else self.seed % SEEDS,
            repetition_penalty=self.repetition_penalty or 1.0,
        )

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings.

        Raises:
            ApiError: They are too many, or one is empty.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise invalid(
                f"stop: give up to {MOST_STOPS} strings, none of them empty.", param="stop", code="invalid_value"
            )
        return tuple(stops)


class ContentPart(BaseModel):
    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[ContentPart]
    tool_calls: list[Any] | None = None

    def plain(self, number: int) -> Message:
        """Return the message as templates take it. Parts of text are joined; what is no text is refused."""
        if self.tool_calls:
            raise invalid(
                "Tool calls are not supported by this server. Leave them out.",
                param=f"messages[{number}].tool_calls",
                code="unsupported_parameter",
            )
        parts = [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        for place, part in enumerate(parts):
            if part.type != "text" or part.text is None:
                raise invalid(
                    f"Content of type '{part.type}' is not supported by this server. Send text.",
                    param=f"messages[{number}].content[{place}]",
                    code="unsupported_content",
                )
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text or "" for part in parts)}


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def new_tokens_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    def plain_messages(self) -> list[Message]:
        return [message.plain(number) for number, message in enumerate(self.messages)]


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    usual_new_tokens: ClassVar[int | None] = 16  # as the API has it

    prompt: str | Items[int] | Items[str] | Items[Items[int]]

    def single_prompt(self) -> str | list[int]:
        """Return the prompt, text or token ids.

        Raises:
            ApiError: There is none, or more than one.
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
    """What the worker is asked for: an answer to `prompt` (token ids)."""

    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
