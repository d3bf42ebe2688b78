"""Text in and out: tokenizer, chat template, and streaming without broken characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer

from tda_export.errors import TdaError, UsageError, first_line
from tda_export.graph import contract
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.chat_template import SPECIAL_TOKENS, ChatTemplate, check_template_kwargs

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
LONGEST_SPELLING = 100  # characters of a token in a message
LONGEST_CHARACTER = 4  # bytes
FEW_TOKENS = 16  # of a prompt's end
REPLACEMENT_CHARACTER = "\ufffd"  # a decoder's output for bytes that are not a character


class Text:
    """The tokenizer of an artifact."""

    def __init__(self, artifact: Artifact) -> None:
        path = artifact.file(contract.TOKENIZER_FILE)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise TdaError(
                f"{path}: not a readable tokenizer ({first_line(error)}). Build the artifact again."
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(number for number, token in added.items() if token.special)
        self._artifact = artifact
        self._template = ChatTemplate(artifact.file(contract.CHAT_TEMPLATE_FILE))

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokenize; `special_tokens` lets the tokenizer add its special tokens (BOS); a chat template spells them out
        itself.

        Raises:
            UsageError: The text holds a token that the model does not have.
            TdaError: The text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python represents undecodable bytes of an argument so
            raise TdaError("The prompt is not valid UTF-8 text. Convert it to UTF-8.") from error
        # Only a batch lets other threads run meanwhile. A megabyte takes seconds.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=special_tokens)
        tokens = list(encoding.ids)
        vocabulary = self._artifact.shape.vocab_size
        beyond = next((token for token in tokens if token >= vocabulary), None)
        if beyond is not None:
            spelling = str(self._tokenizer.id_to_token(beyond))[:LONGEST_SPELLING]
            raise UsageError(
                f"The text contains {spelling!r}, token {beyond} of the tokenizer, and the model's vocabulary ends at "
                f"{vocabulary - 1}. Leave it out of the text."
            )
        return tokens

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """Begin to decode the tokens that follow a prompt of token ids."""
        return TextStream(self._tokenizer, self._special, prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def special_token(self, name: str) -> tuple[int, str] | None:
        """Return id and spelling of `bos_token`, `eos_token`, `pad_token` or `unk_token`; None where the tokenizer has
        none."""
        spelling = self._special_tokens().get(name)
        number = None if spelling is None else self._tokenizer.token_to_id(spelling)
        return None if number is None else (number, str(spelling))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template."""
        return contract.CHAT_TEMPLATE_FILE in self._artifact.manifest["files"]

    def chat(self, messages: Sequence[Mapping[str, str]], chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
        """Render messages with the model's chat template, up to where the assistant's answer begins.

        Args:
            messages: Each with `role` and `content`.
            chat_template_kwargs: Further variables for the template, plain JSON: `{"enable_thinking": False}`.

        Raises:
            TdaError: The model has no chat template, or the template refuses the messages or exceeds its limits.
            UsageError: A variable has a reserved name, or is not plain JSON.
        """
        if not self.has_chat_template:
            raise TdaError(f"{self._artifact.folder}: this model has no chat template. Leave --chat out.")
        given = chat_template_kwargs or {}
        check_template_kwargs(given)
        # transformers passes these variables too: templates test whether they are none.
        variables = {"tools": None, "documents": None, **self._special_tokens()}
        return self._template.render(messages, {**given, **variables})

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Render messages as `chat` does, and tokenize them."""
        return self.encode(self.chat(messages, chat_template_kwargs), special_tokens=False)

    def close(self) -> None:
        """End the process that renders the chat template; a rendering in progress fails."""
        self._template.close()

    def _special_tokens(self) -> dict[str, str]:
        if TOKENIZER_CONFIG_FILE not in self._artifact.manifest["files"]:
            return {}
        path = self._artifact.file(TOKENIZER_CONFIG_FILE)
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            tokens = {name: config.get(name) for name in SPECIAL_TOKENS}
            contents = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise TdaError(f"{path}: not readable ({first_line(error)}). Build the artifact again.") from error
        return {name: token for name, token in contents.items() if token}


class TextStream:
    """Turns tokens into text as they arrive, holding back bytes that do not form a character yet.

    Tokens are decoded together with those of the previous piece, whose text is then cut off, since some tokenizers drop
    the space before the first token that they decode. The stream begins with the prompt. Where the prompt ends inside a
    character, its last tokens are held back too, and the character is returned when it is complete.

    The time of a token does not depend on the length of the prompt, of which only the end is decoded, nor on how many
    tokens without text came before it.
    """

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int], prompt: Sequence[int]) -> None:
        self._tokenizer, self._special = tokenizer, special
        end = self._end([token for token in prompt if token not in special])
        whole = self._decode(end)
        known, unfinished = self._split(end, whole)
        self._before = known  # tokens whose text is known: the prompt's last, then those of the last piece
        self._pending = unfinished  # tokens whose text is held back
        self._read = whole[len(self._decode(known)) :] if unfinished else ""  # their text as the prompt shows it

    def add(self, token: int) -> str:
        """Return the text that `token` completes, which may be empty."""
        if not self._has_text(token):
            return ""
        self._pending.append(token)
        piece = self._new_text()
        if not piece or piece.endswith(REPLACEMENT_CHARACTER):
            return ""
        self._before, self._pending, self._read = self._pending, [], ""
        return piece

    def finish(self) -> str:
        """Return what was held back: an unfinished character, as the tokenizer shows it."""
        piece = self._new_text() if self._pending else ""
        self._before, self._pending, self._read = self._before + self._pending, [], ""
        return piece

    def _has_text(self, token: int) -> bool:
        """Whether a decoder sees the token: special ones and those beyond the vocabulary are skipped."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _end(self, prompt: list[int]) -> list[int]:
        """Return the last tokens of a prompt, from the start of a character on: a few, or more where they have no
        text."""
        few = FEW_TOKENS
        while few < len(prompt):
            for count in range(few, few + LONGEST_CHARACTER):  # one of them begins a character
                text = self._decode(prompt[-count:])
                if text and not text.startswith(REPLACEMENT_CHARACTER):
                    return prompt[-count:]
            few *= 2
        return prompt

    def _new_text(self) -> str:
        piece = self._decode(self._before + self._pending)[len(self._decode(self._before)) :]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(self._read, piece, strict=False))
        return piece[len(list(alike)) :]

    def _split(self, prompt: list[int], text: str) -> tuple[list[int], list[int]]:
        """Split a prompt into the tokens whose text is complete and those of an unfinished character at its end, if
        any."""
        if text.endswith(REPLACEMENT_CHARACTER):
            for count in range(1, LONGEST_CHARACTER):
                if not self._decode(prompt[:-count]).endswith(REPLACEMENT_CHARACTER):
                    return prompt[:-count], prompt[-count:]
        return prompt, []

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
