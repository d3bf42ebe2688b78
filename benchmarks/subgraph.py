"""Decode and prefill as `tda::Subgraph` against the same graphs node by node, on the CPU, over one weights.bin.

    chrt -f 50 python benchmarks/subgraph.py ARTIFACT [--context 8] [--price 0 --price 1e-5] [--rounds 15]
    chrt -f 50 python benchmarks/subgraph.py --shape smollm2-135m --weights int4 [--threads 4] ..

Both take turns of 16 steps in one process. With --shape an artifact of random weights is made in a temporary folder
(TMPDIR), and takes its turns with every row, 0.70 and half of the rows' bytes. Tokens of both must be equal. Prints one
JSON object for each price: median milliseconds with the smallest and the largest, and the median ratio over rounds; and
one for the prompt.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir

from tda_export.bench.priced import PricedRunner
from tda_export.bench.timing import Spread, take_turns
from tda_export.graph.derive import artifact_spec, weight_table
from tda_export.graph.priced import build_priced_decode, build_priced_prefill
from tda_export.runtime import Model, load
from tda_export.runtime.session import BETWEEN_STEPS_US, THREADS, Sessions, open_session
from tda_export.temporary import owned_folder

STEPS = 16  # of a turn
TOGETHER, APART = "subgraph", "node by node"


def apart(model: Model) -> Sessions:
    """Return sessions of the same graphs without Subgraphs, over the same weights."""
    artifact, shape, sessions = model.artifact, model.artifact.shape, copy.copy(model.sessions)
    made = (artifact_spec(artifact), weight_table(artifact), shape.dtype)
    for name, graph in (
        ("prefill", build_priced_prefill(*made, kv=shape.kv)),
        ("decode", build_priced_decode(*made, kv=shape.kv)),
    ):
        weights = sessions.weights_of(artifact, f"{name}.onnx")
        text = ir.to_proto(graph).SerializeToString()
        options: dict[str, Any] = {"prepack": True, "wait_us": BETWEEN_STEPS_US} if name == "decode" else {}
        session = open_session(artifact, text, sessions.provider, weights, native=sessions.native, **options)
        setattr(sessions, name, session)
    return sessions


@contextlib.contextmanager
def random_artifact(shape: str, weights: str) -> Iterator[tuple[Path, Mapping[str, float]]]:
    """Build an artifact, and give it with prices by name."""
    from tda_export.bench.artifact import build_random_priced
    from tda_export.bench.random_codes import random_storage
    from tda_export.bench.shapes import random_source
    from tda_export.graph.storage import read_plan

    source = random_source(shape)
    plan = None if weights == "float" else read_plan(source, weights, None, ())
    with owned_folder(Path(tempfile.gettempdir()), "tda-export-subgraph") as folder:
        storage = random_storage("float32", plan)
        _, prices = build_random_priced(source, folder / "artifact", storage, (0.3, 0.5), quiet=True)
        yield folder / "artifact", {"1.00": 0.0} | {f"{1 - share:.2f}": price for share, price in prices.items()}


def ratio(times: Mapping[str, list[float]]) -> float:
    return statistics.median(a / b for a, b in zip(times[TOGETHER], times[APART], strict=True))


def measure(model: Model, prices: Mapping[str, float], context: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Time steps at each price, and prompts; yield what is printed."""
    prompt = [3 + i * 7919 % 250 for i in range(context)]
    room = context + STEPS * (rounds + 2)
    sessions = {TOGETHER: model.sessions, APART: apart(model)}
    dense = {way: PricedRunner(model.artifact, each, room, 0.0) for way, each in sessions.items()}
    for runner in dense.values():
        runner.prefill(prompt)
    if not np.array_equal(*(runner.logits(prompt[0]) for runner in dense.values())):
        raise SystemExit("Logits after the prompt differ, so nothing is timed.")
    for name, price in prices.items():
        runners = {way: PricedRunner(model.artifact, each, room, price) for way, each in sessions.items()}
        for runner in runners.values():
            runner.prefill(prompt)
        turns = take_turns({way: partial(each.steps, STEPS) for way, each in runners.items()}, rounds + 1)
        if runners[TOGETHER].written != runners[APART].written:
            raise SystemExit(f"At {name} the tokens differ, so nothing is compared.")
        times = {way: [1e3 * seconds / STEPS for seconds in spent[1:]] for way, spent in turns.items()}
        yield {"rows": name, "context": context, **_shown(times)}
    turns = take_turns({way: partial(each.prefill, prompt) for way, each in dense.items()}, rounds + 1)
    yield {"prompt": context, **_shown({way: [1e3 * each for each in spent[1:]] for way, spent in turns.items()})}


def _shown(times: Mapping[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way, each in times.items():
        spread = Spread.of(each)
        found[way] = {"ms": spread.median, "ms_range": [spread.smallest, spread.largest]}
    return found | {"ratio": ratio(times)}


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--shape", help="Make an artifact of this shape instead.")
@click.option("--weights", default="int4", show_default=True, help="Of --shape: float, int4 or int8.")
@click.option("--context", default=8, show_default=True, help="Tokens of the prompt.")
@click.option("--price", type=float, multiple=True, default=(0.0,), show_default=True, help="Of ARTIFACT.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", type=int, help="All cores, unless given.")
def main(
    artifact: Path | None,
    shape: str | None,
    weights: str,
    context: int,
    price: tuple[float, ...],
    rounds: int,
    threads: int | None,
) -> None:
    if (artifact is None) == (shape is None):
        raise click.UsageError("Give ARTIFACT or --shape.")
    if threads:
        os.environ[THREADS] = str(threads)
    given = contextlib.nullcontext((artifact, {f"price {each:g}": each for each in price}))
    with given if shape is None else random_artifact(shape, weights) as (folder, prices):
        for line in measure(load(folder, provider="cpu"), prices, context, rounds):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
