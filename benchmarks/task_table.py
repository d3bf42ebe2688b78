"""Measure tasks under several methods at the same bytes, of the FFN or of all linears.

    python benchmarks/task_table.py ARTIFACT --data FOLDER [--tasks all] [--limit 500] [--methods tda griffin]
        [--priced ARTIFACT --methods dense priced teal griffin --of linears]

ARTIFACT is built with --method tda --allocation kl, that of --priced with --method priced. priced, teal and wina need
the latter; --densities are greedy densities for TEAL. FOLDER is written by `tda-export eval-data`. The figures of a
task and a method are those of `tda-export eval ARTIFACT --tasks TASK --method METHOD --sparsity ASKED --json` (uniform:
`--method tda --allocation uniform`), zero-shot, by the strict protocol. A prompt that is shorter than those of the
calibration text reads other bytes than were asked for. To compare methods at the same bytes, ASKED is first searched on
--pilot questions. The whole task is measured again if it still misses the bytes of --sparsity by more than --within.

Prints one JSON object for each task and method. --rows keeps them, so that an interrupted run resumes.
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
    """Return the request of `tda-export eval` for a cell."""
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
    """Return the artifact that runs a method."""
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
    """Yield all rows as they are measured, kept rows included.

    Raises:
        TdaError: At the end, if rows missed their bytes.
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
    parser.add_argument("--priced", type=Path, metavar="ARTIFACT", help="Priced artifact of the same model.")
    parser.add_argument("--densities", type=Path, metavar="FILE", help="Greedy densities for TEAL.")
    parser.add_argument("--of", choices=tuple(SHARES), default="ffn", help="Matrices to compare bytes of.")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--within", type=float, default=0.01, help="Fraction of dense bytes.  [default: 0.01]")
    parser.add_argument("--limit", type=int, default=500, help="Questions of a task, 0 for all.  [default: 500]")
    parser.add_argument("--pilot", type=int, default=100, help="Questions for the search.  [default: 100]")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="Keep measurements here, and resume from them.")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(print_rows(measured(arguments())))
