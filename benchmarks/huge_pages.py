"""Weights, keys and values on huge pages against the mapped file and small pages: milliseconds of a step on the CPU.

    chrt -f 50 python benchmarks/huge_pages.py ARTIFACT [--context 8] [--sparsity 0 --sparsity 0.5]

Both ways run in this process over one weights.bin. Generations take turns of TURN steps; the first IDLE of a turn are
not counted, since the threads of the other one may still wait busily.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import click

from tda_export.bench.timing import Spread
from tda_export.runtime import Model, load
from tda_export.runtime.huge_pages import SWITCH

TURN, IDLE = 12, 4
WAYS = ("mapped file", "huge pages")


def open_both(artifact: Path) -> dict[str, Model]:
    """Open the artifact in both ways."""
    models = {}
    for way in WAYS:
        os.environ[SWITCH] = "0" if way == "mapped file" else "1"
        models[way] = load(artifact, provider="cpu")
    return models


def tokens(model: Model, way: str, context: int, rounds: int, sparsity: float | None) -> Iterator[int]:
    """Begin an answer after `context` tokens; None for the artifact's own default."""
    os.environ[SWITCH] = "0" if way == "mapped file" else "1"
    prompt = [3 + i * 7 % 250 for i in range(context)]
    deployment = None if sparsity is None else model.at(sparsity=sparsity)
    answer = iter(model.generate(prompt, max_new_tokens=rounds * TURN + 1, ignore_eos=True, deployment=deployment))
    next(answer)
    return answer


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--context", default=8, show_default=True, help="Tokens of the prompt.")
@click.option("--rounds", default=60, show_default=True, help="Turns of each way.")
@click.option("--sparsity", type=float, multiple=True, help="Of a priced artifact; its own default unless given.")
def main(artifact: Path, context: int, rounds: int, sparsity: tuple[float, ...]) -> None:
    models = open_both(artifact)
    for share in sparsity or (None,):
        answers = {way: tokens(models[way], way, context, rounds, share) for way in WAYS}
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(rounds):
            for way in WAYS if turn % 2 else reversed(WAYS):
                for step in range(TURN):
                    start = time.perf_counter()
                    next(answers[way])
                    if step >= IDLE:
                        times[way].append(1e3 * (time.perf_counter() - start))
        spreads = {way: Spread.of(times[way]) for way in WAYS}
        shown = ", ".join(f"{way} {spreads[way].median:.2f} ms" for way in WAYS)
        ratio = spreads[WAYS[1]].median / spreads[WAYS[0]].median
        print(f"context {context}, sparsity {share}: {shown}: {ratio:.3f} times the time", flush=True)


if __name__ == "__main__":
    main()
