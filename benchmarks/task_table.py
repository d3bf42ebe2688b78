"""Measure tasks under several methods at the same bytes, of the FFN or of all linears.

    python benchmarks/task_table.py ARTIFACT --data FOLDER [--tasks all] [--limit 500] [--methods tda griffin]
        [--priced ARTIFACT --methods dense priced teal griffin --of linears]

ARTIFACT is one of --method tda --allocation kl, that of --priced one of --method priced (which priced, teal and wina
need; TEAL has greedy densities with --densities), FOLDER what `tda-export eval-data` wrote. Every task and method is
what `tda-export eval ARTIFACT --tasks TASK --method METHOD --sparsity ASKED --json` prints (uniform: `--method tda
--allocation uniform`), zero-shot, by the strict protocol. A prompt that is shorter than those of the calibration text
reads other bytes than were asked for. So that methods are compared at the same bytes, ASKED is first sought on --pilot
questions, and the whole task is measured again where it still misses the bytes of --sparsity by more than --within.

Prints one JSON object for each task and method. --rows keeps them: an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

from rows import Row, Rows, artifact_id, file_id, print_rows
from same_bytes import Cell, at_same_bytes, require_same_bytes

from tda_export.errors import UsageError
from tda_export.evaluation.harness import TdaLM
from tda_export.evaluation.methods import Request
from tda_export.evaluation.run_tasks import ALL_TASKS, check_data, chosen_tasks, run_tasks
from tda_export.packing import Parts
from tda_export.runtime.artifact import open_artifact

ROW_METHODS = ("priced", "teal", "wina")
METHODS = ("tda", "uniform", "griffin", "dense", *ROW_METHODS)
SHARES = {"ffn": "ffn_share", "linears": "linear_share"}
KEYS = ("task", "artifact", "method", "sparsity", "limit", "within", "share", "densities")


def request(cell: Cell, densities: Path | None = None) -> Request:
    """How `tda-export eval` would be asked for a cell."""
    if cell.method == "dense":
        return Request("dense")
    if cell.method in ROW_METHODS:
        parts: Parts = "ffn" if cell.share == "ffn_share" else "all"
        own = densities if cell.method == "teal" else None
        return Request(cell.method, sparsity=cell.sparsity, parts=parts, densities=own)
    if cell.method == "griffin":
        return Request("griffin", sparsity=cell.sparsity)
    return Request("tda", sparsity=cell.sparsity, allocation="kl" if cell.method == "tda" else "uniform")


def folder_of(options: argparse.Namespace, method: str) -> Path:
    """The artifact that runs a method."""
    folder: Path | None = options.priced if method in ROW_METHODS else options.artifact
    if folder is None:
        raise UsageError(f"Method {method} needs an artifact of --method priced. Give it with --priced.")
    return folder


def measure(options: argparse.Namespace, task: str, limit: int | None, cell: Cell) -> Row:
    """Run a task for a cell."""
    folder = folder_of(options, cell.method)
    lm = TdaLM.of(folder, request(cell, options.densities), protocol="strict", provider=options.provider)
    [result] = run_tasks(lm, [task], options.data, limit).values()
    return asdict(result)


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """All rows, as they come, those that were kept among them.

    Raises:
        TdaError: At the end, where some missed their bytes.
    """
    rows = Rows(options.rows, KEYS)
    tasks = chosen_tasks(options.tasks)
    check_data(options.data, tasks)
    artifacts = {name: artifact_id(open_artifact(folder_of(options, name))) for name in options.methods}
    limit = options.limit or None
    yielded = []
    for task, method in product(tasks, options.methods):
        cell = Cell(method, None if method == "dense" else options.sparsity, SHARES[options.of])
        asked = {"task": task, "artifact": artifacts[method], "limit": limit, "within": options.within}
        asked |= cell._asdict()
        greedy = options.densities if method == "teal" else None
        asked["densities"] = None if greedy is None else file_id(greedy)
        if (row := rows.get(asked)) is None:
            pilot = at_same_bytes(cell, options.within / 2, partial(measure, options, task, options.pilot))
            whole = partial(measure, options, task, limit)
            row = rows.add(at_same_bytes(cell, options.within, whole, first=pilot["asked"]) | asked)
        yielded.append(row)
        yield row
    require_same_bytes(yielded)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure tasks under several methods at the same bytes.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tasks", nargs="+", default=[ALL_TASKS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["tda", "griffin"])
    parser.add_argument("--priced", type=Path, metavar="ARTIFACT", help="Of the same model, of --method priced.")
    parser.add_argument("--densities", type=Path, metavar="FILE", help="Of TEAL, greedy.")
    parser.add_argument("--of", choices=tuple(SHARES), default="ffn", help="Whose bytes are the same.")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--within", type=float, default=0.01, help="Share of the dense bytes.  [default: 0.01]")
    parser.add_argument("--limit", type=int, default=500, help="Questions of a task, 0 for all.  [default: 500]")
    parser.add_argument("--pilot", type=int, default=100, help="Questions for seeking.  [default: 100]")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="Keep what was measured here, and go on from it.")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(print_rows(measured(arguments())))
