"""Tasks from a local folder: their prompts, metrics and failures."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tda_export.errors import TdaError, UsageError
from tda_export.evaluation.eval_data import TASKS
from tda_export.evaluation.harness import TdaLM
from tda_export.evaluation.run_tasks import (
    TASK_NAMES,
    TASKS_FOLDER,
    Metric,
    check_data,
    chosen_tasks,
    reference_model,
    run_tasks,
)
from tda_export.evaluation.tasks import offline
from tda_export.models.source import ModelSource

ROWS: dict[str, dict[str, Any]] = {
    "hellaswag": {"query": "Roof: A man sits. He", "choices": ["sings.", "falls.", "eats.", "runs."], "label": 1},
    "piqa": {"goal": "Boil water", "sol1": "Use a pot.", "sol2": "Use a hat.", "label": 0},
    "copa": {"premise": "It rained.", "choice1": "The street dried.", "choice2": "The Sea rose.", "question": "effect"}
    | {"label": 1},
    "arc_challenge": {"query": "Question: Why?\nAnswer:", "choices": ["So.", "No."], "label": 0},
    "boolq": {"query": "Tax -- A tax.\nQuestion: is it?\nAnswer:", "label": 1},
    "winogrande": {
        "sentence": "Sarah met Maria so _ left early.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "2",
    },
    "lambada_openai": {"query": "I don't care about", "answer": "signs"},
    "mmlu": {"question": " Which? ", "subject": "high_school_biology", "choices": list("wxyz"), "answer": 3},
    "gsm8k": {"question": "How many?", "answer": "1 + 1 = 2. So the answer is 2."},
    "coqa": {"story": "A cat.", "before": [{"question": "Who?", "answer": "a cat"}], "question": "What?"}
    | {"answer": "fur"},
    "qasper": {"title": "T", "abstract": "A", "evidence": "E", "question": "Do they?", "label": 1},
}
PROMPTS: dict[str, list[tuple[str, str]]] = {
    "hellaswag": [("Roof: A man sits. He", f" {choice}") for choice in ("sings.", "falls.", "eats.", "runs.")],
    "piqa": [("Question: Boil water\nAnswer:", " Use a pot."), ("Question: Boil water\nAnswer:", " Use a hat.")],
    # The harness's own prompt has two spaces.
    "copa": [("It rained therefore", "  the street dried."), ("It rained therefore", "  the Sea rose.")],
    "arc_challenge": [("Question: Why?\nAnswer:", " So."), ("Question: Why?\nAnswer:", " No.")],
    "boolq": [("Tax -- A tax.\nQuestion: is it?\nAnswer:", f" {answer}") for answer in ("no", "yes")],
    "winogrande": [("Sarah met Maria so Sarah", " left early."), ("Sarah met Maria so Maria", " left early.")],
    "lambada_openai": [("I don't care about", " signs")],
    "mmlu": [
        (
            "The following are multiple choice questions (with answers) about high school biology.\n\n"
            "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
            f" {letter}",
        )
        for letter in "ABCD"
    ],
    "gsm8k": [("Question: How many?\nAnswer:", " 1 + 1 = 2. So the answer is 2.")],
    "coqa": [("A cat.\n\nQ: Who?\n\nA: a cat\n\nQ: What?\n\nA:", " fur")],
    "qasper": [("TITLE: T\nABSTRACT: A\n\nE\n\nQ: Do they?\n\nA:", f" {answer}") for answer in ("no", "yes")],
}
RIGHT = {"hellaswag": 1, "piqa": 0, "copa": 1, "arc_challenge": 0, "boolq": 1, "winogrande": 1, "mmlu": 3, "qasper": 1}


def write_data(folder: Path, rows: int = 3) -> Path:
    """Write a few equal rows of every task, since the tiny model knows no answers."""
    folder.mkdir(exist_ok=True)
    for task, row in ROWS.items():
        (folder / f"{task}.jsonl").write_text(f"{json.dumps(row)}\n" * rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def lm(tiny_artifact: Path) -> TdaLM:
    return TdaLM(str(tiny_artifact), method="dense", provider="cpu")


def test_each_task_file_has_its_data() -> None:
    assert set(TASK_NAMES) == set(TASKS) == set(ROWS) == set(PROMPTS)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_prompts(data: Path, task: str) -> None:
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=False, metadata={"data": str(data)})
    loaded = manager.load([task])["tasks"][task]
    loaded.build_all_requests(limit=1)
    assert [instance.args for instance in loaded.instances] == PROMPTS[task]


def test_results_are_those_of_transformers(data: Path, lm: TdaLM, source: ModelSource) -> None:
    found = run_tasks(lm, TASK_NAMES, data)
    expected = run_tasks(reference_model(source, dtype="float32", device="cpu"), TASK_NAMES, data)
    for task in TASK_NAMES:
        assert (found[task].questions, expected[task].questions) == (3, 3)
        assert found[task].metrics.keys() == expected[task].metrics.keys() != set()
        for name, metric in found[task].metrics.items():
            assert metric.value == pytest.approx(expected[task].metrics[name].value, rel=1e-3)
        assert expected[task].ffn_share is None


def test_the_right_answer_is_the_likeliest(data: Path, lm: TdaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the answers is always right, and its bits are 0 if it is certain."""
    right = {PROMPTS[task][index] for task, index in RIGHT.items()}

    def sure(requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        texts = {(context.strip(), continuation) for context, continuation in right}
        return [(0.0, True) if (r.args[0].strip(), r.args[1]) in texts else (-9.0, False) for r in requests]

    monkeypatch.setattr(lm, "loglikelihood", sure)
    found = run_tasks(lm, list(RIGHT), data)
    for task in RIGHT:
        assert found[task].metrics["acc"] == Metric(1.0, 0.0), task
    assert found["qasper"].metrics["bits_per_byte"].value == 0.0


def test_limit_and_ffn_share(data: Path, tiny_artifact: Path) -> None:
    sparse = TdaLM(str(tiny_artifact), sparsity=0.5, provider="cpu")
    said: list[str] = []
    found = run_tasks(sparse, ["piqa", "gsm8k"], data, limit=2, notify=said.append)
    assert [line.split(":")[0] for line in said] == ["piqa (1 of 2)", "piqa", "gsm8k (2 of 2)", "gsm8k"]
    assert "acc 0." in said[1] or "acc 1." in said[1]
    assert [found[task].questions for task in found] == [2, 2]
    for result in found.values():
        assert result.ffn_share is not None
        assert 0.0 < result.ffn_share < 1.0
        assert result.linear_share is not None
        assert result.ffn_share < result.linear_share < 1.0  # all rows of attention are read


def test_no_other_program_runs(data: Path, lm: TdaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's `simple_evaluate` runs a dozen, to describe the machine, and ignores their failures."""
    started: list[Any] = []

    def start(self: Any, *command: Any, **options: Any) -> None:
        started.append(command)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setattr(subprocess.Popen, "__del__", lambda self: None)
    assert run_tasks(lm, ["piqa"], data, limit=1)["piqa"].questions == 1
    assert started == []


def test_gold_likelihoods_by_hand() -> None:
    doc = {"answer": "élan"}  # six bytes with its space
    assert offline.gold_answer(doc, [(-12.0, False)]) == {
        "acc": 0.0,
        "bits_per_byte": pytest.approx(12.0 / 6 / math.log(2)),
    }
    assert offline.lambada(doc, [(-2.0, True)]) == {"acc": 1.0, "nll": 2.0}
    choice = offline.gold_choice({"label": 0}, [(-3.0, False), (-1.0, True)])
    assert choice == {"acc": 0.0, "bits_per_byte": pytest.approx(3.0 / 3 / math.log(2))}


def test_perplexity_and_standard_errors_are_over_questions(
    data: Path, lm: TdaLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [1.0, 2.0, 4.0]
    monkeypatch.setattr(lm, "loglikelihood", lambda requests, **options: [(-loss, False) for loss in losses])
    metrics = run_tasks(lm, ["lambada_openai"], data)["lambada_openai"].metrics
    mean, error = statistics.mean(losses), statistics.stdev(losses) / math.sqrt(3)
    assert metrics["nll"].value == pytest.approx(mean)
    assert metrics["nll"].stderr == pytest.approx(error)
    assert metrics["perplexity"].value == pytest.approx(math.exp(mean))
    assert metrics["perplexity"].stderr == pytest.approx(math.exp(mean) * error)
    per_byte = run_tasks(lm, ["gsm8k"], data)["gsm8k"].metrics
    bits = per_byte["bits_per_byte"].value
    assert per_byte["byte_perplexity"].value == pytest.approx(2.0**bits)


def test_names() -> None:
    assert chosen_tasks(["all"]) == list(TASK_NAMES)
    assert chosen_tasks(["piqa", "copa", "piqa"]) == ["piqa", "copa"]
    with pytest.raises(UsageError, match=r"^Task 'pica' is not known\. Use arc_challenge, .*, or all\.$"):
        chosen_tasks(["piqa", "pica"])
    with pytest.raises(UsageError, match=r"^No task is named\. Use arc_challenge, "):
        chosen_tasks([])


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(
        TdaError, match=r"piqa\.jsonl: no such file\. Write the folder with 'tda-export eval-data FOLDER'"
    ):
        check_data(tmp_path, ["piqa"])
    with pytest.raises(
        TdaError, match=r"piqa\.jsonl: no such file\. Write the folder with 'tda-export eval-data FOLDER'"
    ):
        offline.load("piqa", str(tmp_path))


def test_folder_from_the_environment(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(offline.DATA_VARIABLE, raising=False)
    with pytest.raises(TdaError, match=r"^No folder with the data of piqa is named\. Give --data FOLDER \(or set "):
        offline.load("piqa")
    monkeypatch.setenv(offline.DATA_VARIABLE, str(data))
    assert len(offline.load("piqa", version=1.0)["test"]) == 3


def test_reference_is_lm_evals_own_model(source: ModelSource) -> None:
    assert isinstance(reference_model(source, dtype="float32", device="cpu"), HFLM)
