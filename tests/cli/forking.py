"""Run commands in forks of a process that has imported everything, so that each costs no start of its own.

Arguments: the commands to run first, as JSON lists; what they import stays. They start no threads that a fork would
need. Then each line of standard input is a JSON list of arguments and the seconds after which to kill, or null. The
answer is the exit code (negative: a signal), a line.
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
            os.kill(child, signal.SIGKILL)  # nobody else can have its number before it was waited for
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def run(arguments: list[str]) -> None:
    """Run one command and end the process."""
    sys.argv = ["tda-export", *arguments]
    try:
        main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)  # main ends by SystemExit, or something is wrong


if __name__ == "__main__":
    serve([json.loads(argument) for argument in sys.argv[1:]])
