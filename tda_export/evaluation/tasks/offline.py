"""Functions for the task files in this folder. lm-eval loads this file by its path, not as part of the package."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import datasets

from tda_export.errors import TdaError

DATA_VARIABLE = "TDA_EXPORT_EVAL_DATA"
Doc = dict[str, Any]
Result = tuple[float, bool]  # log-likelihood in nats, and whether each token was the likeliest


def load(name: str, data: str | None = None, **others: Any) -> dict[str, datasets.Dataset]:
    """Read a task's rows from the folder that `tda-export eval-data` wrote.

    Args:
        name: The task.
        data: The folder (lm-eval's metadata); by default the environment's `TDA_EXPORT_EVAL_DATA`.
        others: Further metadata, which is ignored.

    Raises:
        TdaError: No folder is given, or the task's file is missing.
    """
    folder = data or os.environ.get(DATA_VARIABLE)
    if not folder:
        raise TdaError(
            f"No folder with the data of {name} is named. Give --data FOLDER (or set {DATA_VARIABLE}), which "
            "'tda-export eval-data FOLDER' writes."
        )
    path = Path(folder) / f"{name}.jsonl"
    if not path.is_file():
        raise TdaError(f"{path}: no such file. Write the folder with 'tda-export eval-data FOLDER'.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {"test": datasets.Dataset.from_list(rows)}


def winogrande_text(doc: Doc) -> int:
    """Return which choice is right: WinoGrande scores one ending after each of two beginnings."""
    return int(doc["answer"]) - 1


def winogrande_target(doc: Doc) -> str:
    """Return the text after the blank."""
    return str(doc["sentence"].partition("_")[2]).strip()


def winogrande_choices(doc: Doc) -> list[str]:
    """Return the text up to the blank, with each option filled in."""
    before = doc["sentence"].partition("_")[0]
    return [before + doc["option1"], before + doc["option2"]]


def lambada(doc: Doc, results: list[Result]) -> dict[str, float]:
    """Return the accuracy of the last word, and its negative log-likelihood in nats, which becomes perplexity."""
    ((loglikelihood, greedy),) = results
    return {"acc": float(greedy), "nll": -loglikelihood}


def gold_answer(doc: Doc, results: list[Result]) -> dict[str, float]:
    """Return the bits per byte of the gold answer, and whether greedy decoding would produce it."""
    ((loglikelihood, greedy),) = results
    return {"acc": float(greedy), "bits_per_byte": _bits_per_byte(loglikelihood, f" {doc['answer']}")}


def gold_choice(doc: Doc, results: list[Result]) -> dict[str, float]:
    """Return the accuracy among the choices no and yes, and the bits per byte of the right one."""
    likelihoods = [loglikelihood for loglikelihood, _ in results]
    right = doc["label"]
    return {
        "acc": float(max(range(len(likelihoods)), key=likelihoods.__getitem__) == right),
        "bits_per_byte": _bits_per_byte(likelihoods[right], (" no", " yes")[right]),
    }


def _bits_per_byte(loglikelihood: float, text: str) -> float:
    return -loglikelihood / len(text.encode()) / math.log(2)
