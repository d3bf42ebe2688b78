"""The process that renders chat templates: a separate program, which `chat_template.py` starts by its path.

A template comes with a model, so it is an untrusted program. Jinja's sandbox keeps it from files and from the rest of
Python, but cannot stop it from running for ever or filling the memory: `a ~ a` forty times is enough. A process can be
limited in both, and ended.

Requests and replies are lines of JSON in ASCII, on standard input and output. Only Jinja and the standard library are
imported here, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; when generating, only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


@functools.lru_cache(maxsize=1)
def compiled(source: str) -> Template:
    """Compile a template for the sandbox, with the functions that transformers gives templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], most_characters: int) -> str:
    """Render a template.

    Raises:
        OverflowError: The text is longer than `most_characters`.
        Exception: Any, since a template is a program.
    """
    pieces, length = list[str](), 0
    for piece in compiled(source).generate(variables):
        length += len(piece)
        if length > most_characters:
            raise OverflowError(f"it writes more than {most_characters} characters")
        pieces.append(piece)
    return "".join(pieces)


def limit(memory: int, seconds: int) -> None:
    """Limit this process to `memory` bytes, and to `seconds` of processor time from now on, where the system can.

    The parent process watches the time as well, but may have been killed.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows, or a system without such limits
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime) + 1
        for kind, most in ((resource.RLIMIT_CPU, used + seconds), (resource.RLIMIT_AS, memory)):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Return the reply to a request: `text`, or the `error` instead."""
    limit(request["memory"], request["seconds"])
    try:
        return {"text": render(request["template"], request["variables"], request["most_characters"])}
    except MemoryError:
        return {"error": f"it needs more than {request['memory'] >> 20} MiB of memory"}
    except Exception as error:
        return {"error": " ".join(str(error)[:1000].split()) or type(error).__name__}


def main() -> None:
    """Answer request lines until there are no more."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
