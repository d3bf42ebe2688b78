"""`tda-export chat`, from a pipe and on a terminal."""

from __future__ import annotations

import dataclasses
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tda_export.cli.chat import status, window_title
from tda_export.errors import TdaError
from tda_export.graph import contract
from tda_export.runtime import Conversation, Model, Sampling, load
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.generate import Metrics
from tests.cli.conftest import FAILURE, USAGE, assert_error
from tests.conftest import run_cli
from tests.runtime.conftest import edit_manifest

TURNS = ["The sea is calm tonight", "Why?", "And then?"]


@pytest.fixture(scope="module")
def loaded(tiny_artifact: Path) -> Model:
    return load(tiny_artifact, provider="cpu")


def answers(model: Model, turns: list[str], *, new_tokens: int = 12, **options: object) -> list[str]:
    """Return the answers of the chat, without other output."""
    said, chat = [], Conversation(model)
    for text in turns:
        answer = chat.say(text, max_new_tokens=new_tokens, **options)  # type: ignore[arg-type]
        list(answer)
        said.append(answer.text)
    return said


def test_each_line_is_a_turn(tiny_artifact: Path, loaded: Model) -> None:
    lines = f"{TURNS[0]}\n\n  {TURNS[1]}  \n{TURNS[2]}"  # the last line has no line end
    result = run_cli("chat", tiny_artifact, "--max-new-tokens", 12, input=lines)
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in answers(loaded, TURNS))
    assert "> " not in result.stdout
    statuses = result.stderr.strip().splitlines()
    assert len(statuses) == 3
    for line in statuses:
        assert re.search(r"^\[\d+% of FFN bytes read \(masks counted, rows skipped by tok", line)
        assert re.search(r"\d\.\d tokens/s, 12 tokens, \d+ of \d+ prompt tokens read, token limit reached\]$", line)
    read, whole = map(int, re.findall(r"(\d+) of (\d+) prompt", statuses[2])[0])
    assert read < whole


def test_options_are_those_of_generate(tiny_artifact: Path, loaded: Model) -> None:
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=3, repetition_penalty=1.2, min_p=0.01)
    ends: dict[str, Any] = {"stop": ["e"], "stop_token_ids": [40], "ignore_eos": True}
    expected = answers(loaded, TURNS[:2], new_tokens=20, sampling=sampling, **ends)
    options = ("--temperature", 0.8, "--top-k", 40, "--top-p", 0.9, "--seed", 3, "--repetition-penalty", 1.2)
    options += ("--min-p", 0.01, "--stop", "e", "--stop-token-id", 40, "--ignore-eos")
    result = run_cli("chat", tiny_artifact, "--max-new-tokens", 20, *options, input="\n".join(TURNS[:2]))
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)
    assert expected != answers(loaded, TURNS[:2], new_tokens=20)


def test_system_message_and_dense(tiny_artifact: Path, loaded: Model) -> None:
    chat = Conversation(loaded, system="Be brief.", mask="dense")
    answer = chat.say(TURNS[0], max_new_tokens=12)
    list(answer)
    options = ("--system", "Be brief.", "--mask", "dense", "--max-new-tokens", 12)
    result = run_cli("chat", tiny_artifact, *options, input=TURNS[0])
    assert result.stdout == f"{answer.text}\n"
    assert result.stderr.startswith("[100% of FFN bytes read, ")


def test_answers_may_be_kept(priced_artifact: Path) -> None:
    expected: dict[bool, list[str]] = {}
    read: dict[bool, list[int]] = {}
    model = load(priced_artifact, provider="cpu")
    for keep in (False, True):
        chat = Conversation(model, deployment=model.at(sparsity=0.4), keep_answers=keep)
        expected[keep] = []
        for text in TURNS:
            answer = chat.say(text, max_new_tokens=12)
            list(answer)
            expected[keep].append(answer.text)
    options = (priced_artifact, "--max-new-tokens", 12, "--sparsity", 0.4)
    for flags, keep in (((), False), (("--reread-answers",), False), (("--keep-answers",), True)):
        result = run_cli("chat", *options, *flags, input="\n".join(TURNS))
        assert result.stdout == "".join(f"{answer}\n" for answer in expected[keep])
        read[keep] = [int(count) for count in re.findall(r"(\d+) of \d+ prompt", result.stderr)]
        assert result.stderr.startswith("[60% of linear bytes read (as calibrated), ")
    assert sum(read[True]) < sum(read[False])


