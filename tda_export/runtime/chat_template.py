"""Chat templates, rendered by a separate process with limits on time, memory and length of text."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.defaults import DEFAULT_NAMESPACE

from tda_export.errors import TdaError, UsageError
from tda_export.runtime import template_process

RENDER_SECONDS = 10  # a usual template takes a millisecond
RENDER_MEMORY = 512 << 20  # bytes, the interpreter's own included
MOST_FIXED_CHARACTERS = 1 << 20  # the most characters that a template adds to its messages
MOST_REPETITIONS = 16  # how often a template may repeat the text of its messages

# Names that a template gets from elsewhere than the caller's variables.
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("raise_exception", "strftime_now"),
        *SPECIAL_TOKENS,
        *DEFAULT_NAMESPACE,  # Jinja's own: range, dict, namespace, …
    }
)


def check_template_kwargs(given: Mapping[str, Any]) -> None:
    """Check variables for a chat template.

    Raises:
        UsageError: One has a reserved name, or is not plain JSON.
    """
    for name, value in given.items():
        if name in RESERVED:
            raise UsageError(f"The chat template's variable {name!r} cannot be set by the caller. Leave it out.")
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"The chat template's variable {str(name)!r} is not plain JSON ({error}). Give text, numbers, true, "
                "false, null, and lists and objects of them."
            ) from error


class ChatTemplate:
    """A template and the process that renders it. The process starts with the first text and serves all later ones.

    Several threads may use it: they take turns.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., ChatTemplate] | None = None
        self._closed = 0  # how often `close` was called

    def render(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> str:
        """Render messages, up to where the assistant's answer begins.

        Args:
            messages: Each with `role` and `content`.
            variables: Further variables of the template, by name.

        Raises:
            TdaError: The template refuses the messages, fails, or exceeds its limits.
        """
        try:
            template = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise self._error(str(error)) from error
        given = json.dumps({**variables, "messages": list(messages), "add_generation_prompt": True})
        limits = {
            "memory": RENDER_MEMORY,
            "seconds": RENDER_SECONDS,
            "most_characters": MOST_FIXED_CHARACTERS + MOST_REPETITIONS * len(given),
        }
        request = json.dumps({"template": template, **limits})[:-1] + f', "variables": {given}}}\n'
        with self._lock:
            reply = self._ask(request.encode())
        if "error" in reply:
            raise self._error(reply["error"])
        return reply["text"]

    def close(self) -> None:
        """End the process, even during a rendering in another thread, which then fails. The next rendering starts a new
        one."""
        self._closed += 1
        self._stop()

    def _stop(self) -> None:
        if (end := self._end) is not None:
            end()

    def _ask(self, request: bytes) -> dict[str, str]:
        closed = self._closed
        process = self._started()
        if self._closed != closed:  # closed while the process started, when there was nothing to end
            self._stop()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(RENDER_SECONDS, stop)
        watch.daemon = True
        watch.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
            if line.endswith(b"\n"):
                reply: dict[str, str] = json.loads(line)
                return reply
        except (OSError, ValueError):  # the process is gone, and its pipes with it
            pass
        except BaseException:  # Ctrl-C: its reply would be read as the reply to the next request
            self._stop()
            raise
        finally:
            watch.cancel()
            watch.join()
        self._stop()
        reason = f"it takes more than {RENDER_SECONDS} seconds" if late.is_set() else "its process was ended"
        raise self._error(reason)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._end is not None and self._end.alive and self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        paths = os.pathsep.join(path for path in sys.path if path)
        # In its own process group, Ctrl-C on a terminal does not reach it.
        group: dict[str, Any] = (
            {"process_group": 0} if os.name == "posix" else {"creationflags": 0x200}  # CREATE_NEW_PROCESS_GROUP
        )
        try:
            process = subprocess.Popen(
                [sys.executable, "-S", "-P", template_process.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
                **group,
            )
        except (OSError, ValueError) as error:
            raise TdaError(f"The process that renders chat templates cannot be started ({error}).") from error
        self._process, self._end = process, weakref.finalize(self, _end, process)
        return process

    def _error(self, reason: str) -> TdaError:
        return TdaError(f"{self._path}: the chat template cannot be rendered ({reason}).")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):  # closing flushes what was written and never read
            pipe.close()
