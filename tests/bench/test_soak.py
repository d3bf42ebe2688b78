"""benchmarks/soak.py: its rule on made-up samples, and both targets for a few seconds on a tiny artifact."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.test_scripts import load

SECONDS = 600.0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("soak", monkeypatch)


def verdict(script: ModuleType, memory: Any, descriptors: Any = lambda t: 20, threads: Any = lambda t: 4) -> Any:
    """Return the growth of values given as functions of the seconds, sampled once a second."""
    times = [float(t) for t in range(int(SECONDS))]
    samples = [script.Sample(t, int(memory(t)), int(memory(t)) // 2, descriptors(t), threads(t)) for t in times]
    return script.growth(samples, SECONDS, warm_up=0.5, tolerance=0.05)


def test_growth_is_found_by_its_slope(script: ModuleType) -> None:
    found = verdict(script, lambda t: 100e6 + 1e6 * t / 60)
    assert found["grows"] == ["resident", "anonymous"]
    assert found["resident_mb_per_minute"] == pytest.approx(1.0, rel=1e-3)
    assert found["anonymous_mb_per_minute"] == pytest.approx(0.5, rel=1e-3)
    assert len(found["resident_mb"]) == 10


def test_what_is_no_growth(script: ModuleType) -> None:
    noise = random.Random(0)
    for memory in (
        lambda t: 100e6,
        lambda t: 100e6 + 5e6 * min(t, 200) / 200,  # a warm-up
        lambda t: 100e6 + 0.04e6 * t / 60,  # below the tolerance
        lambda t: 100e6 - 1e6 * t / 60,
        lambda t: 100e6 + 3e6 * noise.random(),
    ):
        assert verdict(script, memory)["grows"] == []


def test_descriptors_and_threads_grow_if_none_come_back(script: ModuleType) -> None:
    noise = random.Random(0)
    busy = verdict(script, lambda t: 1e8, lambda t: noise.randrange(20, 25), lambda t: noise.randrange(4, 6))
    assert busy["grows"] == []
    leaking = verdict(script, lambda t: 1e8, lambda t: 20 + int(t / 60), lambda t: 4 + int(t / 100))
    assert leaking["grows"] == ["descriptors", "threads"]
    assert leaking["threads"] == {"first": [7, 7], "last": [9, 9]}


@given(
    st.lists(
        st.tuples(st.floats(-50, 50), st.floats(-1e3, 1e3)), min_size=3, max_size=20, unique_by=lambda p: round(p[0], 1)
    )
)
def test_line_is_that_of_least_squares(points: list[tuple[float, float]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fit = load("soak", patch).fit
    x, y = map(list, zip(*points, strict=True))
    found = fit(x, y)
    matrix = np.stack([np.array(x), np.ones(len(x))], 1)
    solution, *_ = np.linalg.lstsq(matrix, np.array(y), rcond=None)
    variance = ((matrix @ solution - y) ** 2).sum() / (len(x) - 2)
    assert found.slope == pytest.approx(solution[0], rel=1e-6, abs=1e-6)
    assert found.stderr == pytest.approx((variance * np.linalg.inv(matrix.T @ matrix)[0, 0]) ** 0.5, rel=1e-5, abs=1e-6)


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["soak.py", *map(str, arguments)])
    status: int = script.main()
    return status


def test_both_targets_answer(
    priced_artifact: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few seconds show nothing about memory, so any growth is allowed here."""
    options = ("--minutes", 0.08, "--every", 0.05, "--tolerance", 1e6, "--json")
    assert run(script, monkeypatch, priced_artifact, *options) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["target"] for row in rows] == ["generate", "serve"]
    for row in rows:
        assert row["requests"]["read"] > 0
        assert row["grows"] == []
        assert min(row["resident_mb"]) > 10
        assert script.line(row).endswith("no growth")


def test_what_grows_is_the_exit_status(
    priced_artifact: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = verdict(script, lambda t: 100e6 + 1e6 * t / 60) | {"requests": {"read": 1}}
    monkeypatch.setattr(script, "soak", lambda target, options: row)
    assert run(script, monkeypatch, priced_artifact, "--target", "serve") == 1
    assert capsys.readouterr().out.endswith("grows: resident, anonymous\n")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--minutes", "0"], "Give --minutes and --every above 0, and a --warm-up in [0, 1)."),
        (["--warm-up", "1"], "Give --minutes and --every above 0, and a --warm-up in [0, 1)."),
    ],
)
def test_wrong_options_are_refused(
    options: list[str],
    problem: str,
    priced_artifact: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(script, monkeypatch, priced_artifact, *options) == 2
    assert capsys.readouterr().err == f"Error: {problem}\n"


def test_time_must_hold_ten_blocks(script: ModuleType) -> None:
    with pytest.raises(Exception, match="too short for ten blocks"):
        script.growth([script.Sample(0.9, 1, 1, 1, 1)], 1.0, warm_up=0.5, tolerance=0.0)


def test_target_that_ends_by_itself_is_an_error(
    priced_artifact: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The artifact can be opened, but its graph is deleted."""
    monkeypatch.setattr("soak_requests.subprocess.Popen", lambda *words, **options: Ended())
    assert run(script, monkeypatch, priced_artifact, "--target", "serve", "--minutes", "0.05") == 1
    assert capsys.readouterr().err == "Error: The server did not start. See above.\n"


class Ended:
    """A process that has ended without output."""

    stderr: tuple[str, ...] = ()

    def terminate(self) -> None:
        pass

    def wait(self, timeout: float) -> None:
        pass