def test_a_lookup(priced_artifact: Path) -> None:
    options = ("chat", priced_artifact, "--max-new-tokens", 160, "--ignore-eos")
    alone = run_cli(*options, input="the sea, the sea, the sea")
    result = run_cli(*options, "--lookup", 4, input="the sea, the sea, the sea")
    assert result.stdout == alone.stdout
    assert re.search(r", 160 tokens, \d+ of \d+ drafted tokens accepted, \d+ steps, ", result.stderr)


def test_commands(tiny_artifact: Path, loaded: Model) -> None:
    lines = [TURNS[0], "/help", "/nothing of that", "/reset", TURNS[0], "/quit", "never sent"]
    result = run_cli("chat", tiny_artifact, "--max-new-tokens", 12, input="\n".join(lines))
    assert result.exit_code == 0
    once = answers(loaded, TURNS[:1])[0]
    assert result.stdout == f"{once}\n{once}\n"
    assert "/reset  start a new conversation" in result.stderr
    assert "Unknown command /nothing. /help lists the commands.\n" in result.stderr


def test_left_out_turns_are_said(tiny_artifact: Path) -> None:
    result = run_cli("chat", tiny_artifact, "--context", 160, "--max-new-tokens", 6, input="What of the sea?\n" * 4)
    assert result.exit_code == 0
    assert re.search(
        r"^\(The (oldest turn was|\d oldest turns were) left out: the context is full\.\)$", result.stderr, re.M
    )


