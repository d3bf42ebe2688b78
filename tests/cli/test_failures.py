"""A failure half-way (a full disk, Ctrl-C, a check) leaves nothing behind, and existing files as they were."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors import SafetensorError
from safetensors.torch import save_file

from tda_export.errors import TdaError
from tests.cli.conftest import FAILURE, INTERRUPTED, assert_error, assert_error_text, build, listing
from tests.conftest import CALIBRATE_TINY, run_cli, run_ok

SMALL_FILES = 100_000  # bytes: less than the weights and the calibration of the tiny model
LONG_CALIBRATION = 4000  # sequences of 48 tokens: some ten seconds


# A full disk


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(plan: object, path: Path, *arguments: object) -> None:
    """Replace write_weights, on a disk that fills up."""
    path.write_bytes(bytes(1000))
    full_disk()


def test_disk_full_while_building(
    outputs: Path, tiny_model: Path, tiny_calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tda_export.graph.export.write_weights", half_written)
    result = build(tiny_model, tiny_calibration, outputs / "x")
    text = "x: could not be written (No space left on device). Nothing was left behind. Free some space, or choose"
    assert_error(result, FAILURE, text)


def test_disk_full_while_replacing(
    tiny_model: Path, tiny_calibration: Path, artifact_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(artifact_copy.parent)
    monkeypatch.setattr("tda_export.graph.export.write_weights", half_written)
    result = build(tiny_model, tiny_calibration, artifact_copy, "--overwrite")
    assert_error(result, FAILURE, "No space left on device")
    assert listing(artifact_copy.parent) == before


def test_disk_full_while_writing_the_tokenizer(
    outputs: Path, tiny_model: Path, tiny_calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizers raises a bare Exception. The text is that of `Tokenizer.save("/dev/full")`."""

    def refuse(*arguments: object, **options: object) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
    result = build(tiny_model, tiny_calibration, outputs / "x")
    assert_error(result, FAILURE, "No space left on device")


