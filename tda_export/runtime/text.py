"""Text in and out: tokenizer, chat template, and streaming without broken characters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tda_export.errors import TdaError, first_line
from tda_export.graph import contract
from tda_export.runtime.artifact import Artifact

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
REPLACEMENT_CHARACTER = "\ufffd"  # what a decoder makes of bytes that are no character


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
        self._artifact = artifact

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Tokenize; `special_tokens` lets the tokenizer add its own (BOS), which a chat template spells out itself."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # what Python makes of foreign bytes in an argument
            raise TdaError("The prompt is not valid UTF-8 text. Convert it to UTF-8.") from error
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """Begin to decode what follows a prompt of token ids."""
        return TextStream(self._tokenizer, prompt)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def special_token(self, name: str) -> tuple[int, str] | None:
        """Return id and spelling of `bos_token`, `eos_token`, `pad_token` or `unk_token`; None where it has none."""
        spelling = self._special_tokens().get(name)
        number = None if spelling is None else self._tokenizer.token_to_id(spelling)
        return None if number is None else (number, str(spelling))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template."""
        return contract.CHAT_TEMPLATE_FILE in self._artifact.manifest["files"]

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Render messages with the model's chat template, up to where the assistant's answer begins.

        Raises:
            TdaError: The model has no chat template, or the template refuses the messages.
        """
        path = self._artifact.file(contract.CHAT_TEMPLATE_FILE)
        if not self.has_chat_template:
            raise TdaError(f"{self._artifact.folder}: this model has no chat template. Leave --chat out.")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.add_extension(GenerationTag)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            template = environment.from_string(path.read_text(encoding="utf-8"))
            # The variables that transformers passes too: templates test them for none.
            variables = {"tools": None, "documents": None, **self._special_tokens()}
            return template.render(messages=list(messages), add_generation_prompt=True, **variables)
        except Exception as error:  # a template is a program, and fails like one
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TdaError(f"{path}: the chat template cannot be rendered ({reason}).") from error

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Render messages as `chat` does, and tokenize them."""
        return self.encode(self.chat(messages), special_tokens=False)

    def _special_tokens(self) -> dict[str, str]:
        if TOKENIZER_CONFIG_FILE not in self._artifact.manifest["files"]:
            return {}
        path = self._artifact.file(TOKENIZER_CONFIG_FILE)
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
            contents = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise TdaError(f"{path}: not readable ({first_line(error)}). Build the artifact again.") from error
        return {name: token for name, token in contents.items() if token}


class TextStream:
    """Turns tokens into text as they come, holding back bytes that do not form a character yet.

    Tokens are decoded together with those of the piece before, whose text is cut off again: some tokenizers drop the
    space before the first token that they decode. The stream begins with the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = list(prompt)  # tokens whose text is known: the prompt's, then those of the last piece
        self._pending: list[int] = []  # tokens whose text is held back

    def add(self, token: int) -> str:
        """Return the text that `token` completes, perhaps none."""
        self._pending.append(token)
        piece = self._new_text()
        if not piece or piece.endswith(REPLACEMENT_CHARACTER):
            return ""
        self._before, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """Return what was held back: an unfinished character, as the tokenizer shows it."""
        piece = self._new_text() if self._pending else ""
        self._before, self._pending = self._before + self._pending, []
        return piece

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._before, skip_special_tokens=True)
        whole = self._tokenizer.decode(self._before + self._pending, skip_special_tokens=True)
        return whole[len(known) :]


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; when generating it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)