def test_failures_from_a_pipe(tiny_artifact: Path, artifact_copy: Path) -> None:
    result = run_cli("chat", tiny_artifact, "--context", 60, input="x" * 80)
    assert_error(result, FAILURE, "tokens and the context 60", "raise the context")
    result = run_cli("chat", tiny_artifact, input=b"caf\xe9")
    assert_error(result, FAILURE, "Standard input is not valid UTF-8 text. Convert it to UTF-8.")
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].pop(contract.CHAT_TEMPLATE_FILE))
    assert_error(run_cli("chat", artifact_copy, input="Hi"), FAILURE, "no chat template, so it cannot chat")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--context", 9999), "A context of 9999 tokens is outside [2, 512]"),
        (("--repetition-penalty", 0), "Repetition penalty 0.0 is outside [0.01, 100.0]"),
        (("--stop", ""), "A stop string is empty"),
        (("--keep-answers",), "has masks. Leave it out"),
        (("--mask", "dense", "--sparsity", 0.5), "--mask dense reads every row"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_usage(tiny_artifact: Path, options: tuple[object, ...], text: str) -> None:
    """Refused at the start, before the first message."""
    assert_error(run_cli("chat", tiny_artifact, *options, input=""), USAGE, text)


def test_status(loaded: Model) -> None:
    two_levels = loaded.artifact.deployment
    one_level = dataclasses.replace(two_levels, token_thresholds=np.zeros(3, np.float32))
    metrics = Metrics(
        "cpu",
        "tda",
        50,
        reused_tokens=30,
        new_tokens=8,
        sparsity=0.514,
        decode_tokens_per_second=12.34,
        finish_reason="stop",
    )
    expected = "12.3 tokens/s, 8 tokens, 20 of 50 prompt tokens read]"
    assert status(metrics, one_level) == f"[49% of FFN bytes read, {expected}"
    how = "(masks counted, rows skipped by tokens as calibrated)"
    assert status(metrics, two_levels) == f"[49% of FFN bytes read {how}, {expected}"
    assert status(dataclasses.replace(metrics, mask="dense", sparsity=0.0), two_levels).startswith(
        "[100% of FFN bytes read, "
    )
    full = dataclasses.replace(metrics, finish_reason="context", decode_tokens_per_second=None)
    assert status(full, one_level) == "[49% of FFN bytes read, 8 tokens, 20 of 50 prompt tokens read, context full]"
    assert status(full, one_level, stopped=True).endswith("read, stopped]")


def test_window_title() -> None:
    metrics = Metrics("cpu", "tda", 50, sparsity=0.514)
    assert window_title(metrics) == "\033]0;49% of FFN bytes\007"
    metrics.decode_tokens_per_second = 12.34
    assert window_title(metrics) == "\033]0;49% of FFN bytes, 12.3 tokens/s\007"


# The tiny model would finish before a key could be pressed.
SLOW = """
import time
from tda_export.cli.main import main
from tda_export.runtime.decode_step import DecodeStep
def slowly(step, tokens, *uncommitted, run=DecodeStep._start):
    time.sleep(0.1)
    return run(step, tokens, *uncommitted)
DecodeStep._start = slowly
main()
"""


class Terminal:
    """The command on its own pseudo-terminal, slowed to ten tokens a second."""

    def __init__(self, *arguments: object, kind: str = "dumb", output: Path | None = None) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-c", SLOW, "chat", *map(str, arguments)]
        environment = os.environ | {"TERM": kind, "PYTHONPATH": os.getcwd()}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=output.open("wb") if output else theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background ignores it
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, pattern: str, *, interrupt: bool = False) -> str:
        """Wait until the terminal shows a match. Return and forget the output up to it.

        Args:
            pattern: The regular expression to wait for.
            interrupt: Press Ctrl-C once a second, because Python misses one that comes just before it waits.
        """
        end = time.monotonic() + 120
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-500:]!r}"
            if not self._read(1.0) and interrupt:
                os.killpg(self.process.pid, signal.SIGINT)
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def settle(self) -> None:
        """Wait until the output ends, and forget it."""
        while self._read(2.0):
            pass
        self.shown = ""

    def _read(self, seconds: float) -> bool:
        """Read the output of the terminal, if there is any within some time."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        try:
            self.shown += os.read(self._ours, 4096).decode(errors="replace").replace("\r\n", "\n")
        except OSError as error:  # the other end is closed
            raise AssertionError(f"it ended: {self.shown[-500:]!r}") from error
        return True

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def test_ctrl_c_stops_the_answer_and_not_the_program(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=[]))
    shell = Terminal(artifact_copy, "--provider", "cpu", "--context", 500)
    try:
        shell.until(r"artifact\. /help lists the commands\.")
        shell.until(r"/quit or Ctrl-D ends the chat\.", interrupt=True)
        shell.settle()
        shell.type("Hi\n")
        shell.until("Hi\n.")  # the echo, and the first text of the answer
        os.killpg(shell.process.pid, signal.SIGINT)
        line = shell.until(r"\[\d+% of FFN bytes read[^\]]*\]")
        assert "prompt tokens read, stopped]" in line
        shell.type("/help\n")
        shell.until("Ctrl-C stops an answer")
        shell.type("x" * 600 + "\n")
        shell.until(r"Error: The prompt has \d+ tokens and the context 500")
        shell.until("> $")
        shell.type("\x04")  # Ctrl-D
        assert shell.process.wait(60) == 0
    finally:
        shell.close()


def test_an_error_has_a_line_of_its_own(tiny_artifact: Path, loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run, steps = DecodeStep._start, iter(range(100))

    def failing(step: DecodeStep, tokens: Any, *uncommitted: int) -> Any:
        if next(steps) == 5:
            raise TdaError("Out of luck. Try again.")
        return run(step, tokens, *uncommitted)

    said = answers(loaded, ["Hi"], new_tokens=6)[0]
    monkeypatch.setattr(DecodeStep, "_start", failing)
    result = run_cli("chat", tiny_artifact, "--provider", "cpu", input="Hi")
    assert (result.exit_code, result.stderr) == (FAILURE, "Error: Out of luck. Try again.\n")
    assert result.stdout.endswith("\n")
    assert said.startswith(result.stdout[:-1])
    assert len(result.stdout) > 1


def test_title_is_live_while_an_answer_comes(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["model"].update(eos_token_ids=[]))
    shell = Terminal(artifact_copy, "--provider", "cpu", "--context", 500, kind="xterm")
    try:
        shell.until(r"/help lists the commands")
        shell.settle()
        shell.type("Hi\n")
        shell.until(r"\x1b\]0;\d+% of FFN bytes, \d+\.\d tokens/s\x07")  # long before the answer's 512 tokens
        assert not re.search(r"\[\d+% of FFN bytes read", shell.shown)
    finally:
        shell.close()


def test_answers_that_go_elsewhere_are_all_that_goes_there(tiny_artifact: Path, tmp_path: Path, loaded: Model) -> None:
    output = tmp_path / "said.txt"
    shell = Terminal(tiny_artifact, "--provider", "cpu", "--max-new-tokens", 3, output=output)
    try:
        shell.until(r"/help lists the commands\..*\n> ")
        shell.type("Hi\n")
        shell.until(r"\[\d+% of FFN bytes read[^\]]*\].*\n> ")
        shell.type("\x04")
        assert shell.process.wait(60) == 0
    finally:
        shell.close()
    assert output.read_text(encoding="utf-8") == answers(loaded, ["Hi"], new_tokens=3)[0] + "\n"
