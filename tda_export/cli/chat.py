"""`tda-export chat`: talk with an artifact."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tda_export.cli.deployment_options import Deployed, deployment_options
from tda_export.cli.generate import FINISHED, MATRICES, looked_up
from tda_export.cli.help_groups import command, option
from tda_export.cli.options import (
    RARE_ANSWER_OPTIONS,
    RARE_DEPLOYMENT_OPTIONS,
    Answering,
    answer_options,
    artifact_argument,
    context_option,
    keep_answers_option,
)
from tda_export.errors import TdaError

if TYPE_CHECKING:
    from tda_export.runtime import Conversation
    from tda_export.runtime.deployment import AnyDeployment
    from tda_export.runtime.generate import Generation, Metrics

HELP = """/reset  start a new conversation
/quit   end the chat (Ctrl-D does too)
/help   show this help
Anything else is a message. Ctrl-C stops an answer."""


@command(rare=("context", "keep_answers", *RARE_ANSWER_OPTIONS, *RARE_DEPLOYMENT_OPTIONS))
@artifact_argument
@option("--system", help="A system message, before all others.")
@answer_options(512)
@context_option
@deployment_options
@keep_answers_option
def chat(
    artifact: Path,
    system: str | None,
    answering: Answering,
    context: int | None,
    deployed: Deployed,
    keep_answers: bool,
) -> None:
    """Chat with ARTIFACT, turn by turn.

    Each line is a message, on a terminal and from a pipe. Ctrl-C stops an answer; /help lists the commands. Each turn
    processes only the new message, and the last answer again unless --keep-answers. When the context is full, the
    oldest turns are dropped, and a line says so.

    Answers go to standard output. After each, a line on standard error gives the fraction of the skippable weight bytes
    that its tokens read, and tokens per second. On a terminal, the window title shows both while an answer is written.
    """
    from tda_export.runtime import Conversation

    model, deployment = deployed.load(artifact, keep_answers=keep_answers)
    conversation = Conversation(
        model,
        system=system,
        mask=deployed.mask,
        context=context,
        deployment=deployment,
        chat_template_kwargs=answering.chat_template_kwargs,
        keep_answers=keep_answers,
        lookup=answering.lookup,
    )
    if not sys.stdin.isatty():
        _talk(_piped_lines(), conversation, answering, deployment)
        return
    with contextlib.suppress(ImportError):  # where Python has it, input() gets line editing and a history
        importlib.import_module("readline")
    with CtrlC() as ctrl_c:
        click.secho(f"{artifact.resolve().name}. /help lists the commands.", dim=True, err=True)
        _talk(_typed_lines(ctrl_c), conversation, answering, deployment, ctrl_c)


class CtrlC:
    """Handles Ctrl-C on a terminal: it stops the answer or the line that is being typed, never the program.

    `answer`: the generation that is being written. `typing`: whether input() waits for a line.
    """

    def __init__(self) -> None:
        self.answer: Generation | None = None
        self.typing = False

    def __enter__(self) -> CtrlC:
        self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _pressed(self, number: int, frame: object) -> None:
        if self.typing:
            self.typing = False
            raise KeyboardInterrupt
        if self.answer is not None:
            self.answer.cancel()  # the generation ends at its next token, whatever the program is doing


def _talk(
    lines: Iterator[str],
    conversation: Conversation,
    answering: Answering,
    deployment: AnyDeployment,
    ctrl_c: CtrlC | None = None,
) -> None:
    """Answer line by line. Without a terminal, the first failure ends the chat."""
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            click.echo(HELP, err=True)
        elif text.startswith("/"):
            click.echo(f"Unknown command {text.split()[0]}. /help lists the commands.", err=True)
        elif text:
            try:
                _answer(conversation, text, answering, deployment, ctrl_c)
            except TdaError as error:
                if ctrl_c is None:
                    raise
                click.echo(f"Error: {error}", err=True)


def _answer(
    conversation: Conversation, text: str, answering: Answering, deployment: AnyDeployment, ctrl_c: CtrlC | None
) -> None:
    before = conversation.dropped_turns
    generation = conversation.say(
        text,
        max_new_tokens=answering.max_new_tokens,
        sampling=answering.sampling,
        stop=answering.stop,
        stop_token_ids=answering.stop_token_ids,
        ignore_eos=answering.ignore_eos,
    )
    if dropped := conversation.dropped_turns - before:
        turns = "The oldest turn was" if dropped == 1 else f"The {dropped} oldest turns were"
        click.secho(f"({turns} left out: the context is full.)", dim=True, err=True)
    if ctrl_c is not None:
        ctrl_c.answer = generation
    live = ctrl_c is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    shown = 0
    try:
        for token in generation:
            click.echo(token.text, nl=False)
            shown += len(token.text)
            if live:
                click.echo(window_title(generation.metrics), nl=False, err=True)
    except TdaError:
        if shown:
            click.echo()  # so that the error begins a new line
        raise
    click.echo(generation.text[shown:])  # text that was held back until the end
    click.secho(status(generation.metrics, deployment, stopped=generation.cancelled), dim=True, err=True)


def window_title(metrics: Metrics) -> str:
    """Return the escape sequence that shows the bytes and the speed of an unfinished answer in the terminal's title."""
    rate = metrics.decode_tokens_per_second
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    return f"\033]0;{1 - metrics.sparsity:.0%} of {MATRICES[metrics.matrices]} bytes{speed}\007"


def status(metrics: Metrics, deployment: AnyDeployment, *, stopped: bool = False) -> str:
    """Describe in one line the bytes that an answer read, and its speed.

    The fraction of bytes counts masks and refreshes as they were. For rows that token thresholds skip, it is what the
    calibration expects.
    """
    parts = [f"{1 - metrics.sparsity:.0%} of {MATRICES[metrics.matrices]} bytes read"]
    if metrics.mask != "dense" and deployment.by_calibration:
        parts[0] += deployment.by_calibration
    if metrics.decode_tokens_per_second:
        parts.append(f"{metrics.decode_tokens_per_second:.1f} tokens/s")
    parts.append(f"{metrics.new_tokens} tokens")
    if metrics.drafted:
        parts.append(looked_up(metrics))
    parts.append(f"{metrics.prompt_tokens - metrics.reused_tokens} of {metrics.prompt_tokens} prompt tokens read")
    if stopped:
        parts.append("stopped")
    elif metrics.finish_reason != "stop":
        parts.append(FINISHED[metrics.finish_reason])
    return f"[{', '.join(parts)}]"


def _typed_lines(ctrl_c: CtrlC) -> Iterator[str]:
    while True:
        try:
            ctrl_c.typing = True
            line = input(_prompt())
            ctrl_c.typing = False
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n/quit or Ctrl-D ends the chat.", err=True)
        else:
            yield line


def _prompt() -> str:
    """Return the prompt for `input`. Where standard output is no terminal, print it to standard error instead."""
    if sys.stdout.isatty():
        return "> "
    click.echo("> ", nl=False, err=True)
    return ""


def _piped_lines() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise TdaError("Standard input is not valid UTF-8 text. Convert it to UTF-8.") from error
