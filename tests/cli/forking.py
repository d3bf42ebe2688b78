"""Run commands in forks of a process that has imported all packages, so that a command starts at once.

Arguments: commands to run first, as JSON lists, for their imports. They must not start threads, which forks do not
have. Then each line of standard input is a JSON list: arguments, and the seconds after which to kill, or null. The
answer is a line with the exit code (negative for a signal).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

import tda_export.graph.verify  # noqa: F401 - for the forks
from tda_export.cli.main import cli, main


def serve(first: list[list[str]]) -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)  # threads do not survive a fork
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for arguments in first:
        cli(arguments, standalone_mode=False)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        arguments, seconds = json.loads(line)
        child = os.fork()
        if not child:
            run(arguments)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # its number cannot be reused before it was waited for
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def run(arguments: list[str]) -> None:
    """Run one command and end the process."""
    sys.argv = ["tda-export", *arguments]
    try:
        main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)  # main must end by SystemExit


if __name__ == "__main__":
    serve([json.loads(argument) for argument in sys.argv[1:]])