def test_disk_known_to_be_too_small(
    outputs: Path, tiny_model: Path, tiny_calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(outputs)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = "the weights take 1 MiB and the disk has 0 MiB free. Free some space, or choose another output."
    assert_error(build(tiny_model, tiny_calibration, outputs / "x"), FAILURE, text)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start `tda-export` in a process of its own."""
    command = [sys.executable, "-m", "tda_export", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def heed_interrupts() -> None:
    """Restore SIGINT, which a test run in the background of a shell ignores, as would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def limit_files() -> None:
    """Let writing past SMALL_FILES fail, as on a full disk, instead of ending the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES, SMALL_FILES))


@pytest.mark.parametrize(
    ("command", "more", "name"),
    [("calibrate", ["--curves-only"], "x.partial"), ("calibrate", [], "x.partial"), ("build", [], "x")],
    ids=["curves", "path", "build"],
)
def test_files_that_really_cannot_be_written(
    command: str, more: list[str], name: str, outputs: Path, tiny_model: Path, tiny_calibration: Path
) -> None:
    options = [
        *{"calibrate": CALIBRATE_TINY, "build": ["--method", "tda", "--calibration", tiny_calibration]}[command],
        *more,
    ]
    process = start(command, tiny_model, "-o", outputs / "x", *options, preexec_fn=limit_files)
    _, stderr = process.communicate(timeout=120)
    assert_error_text(stderr, process.returncode, FAILURE, f"{name}: could not be written", "File too large")


@pytest.mark.parametrize("earlier", [False, True], ids=["nothing saved", "something saved"])
def test_disk_full_while_calibrating(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """Saved work stays, and the next run, with free space, resumes from it."""
    saves = 0

    def save_once(*arguments: Any, **options: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > earlier:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(*arguments, **options)

    arguments = ("calibrate", tiny_model, *CALIBRATE_TINY, "-o")
    with monkeypatch.context() as patch:
        patch.setattr("tda_export.calibration.resume.save_file", save_once)
        result = run_cli(*arguments, tmp_path / "x")
    if earlier:
        texts = [
            "The earlier one is as it was. Free some space, or",
            "Start it again to resume from",
            "x.partial",
        ]
    else:
        texts = ["Nothing was left behind. Free some space, or", "The calibration has stopped.\n"]
    assert_error(result, FAILURE, "x.partial: could not be written (No space left on device).", *texts)
    assert [path.name for path in tmp_path.iterdir()] == (["x.partial"] if earlier else [])
    for name in "xy":
        run_ok(*arguments, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


# Other refusals of the operating system, and too little memory


def refuse_with(error: BaseException) -> Callable[..., None]:
    def refuse(*arguments: object, **options: object) -> None:
        raise error

    return refuse


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), "/some/file: Permission denied."),
        (OSError(errno.EIO, "Input/output error"), "Input or output: Input/output error."),
        (OSError("a library's own words"), "Input or output: a library's own words."),
    ],
    ids=["file", "no file", "no number"],
)
@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("calibrate", "tda_export.models.source.resolve_model"),
        ("build", "tda_export.graph.requests.read_calibration"),
        ("generate", "tda_export.runtime.open_artifact"),
        ("verify", "tda_export.graph.verify.open_artifact"),
    ],
)
def test_unreadable_input(
    command: str,
    step: str,
    error: OSError,
    text: str,
    outputs: Path,
    tiny_model: Path,
    tiny_artifact: Path,
    tiny_calibration: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An unexpected failure gives no traceback either."""
    monkeypatch.setattr(step, refuse_with(error))
    arguments = {
        "calibrate": [tiny_model, "-o", outputs / "x"],
        "build": [tiny_model, "-o", outputs / "x", "--method", "tda", "--calibration", tiny_calibration],
        "generate": [tiny_artifact, "Hi"],
        "verify": [tiny_artifact],
    }[command]
    message = assert_error(run_cli(command, *arguments), FAILURE, text)
    assert message == f"{text}\n"


def test_a_name_that_no_file_can_have(outputs: Path) -> None:
    name = "x" * 300
    assert_error(run_cli("generate", name, "Hi"), FAILURE, f"{name}/manifest.json: File name too long.")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")])
@pytest.mark.parametrize("command", ["calibrate", "build", "generate"])
def test_out_of_memory(
    command: str,
    error: Exception,
    outputs: Path,
    tiny_model: Path,
    tiny_artifact: Path,
    tiny_calibration: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = {
        "calibrate": "tda_export.calibration.run.accumulate_curves",
        "build": "tda_export.graph.comparison.Comparison.run",
        "generate": "tda_export.runtime.token_step.KvCache",
    }
    monkeypatch.setattr(steps[command], refuse_with(error))
    arguments = {
        "calibrate": [tiny_model, "-o", outputs / "x", *CALIBRATE_TINY],
        "build": [tiny_model, "-o", outputs / "x", "--method", "tda", "--calibration", tiny_calibration],
        "generate": [tiny_artifact, "Hi"],
    }[command]
    assert_error(run_cli(command, *arguments), FAILURE, "Out of memory. Use --provider cpu or --device cpu")


def test_an_array_that_no_memory_holds(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's MemoryError is its own class."""
    monkeypatch.setattr("tda_export.runtime.kv_cache.empty_tensors", lambda *arguments: np.zeros(10**16))
    assert_error(run_cli("generate", tiny_artifact, "Hi"), FAILURE, "No memory for keys and values of")


def test_a_bug_is_not_hidden(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tda_export.runtime.open_artifact", refuse_with(ZeroDivisionError("a bug")))
    assert isinstance(run_cli("generate", tiny_artifact, "Hi").exception, ZeroDivisionError)


# Ctrl-C


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def interrupted_writing(plan: object, path: Path, *arguments: object) -> None:
    """Replace write_weights: Ctrl-C comes half-way."""
    path.write_bytes(bytes(1000))
    raise KeyboardInterrupt


def assert_interrupted(result: Result) -> None:
    assert result.exit_code == INTERRUPTED, result.output
    assert result.stderr.endswith("Interrupted.\n")
    assert result.stderr.count("Interrupted") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "step",
    [
        "tda_export.calibration.corpus.load_corpus",
        "tda_export.models.source.ModelSource.reference",
        "tda_export.calibration.run.accumulate_curves",
        "tda_export.calibration.resume.save_file",
    ],
)
def test_interrupted_calibration(outputs: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(step, interrupt)
    assert_interrupted(run_cli("calibrate", tiny_model, "-o", outputs / "x", *CALIBRATE_TINY))


@pytest.mark.parametrize(
    ("step", "more"),
    [
        ("tda_export.calibration.run.find_path", []),
        ("tda_export.calibration.file.save_file", []),
        ("tda_export.calibration.file.save_file", ["--curves-only"]),
    ],
    ids=["path", "writing", "writing curves"],
)
def test_interrupted_calibration_goes_on(tmp_path: Path, tiny_model: Path, step: str, more: list[str]) -> None:
    """It leaves only the partial file, which the next run uses and removes."""
    arguments = ("calibrate", tiny_model, *CALIBRATE_TINY, *more, "-o")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, interrupt)
        assert_interrupted(run_cli(*arguments, tmp_path / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tda_export.calibration.run.accumulate_curves", interrupt)  # not needed again
        run_ok(*arguments, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    run_ok(*arguments, tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize(
    ("step", "stand_in"),
    [
        ("tda_export.graph.export.write_weights", interrupted_writing),
        ("tda_export.graph.indexed.build_decode", interrupt),
        ("tda_export.graph.verify.sha256", interrupt),
        ("tda_export.graph.comparison.Comparison.run", interrupt),
    ],
)
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_interrupted_build(
    tiny_model: Path,
    tiny_calibration: Path,
    artifact_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    stand_in: Callable[..., None],
    replacing: bool,
) -> None:
    output = artifact_copy if replacing else artifact_copy.parent / "x"
    before = listing(artifact_copy.parent)
    monkeypatch.setattr(step, stand_in)
    assert_interrupted(build(tiny_model, tiny_calibration, output, "--overwrite"))
    assert listing(artifact_copy.parent) == before


@pytest.mark.parametrize("step", ["verify.sha256", "parity.Comparison.run"])
def test_interrupted_verification(artifact_copy: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = listing(artifact_copy.parent)
    monkeypatch.setattr(f"tda_export.graph.{step}", interrupt)
    assert_interrupted(run_cli("verify", artifact_copy))
    assert listing(artifact_copy.parent) == before


@pytest.mark.parametrize("step", ["Sessions.__init__", "Call.run"])
def test_interrupted_generation(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(f"tda_export.runtime.session.{step}", interrupt)
    assert_interrupted(run_cli("generate", tiny_artifact, "Hi"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_signal_while_calibrating(
    outputs: Path, tiny_model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A real signal to a real process, sent once its progress on standard error shows that it calibrates."""
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": "x" * 48}) + "\n") * LONG_CALIBRATION)
    length = ["--prompt-tokens", "32", "--continuation-tokens", "16", "--sequences", LONG_CALIBRATION + 1]
    arguments = [tiny_model, "-o", outputs / "x", "--dataset", tmp_path / "long.jsonl", *length]
    process = start("calibrate", *arguments, preexec_fn=heed_interrupts)
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "using those" in line, line + process.stderr.read()
    time.sleep(0.3)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (code, "")
    assert stderr == ("Interrupted.\n" if number == signal.SIGINT else "")


# Verification


def test_failed_verification_leaves_no_artifact(
    outputs: Path, tiny_model: Path, tiny_calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tda_export.graph.comparison.FLOAT32_LOGITS", 0.0)  # no result is so exact
    result = build(tiny_model, tiny_calibration, outputs / "x")
    assert_error(result, FAILURE, "Verification failed (prefill logits, ", "x was not written")
    assert "FAILED" in result.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "{}/tokenizer.json: not a readable tokenizer (reason). Build the artifact again.",
            "{}/tokenizer.json: not a readable tokenizer (reason). {} was not written. Check the model's own files: "
            "configuration, tokenizer and chat template.",
        ),
        ("{}: something else. Do that.", "{}: something else. Do that."),
    ],
    ids=["what cannot help", "what can"],
)
def test_verification_does_not_advise_what_was_just_done(
    outputs: Path, tiny_model: Path, tiny_calibration: Path, monkeypatch: pytest.MonkeyPatch, text: str, shown: str
) -> None:
    """The error does not name the temporary folder either."""

    def refuse(folder: Path) -> None:
        raise TdaError(text.format(folder))

    monkeypatch.setattr("tda_export.graph.verify.open_artifact", refuse)
    output = outputs / "x"
    message = assert_error(build(tiny_model, tiny_calibration, output), FAILURE)
    assert message == f"{shown.format(output, output)}\n"
