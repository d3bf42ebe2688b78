"""Weights, keys and values on huge pages against the mapped file and small pages: milliseconds of a step on the CPU.

    chrt -f 50 python benchmarks/huge_pages.py ARTIFACT [--context 8] [--sparsity 0 --sparsity 0.5] [--price 1e-5]

Each way has its process, since in one process each would drive the other's pages from what the processor keeps of them.
They answer in turns, over one weights.bin. The first steps of an answer are not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from tda_export.runtime import Model, load
from tda_export.runtime.huge_pages import SWITCH
from tda_export.runtime.memory import PromptMemory

WAYS = {"mapped file": "0", "huge pages": "1"}
STEPS, WARM = 60, 20
SERVE = "--serve"


def serve(artifact: str) -> None:
    """Time an answer for each line of standard input; print its milliseconds."""
    model = load(artifact, provider="cpu")
    memory = model.memory()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(timed(model, order["context"], order["budget"], memory)), flush=True)


def timed(model: Model, context: int, budget: dict[str, float], memory: PromptMemory) -> tuple[float, float]:
    """Return the milliseconds of a prompt with the first token, and of a step."""
    memory.forget()
    prompt = [3 + i * 7919 % 250 for i in range(context)]
    deployment = model.at(**budget) if budget else None
    answer = iter(
        model.generate(prompt, max_new_tokens=STEPS + 1, ignore_eos=True, deployment=deployment, memory=memory)
    )
    start = time.perf_counter()
    next(answer)
    first = time.perf_counter() - start
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        next(answer)
        times.append(time.perf_counter() - start)
    return 1e3 * first, 1e3 * statistics.median(times[WARM:])


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--context", default=8, show_default=True, help="Tokens of the prompt.")
@click.option("--rounds", default=30, show_default=True, help="Answers of each way.")
@click.option("--sparsity", type=float, multiple=True, help="Of a priced artifact; its own default unless given.")
@click.option("--price", type=float, multiple=True, help="The same, for an artifact without a table of prices.")
def main(artifact: Path, context: int, rounds: int, sparsity: tuple[float, ...], price: tuple[float, ...]) -> None:
    processes = {}
    for way, switch in WAYS.items():
        command = [sys.executable, __file__, SERVE, str(artifact)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes[way] = subprocess.Popen(command, env=os.environ | {SWITCH: switch}, **pipes)
    for budget in [*({"sparsity": share} for share in sparsity), *({"price": one} for one in price)] or [{}]:
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(rounds + 1):
            for way in WAYS if number % 2 else reversed(WAYS):
                print(json.dumps({"context": context, "budget": budget}), file=processes[way].stdin, flush=True)
                times[way].append(json.loads(processes[way].stdout.readline()))
        for kind, name in enumerate(("prompt and first token", "step")):
            mapped, huge = ([one[kind] for one in times[way][1:]] for way in WAYS)
            ratio = statistics.median(b / a for a, b in zip(mapped, huge, strict=True))
            print(
                f"context {context}, {budget or 'default'}, {name}: mapped file {statistics.median(mapped):.2f} ms, "
                f"huge pages {statistics.median(huge):.2f} ms; {ratio:.3f} times the time (median over rounds)",
                flush=True,
            )
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2])
    else:
        main()
