"""`tda-export demo` on a tiny model in place of the built-in one."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from tda_export.cli import demo, demo_comparison
from tda_export.cli.main import cli
from tda_export.graph.derive import artifact_spec
from tda_export.graph.sizes import artifact_sizes
from tda_export.runtime import Model, load
from tda_export.runtime.scoring import compare, continuation_logits
from tests.cli.conftest import USAGE, assert_error
from tests.conftest import run_cli, run_ok

WAYS = ["float32, dense", "float32, TDA", "int4, dense", "int4, --max-kl 1e-05", "int4, --sparsity 0.5"]
WIDE = {"COLUMNS": "250"}


@pytest.fixture(scope="module")
def tiny_demo(tiny_model: Path) -> Callable[[pytest.MonkeyPatch], None]:
    """Replaces the demo's model by the tiny one, and lowers its numbers."""

    def put(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "MODEL", str(tiny_model))
        for name in ("TDA_SEQUENCES", "QUANTIZE_SEQUENCES", "QUANTIZE_KL_SEQUENCES", "INT4_SEQUENCES"):
            monkeypatch.setattr(demo, name, 2)
        monkeypatch.setattr(demo_comparison, "PROMPT", "The sea is calm tonight")
        monkeypatch.setattr(demo_comparison, "NEW_TOKENS", 12)
        monkeypatch.setattr(demo_comparison, "ROUNDS", 2)
        monkeypatch.setattr(demo_comparison, "MAX_KL", 1e-5)

    return put


@pytest.fixture(scope="module")
def whole(
    tiny_demo: Callable[[pytest.MonkeyPatch], None], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder and the output of a demo that began without files."""
    folder = tmp_path_factory.mktemp("demo") / "artifacts"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_demo(monkeypatch)
        result = run_cli("demo", "--artifacts", folder, env=WIDE)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_every_step_is_shown_and_run(whole: tuple[Path, str]) -> None:
    folder, output = whole
    at = demo.places(folder)
    assert sorted(folder.iterdir()) == sorted(vars(at).values())
    shown = re.findall(r"^\$ tda-export (\w+) .*-o (\S+)", output, re.MULTILINE)
    outputs = [at.tda_calibration, at.tda, at.int4_model, at.int4_calibration, at.int4]
    commands = ["calibrate", "build", "quantize", "calibrate", "build"]
    assert shown == [(command, str(path)) for command, path in zip(commands, outputs, strict=True)]
    assert [f"[{n}/5] " in output for n in range(1, 7)] == [True] * 5 + [False]
    assert len(re.findall(r"wrote .*, \d+ s$", output, re.MULTILINE | re.IGNORECASE)) == 5
    assert "about 5 minutes on two idle cores" in output
    assert demo_comparison.NOTES[1] in " ".join(output.split())


def rows_of(output: str) -> dict[str, list[str]]:
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {row[0]: row[1:] for row in cells if row[0] in WAYS}


def reference(model: Model, dense: Model, prompt: list[int], answer: list[int], **how: object) -> tuple[float, float]:
    """Return KL and agreement of a way along the dense answer."""
    expected = continuation_logits(dense, prompt, answer, mask="dense")
    found = compare(expected, continuation_logits(model, prompt, answer, **how))  # type: ignore[arg-type]
    return found.kl, found.agreement


def test_the_table_is_what_the_artifacts_do(whole: tuple[Path, str], tiny_demo: Callable[..., None]) -> None:
    folder, output = whole
    at = demo.places(folder)
    masks, int4 = load(at.tda), load(at.int4)
    rows = rows_of(output)
    assert list(rows) == WAYS
    prompt = masks.tokenize("The sea is calm tonight", chat=True)
    answer = masks.generate(prompt, max_new_tokens=12, mask="dense")
    tokens = [token.id for token in answer]
    prices = [int4.at(price=0.0), int4.at(max_kl=1e-5), int4.at(sparsity=0.5)]
    expected = [
        (0.0, 1.0),
        reference(masks, masks, prompt, tokens),
        *(reference(int4, masks, prompt, tokens, deployment=price) for price in prices),
    ]
    sizes = [artifact_sizes(artifact_spec(model.artifact), model.artifact) for model in (masks, int4)]
    mib = [sizes[0].read, None, *(sizes[1].read - (1 - price.share) * sizes[1].linears for price in prices)]
    for (rate, size, kl, same, *_), (expected_kl, agreement), read in zip(rows.values(), expected, mib, strict=True):
        assert float(rate) > 0
        assert (float(kl), float(same)) == pytest.approx((expected_kl, agreement), abs=6e-3)
        assert read is None or float(size) == pytest.approx(read / 2**20, abs=0.51)
    words = " ".join(answer.text.split())[:40]
    assert words in rows["float32, dense"][4]


def test_what_is_there_is_used_again(
    whole: tuple[Path, str], tiny_demo: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = whole
    tiny_demo(monkeypatch)
    output = run_ok("demo", "--artifacts", folder).stdout
    assert "$ " not in output
    assert all(f"Using {path}\n" in output for path in vars(demo.places(folder)).values())
    assert "minutes" not in output


def test_the_commands_at_the_end_are_real(whole: tuple[Path, str]) -> None:
    folder, output = whole
    commands = [command for command, _ in demo.next_commands(demo.places(folder))]
    assert len(commands) == 3
    for line in commands:
        assert f"  {line}\n" in output
        program, name, *arguments = line.split()
        assert program == "tda-export"
        cli.commands[name].make_context(name, arguments, parent=click.Context(cli))
    chat, report, _ = (line.split()[1:] for line in commands)
    assert run_cli(*chat, "--max-new-tokens", "2", input="Hello\n").exit_code == 0
    run_ok(*report)
    Path(report[-1]).unlink()


def test_the_real_steps_are_what_it_says(tmp_path: Path) -> None:
    """The commands accept the arguments for the built-in model."""
    at = demo.places(tmp_path)
    for step in demo.steps(at):
        name, *arguments = step.arguments
        context = cli.commands[name].make_context(name, arguments, parent=click.Context(cli))
        assert context.params["output"] == step.output
    assert math.isclose(demo.CETT, 0.2)  # the paper's value


@pytest.mark.parametrize("name", ["tda", "int4"])
def test_an_artifact_of_another_kind_is_not_the_demos(
    name: str, tiny_artifact: Path, priced_artifact: Path, tmp_path: Path
) -> None:
    place = vars(demo.places(tmp_path))[name]
    shutil.copytree(priced_artifact if name == "tda" else tiny_artifact, place)
    text = f"{place} is not the demo's own artifact. Give another folder with --artifacts."
    assert_error(run_cli("demo", "--artifacts", tmp_path), USAGE, text)
    assert list(tmp_path.iterdir()) == [place]


def test_a_step_that_fails_is_one_line(
    tiny_demo: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_demo(monkeypatch)
    monkeypatch.setattr(demo, "MODEL", str(tmp_path / "nowhere"))
    result = run_cli("demo", "--artifacts", tmp_path / "artifacts")
    assert_error(result, result.exit_code, "nowhere")
    assert result.exit_code in (1, 2)
    assert list((tmp_path / "artifacts").iterdir()) == []
