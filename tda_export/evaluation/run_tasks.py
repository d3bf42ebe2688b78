"""Run tasks of lm-evaluation-harness from a local folder of data: on an artifact, and on transformers for
comparison."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.harness import TdaLM
from tda_export.evaluation.text import linear_bytes
from tda_export.models.source import ModelSource

TASKS_FOLDER = Path(__file__).parent / "tasks"
TASK_NAMES = tuple(sorted(path.stem for path in TASKS_FOLDER.glob("*.yaml")))
ALL_TASKS = "all"
REFERENCE_BATCH = 8


@dataclass(frozen=True)
class Metric:
    """A mean over a task's questions, and its standard error."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """One task's results: number of questions, metrics by name, seconds, and (for artifacts) the mean shares of the
    FFN's bytes, of the layers' linears' and of the head's that a scored token read."""

    questions: int
    metrics: dict[str, Metric]
    seconds: float
    ffn_share: float | None
    linear_share: float | None
    head_share: float | None = None


def chosen_tasks(names: Sequence[str]) -> list[str]:
    """Check task names; `all` stands for every task.

    Raises:
        UsageError: A name is unknown, or none is given.
    """
    if ALL_TASKS in names:
        return list(TASK_NAMES)
    unknown = [name for name in names if name not in TASK_NAMES]
    if unknown or not names:
        problem = f"Task {unknown[0]!r} is not known" if unknown else "No task is named"
        raise UsageError(f"{problem}. Use {', '.join(TASK_NAMES)}, or {ALL_TASKS}.")
    return list(dict.fromkeys(names))


def check_data(folder: Path, tasks: Sequence[str]) -> None:
    """Require the data of every task.

    Raises:
        TdaError: A task's file is missing.
    """
    for task in tasks:
        path = folder / f"{task}.jsonl"
        if not path.is_file():
            raise TdaError(f"{path}: no such file. Write the folder with 'tda-export eval-data FOLDER'.")


def run_tasks(
    lm: LM,
    tasks: Sequence[str],
    data: Path,
    limit: int | None = None,
    *,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, TaskResult]:
    """Run tasks one after another.

    Args:
        lm: A model of the harness.
        tasks: Names from `TASK_NAMES`.
        data: The folder that `eval-data` wrote.
        limit: The most questions of a task; the first ones are used.
        notify: Called at each task's start and with its results.

    Raises:
        TdaError: A task's data are missing, or the model fails.
    """
    check_data(data, tasks)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every task that reads its own data
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"data": str(data)})
    results = {}
    for number, task in enumerate(tasks, 1):
        notify(f"{task} ({number} of {len(tasks)})")
        began = time.monotonic()
        # Not simple_evaluate, which also describes the machine with a dozen other programs; that takes seconds.
        found = evaluate(lm, manager.load([task]), limit=limit, log_samples=False, bootstrap_iters=1)
        ffn, linears, head = _shares(lm)
        results[task] = TaskResult(
            questions=int(found["n-samples"][task]["effective"]),
            metrics=_metrics(found["results"][task]),
            seconds=time.monotonic() - began,
            ffn_share=ffn,
            linear_share=linears,
            head_share=head,
        )
        means = ", ".join(f"{name} {metric.value:.4f}" for name, metric in results[task].metrics.items())
        notify(f"{task}: {means} ({results[task].seconds:.0f} s)")  # printed now, in case a long run is ended later
    return results


def _shares(lm: LM) -> tuple[float | None, float | None, float | None]:
    """Return the shares of FFN, of the layers' linears and of the head that a scored token read; None for a model that
    does not count."""
    shares = lm.scorer.take_shares() if isinstance(lm, TdaLM) else None
    if shares is None:
        return None, None, None
    dense = lm.artifact.linear_bytes
    return shares[0], linear_bytes(*shares[:2], lm.artifact.dense_ffn_bytes, dense) / dense, shares[2]


def reference_model(source: ModelSource, *, dtype: str, device: str) -> LM:
    """Load a model in transformers as lm-eval's own `hf` model.

    Args:
        source: The model that the artifact was built from.
        dtype: `float32`, `float16` or `bfloat16`.
        device: `cpu` or `cuda`.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about a model that is already loaded
    model = source.reference(dtype=getattr(torch, dtype), device=device)
    return HFLM(pretrained=model, tokenizer=source.tokenizer, batch_size=REFERENCE_BATCH)


def _metrics(found: dict[str, Any]) -> dict[str, Metric]:
    """Read lm-eval's flat results (`acc,none`, `acc_stderr,none`), and turn mean log-likelihoods into perplexities."""
    metrics = {}
    for key, value in found.items():
        name, _, filtered = key.partition(",")
        if filtered and not name.endswith("_stderr"):
            error = found.get(f"{name}_stderr,{filtered}")
            metrics[name] = Metric(float(value), float(error) if isinstance(error, int | float) else None)
    for name, derived, nats in (("nll", "perplexity", 1.0), ("bits_per_byte", "byte_perplexity", math.log(2))):
        if name in metrics:
            mean = metrics[name]
            value = math.exp(mean.value * nats)  # standard error by the delta method
            metrics[derived] = Metric(value, None if mean.stderr is None else value * nats * mean.stderr)
    return metrics
