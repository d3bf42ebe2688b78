"""Long benchmarks: if one part fails, the others are still measured and printed."""

from __future__ import annotations

import importlib
import json
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


LATENCY = {"device": "a GPU", "copy_gb_per_second": 3000.0} | {
    name: {
        "seconds": 1.0,
        "ms_per_token": 2.0,
        "ceiling_ms": 1.5,
        "share_of_copy_bandwidth": 0.75,
        "sparsity": 0.5,
        "paper_a100_seconds": None,
    }
    for name in ("dense", "tt", "griffin", "tda", "two_levels")
}
KERNEL = {"settings": {"half of the neurons": {"gb_per_second": 2000.0, "share_of_copy_bandwidth": 0.67}}}


def fail(*arguments: object) -> dict[str, Any]:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("as_json", [False, True])
def test_latency_is_printed_though_the_kernel_fails(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load("paper_latency", monkeypatch)
    monkeypatch.setattr(script, "with_artifact", lambda shape, part, folder: nullcontext(folder))
    monkeypatch.setattr(
        script, "latency", lambda shape, part, folder, prompt, new: fail() if shape == "gemma-2b" else LATENCY
    )
    monkeypatch.setattr(script, "kernel", lambda shape: fail() if shape == "opt-2.7b" else KERNEL)
    arguments = ["--shape", "opt-2.7b", "--shape", "gemma-2b", "--part", "masks", "--part", "kernel"]
    arguments += ["--json"] if as_json else []
    monkeypatch.setattr("sys.argv", ["paper_latency.py", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=r"^Failed: opt-2\.7b, kernel; gemma-2b, masks\.$"):
        script.main()
    printed = capsys.readouterr()
    assert printed.err.count("RuntimeError: no such kernel") == 2
    lines = printed.out.splitlines()
    if as_json:
        expected = [{"shape": "opt-2.7b", "masks": LATENCY}, {"shape": "gemma-2b", "kernel": KERNEL}]
        assert [json.loads(line) for line in lines] == expected
    else:
        assert lines[0] == "opt-2.7b, masks, a GPU, copy 3,000 GB/s"
        assert " ".join(lines[-1].split()) == "kernel, half of the neurons 2,000 GB/s, 0.67 of copy"


def run_true_shapes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[str, str] | None, peak: int, *shapes: str
) -> None:
    """Run the script with instant steps, of which one step of one shape may fail."""
    script = load("true_shapes", monkeypatch)
    answers = {
        "make": {"largest_tensor_bytes": 8},
        "build": {"build_peak_anonymous_bytes": peak},
        "run": {"device": "a GPU"},
    }

    def step(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        shape, name = command[command.index("--shape") + 1], command[command.index("--step") + 1]
        failed = (shape, name) == failing
        return subprocess.CompletedProcess(command, int(failed), "" if failed else json.dumps(answers[name]) + "\n")

    monkeypatch.setattr(script.subprocess, "run", step)
    options = [word for shape in shapes for word in ("--shape", shape)]
    monkeypatch.setattr("sys.argv", ["true_shapes.py", str(folder), *options])
    script.main()


@pytest.mark.parametrize("step", ["make", "build", "run"])
def test_models_after_one_that_fails_are_built(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=rf"^opt-350m: {step} failed$"):
        run_true_shapes(tmp_path, monkeypatch, ("opt-350m", step), 1, "opt-350m", "gemma-2b")
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["failed"] == step
    assert first.get("within_allowed") == (True if step == "run" else None)
    assert second["within_allowed"]
    assert "failed" not in second
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_left_alone_and_the_next_model_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "opt-350m").mkdir()
    with pytest.raises(SystemExit, match=r"opt-350m is there already, delete it$"):
        run_true_shapes(tmp_path, monkeypatch, None, 1, "opt-350m", "gemma-2b")
    assert json.loads(capsys.readouterr().out)["model"] == "gemma-2b"
    assert [path.name for path in tmp_path.iterdir()] == ["opt-350m"]


def test_a_build_over_its_bound_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_true_shapes(tmp_path, monkeypatch, None, 1, "gemma-2b")
    with pytest.raises(SystemExit, match=r"^gemma-2b: the build took more memory than allowed$"):
        run_true_shapes(tmp_path, monkeypatch, None, 1 << 40, "gemma-2b")


def test_rows_are_compared_with_the_faster_peer_of_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("peers", monkeypatch)
    row = {"ms_per_token": 2.0}
    report: dict[str, Any] = {
        "genai": "failed",
        "genai_int4": {"ms_per_token": 4.0},
        "genai_int4_fpa": {"ms_per_token": 3.0},
        "priced": {"dense": dict(row)},
        "int4": {"device": "a GPU", "priced_0.50": dict(row)},
    }
    script.beside_genai(report)
    assert report["int4"] == {"device": "a GPU", "priced_0.50": row | {"times_faster_than_genai": 1.5}}
    assert report["priced"] == {"dense": row}


def test_int4_of_a_shape_is_built_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    from tda_export.runtime.artifact import Artifact, open_artifact
    from tests.bench.test_bench import SMALL

    script = load("peers", monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    sizes = {"prompt_tokens": 64, "new_tokens": 32}
    options = Namespace(folder=tmp_path, shape=str(tmp_path / "config.json"), head="priced", **sizes)
    script.STEPS["build_int4_head4"](options)
    assert open_artifact(tmp_path / "int4_head4").head.format.name == "int4_g32"
    script.build_int4(options)
    assert open_artifact(tmp_path / "int4").head.format.name == "int8_g32"
    assert open_artifact(tmp_path / "int4").matrices["layers.0.ffn.down"].format.name == "int4_g32"
    timed: list[Any] = []

    def run(artifact: Artifact, provider: str, settings: Any, prompt: list[int]) -> dict[str, Any]:
        timed.extend((artifact.folder, provider, settings.prices, len(prompt)))
        return {}

    monkeypatch.setattr("tda_export.bench.decode.run_bench", run)
    script.STEPS["int4"](options)
    prices = {"priced_0.70": 1e-3, "priced_0.50": 1e30}
    assert timed == [tmp_path / "int4", "cuda", prices, 64]


def test_logits_that_are_not_finite_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("peers", monkeypatch)
    script.check_finite("GenAI", np.zeros(3))
    with pytest.raises(SystemExit, match=r"^GenAI: logits are not finite, so nothing was timed\.$"):
        script.check_finite("GenAI", np.array([1.0, np.nan]))


def test_every_stamp_of_device_rows_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both kinds of kernels; the first one in what they share."""
    code = load("device_rows", monkeypatch).device_code(stamps=True)
    assert [code.count(f"STAMP({number});") for number in range(1, 5)] == [1, 2, 2, 2]
    assert code.count("BEGIN_STAMPS(") == 2


def test_ours_beside_peers_on_the_cpu(priced_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every price is timed, by the bench's own runner. The peers need programs that tests do not have."""
    script = load("cpu_peers", monkeypatch)
    ways = script.ours("head int8", priced_artifact, {"1.00": 0.0, "0.50": 1e-7}, list(range(5, 21)))
    assert list(ways) == ["ours 1.00, head int8", "ours 0.50, head int8"]
    for measure in ways.values():
        token, prompt = measure()
        assert 0 < token < 60
        assert 0 < prompt < 60


def test_times_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is read twice, and only the second time counts; one token warms up."""
    script, called = load("cpu_peers", monkeypatch), list[object]()
    script.timed(lambda: called.append("read"), called.append)
    assert called == ["read", "read", 1, script.TOKENS]
