"""Answers in the API's shape: whole, and in chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from tda_export.runtime import Metrics

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}
END_OF_STREAM = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer share.

    `chat` is true for POST /v1/chat/completions and false for POST /v1/completions; `model` is the requested name;
    `ends_with_usage` says whether a stream's last chunk has the usage, which is null in the others then.
    """

    chat: bool
    model: str
    ends_with_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, metrics: Metrics) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        choice = self._choice(said, FINISH_REASONS[metrics.finish_reason])
        return self._head(kind) | {"choices": [choice], "usage": usage(metrics)}

    def begin(self) -> dict[str, Any]:
        """Return a chat's first chunk, which holds the role."""
        return self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def piece(self, text: str) -> dict[str, Any]:
        """Return a chunk of text."""
        return self._chunk([self._choice({"delta": {"content": text}} if self.chat else {"text": text}, None)])

    def end(self, metrics: Metrics) -> dict[str, Any]:
        """Return the chunk with the finish reason."""
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk([self._choice(said, FINISH_REASONS[metrics.finish_reason])])

    def usage(self, metrics: Metrics) -> dict[str, Any]:
        """Return a stream's last chunk, for requests that ask for it."""
        return self._chunk([]) | {"usage": usage(metrics)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": choices}
        return chunk | {"usage": None} if self.ends_with_usage else chunk

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


def usage(metrics: Metrics) -> dict[str, Any]:
    """Count tokens as the API does; cached tokens are those kept from the previous prompt."""
    return {
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.new_tokens,
        "total_tokens": metrics.prompt_tokens + metrics.new_tokens,
        "prompt_tokens_details": {"cached_tokens": metrics.reused_tokens},
    }


def server_sent(event: dict[str, Any]) -> bytes:
    """Serialise an event of a stream in ASCII, since clients may treat characters other than \\n as the end of a
    line."""
    return f"data: {json.dumps(event)}\n\n".encode()
