"""Chats of many turns: each turn reads only what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tda_export.errors import TdaError
from tda_export.runtime.chat_template import check_template_kwargs
from tda_export.runtime.deployment import AnyDeployment
from tda_export.runtime.generate import Generation, MaskMode
from tda_export.runtime.lookup import check_lookup
from tda_export.runtime.model import DEFAULT_NEW_TOKENS, Model
from tda_export.runtime.sampling import Sampling

Message = dict[str, str]  # "role" and "content"


class Conversation:
    """Messages of a user and the model, with their keys, values and statistics.

    A turn renders all messages with the chat template and reads the prompt into a `PromptMemory`, which continues after
    the prompt of the previous turn: the last answer is read again, densely, with the new message. So the prompt mask of
    a turn is the same as after one prefill of the whole chat. With `keep_answers` it continues after the last answer,
    which stays as sparse steps have written it: there is less to read before an answer, but the loss of those steps
    stays in the cache. A template that renders earlier messages differently than before only makes a turn read more.

    When the chat outgrows the context, its oldest turns are left out until a quarter of the context is free.
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        mask: MaskMode | None = None,
        context: int | None = None,
        deployment: AnyDeployment | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        keep_answers: bool = False,
        lookup: int = 0,
    ) -> None:
        """Begin a chat.

        Args:
            model: The model, which must have a chat template.
            system: A message before all others that is never left out.
            mask: As for `Model.generate`.
            context: As for `Model.generate`.
            deployment: As for `Model.generate`.
            chat_template_kwargs: As for `Text.chat`, in every turn.
            keep_answers: As for `Model.memory`.
            lookup: As for `Model.generate`.

        Raises:
            TdaError: The model has no chat template.
            UsageError: The context or lookup is out of range, a variable for the template has a reserved name, or
                `keep_answers` is set and the artifact has prompt masks.
        """
        if not model.text.has_chat_template:
            raise TdaError(
                f"{model.artifact.folder}: this model has no chat template, so it cannot chat. Give it text to "
                "continue, with 'tda-export generate'."
            )
        self._template_kwargs = chat_template_kwargs or {}
        check_template_kwargs(self._template_kwargs)
        check_lookup(lookup)
        self._model, self._mask, self._deployment, self._lookup = model, mask, deployment, lookup
        self._context = model.check_context(context)
        self._memory = model.memory(context=self._context, keep_answers=keep_answers)
        self._before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[list[Message]] = []  # each begins with the user's message
        self._answer: Generation | None = None  # answers the last turn, until it is added to it
        self.dropped_turns = 0  # left out so far

    @property
    def messages(self) -> list[Message]:
        """All messages of the chat, with the last answer as far as it has come."""
        messages = [*self._before, *(message for turn in self._turns for message in turn)]
        return messages if self._answer is None else [*messages, _assistant(self._answer)]

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
    ) -> Generation:
        """Begin the answer to a message.

        The next message closes an answer that the caller did not read to its end; the answer stays in the chat as far
        as it came. An answer that failed or was closed before its first text is forgotten with its message.

        Args:
            text: The user's message.
            max_new_tokens: As for `Model.generate`.
            sampling: As for `Model.generate`.
            stop: As for `Model.generate`.
            stop_token_ids: As for `Model.generate`.
            ignore_eos: As for `Model.generate`.

        Raises:
            TdaError: This message alone does not fit into the context, or the template refuses it.
        """
        self._settle()
        self._turns.append([{"role": "user", "content": text}])
        try:
            tokens = self._fit(max_new_tokens)
            self._answer = self._model.generate(
                tokens,
                max_new_tokens=max_new_tokens,
                mask=self._mask,
                sampling=sampling,
                context=self._context,
                deployment=self._deployment,
                stop=stop,
                stop_token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                memory=self._memory,
                lookup=self._lookup,
            )
        except BaseException:
            self._turns.pop()
            raise
        return self._answer

    def reset(self) -> None:
        """Forget all turns; the system's message stays."""
        self._settle()
        self._turns = []

    def _settle(self) -> None:
        """Take the last answer into the chat."""
        answer, self._answer = self._answer, None
        if answer is None:
            return
        answer.close()
        if answer.text or answer.metrics.finish_reason:
            self._turns[-1].append(_assistant(answer))
        else:
            self._turns.pop()

    def _fit(self, max_new_tokens: int) -> list[int]:
        """Return the tokens of all messages. Leaves the oldest turns out where there is no room for an answer."""
        tokens = self._tokens(self._turns)
        reserve = self._context // 4
        if len(tokens) + min(max_new_tokens, reserve) <= self._context:
            return tokens
        kept = self._turns
        while len(kept) > 1 and len(tokens) + reserve > self._context:
            kept = kept[1:]
            tokens = self._tokens(kept)
        if len(tokens) < self._context:  # otherwise this message alone is too long, and the other turns stay
            self.dropped_turns += len(self._turns) - len(kept)
            self._turns = kept
        return tokens

    def _tokens(self, turns: list[list[Message]]) -> list[int]:
        messages = [*self._before, *(message for turn in turns for message in turn)]
        return self._model.tokenize_chat(messages, self._template_kwargs)


def _assistant(answer: Generation) -> Message:
    return {"role": "assistant", "content": answer.text}
