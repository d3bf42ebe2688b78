"""Every command in README.md and docs/ runs on a tiny model, and every option in them exists.

A fenced block of shell commands is ```sh. Its commands run in order, in a folder of the document's own with MODEL (also
as smollm2-135m), DIR, calibration.safetensors and FILE. Blocks ```sh norun=REASON do not run; `NOT_RUN` counts them.
"""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tda_export.calibration.corpus import builtin_folder
from tda_export.cli.main import cli
from tests.docs.blocks import DOCUMENTS, ROOT, blocks, written_commands

LANGUAGES = {"sh", "python", "text", "json", "", "cpp", "js"}
NOT_RUN = {"install": 3, "server": 2, "network": 2, "long": 5, "build": 4}
TINY = {
    "calibrate": {"sequences": 4, "prompt_tokens": 32, "continuation_tokens": 16},
    "quantize": {"sequences": 4, "kl_sequences": 2, "prompt_tokens": 32, "continuation_tokens": 16},
    "generate": {"max_new_tokens": 4},
    "chat": {"max_new_tokens": 4},
    "eval": {"prompts": 2, "prompt_tokens": 24, "continuation_tokens": 8},
    "serve": {"port": 0},
}
RUN = [
    name for name in DOCUMENTS if any(block.language in ("sh", "python") and not block.norun for block in blocks(name))
]


@pytest.fixture
def folder(
    tmp_path: Path,
    tiny_model: Path,
    priced_calibration: Path,
    priced_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The current folder, with the files that documents name. `serve` is cut short: it listens, but does not wait."""
    for name in ("MODEL", "smollm2-135m"):
        shutil.copytree(tiny_model, tmp_path / name)
    shutil.copytree(priced_artifact, tmp_path / "DIR")
    shutil.copy(priced_calibration, tmp_path / "calibration.safetensors")
    texts = sorted(builtin_folder().glob("*.txt"))
    (tmp_path / "FILE").write_text(texts[0].read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tda_export.models.source.BUILTIN_MODELS", {})
    monkeypatch.setattr("tda_export.serve.run.Server.run", lambda self, sockets: None)
    return tmp_path


def run_line(line: str) -> None:
    """Run a line of shell: `tda-export …`, `echo TEXT | tda-export …` or `python -c CODE`."""
    before, _, after = line.rpartition(" | ")
    words = shlex.split(after, comments=True)
    if words[:2] == ["python", "-c"]:
        exec(compile(words[2], line, "exec"), {})
        return
    assert words[0] == "tda-export", f"{line}: neither tda-export nor python -c. Mark the block norun=REASON."
    if "-o" in words:
        output = Path(words[words.index("-o") + 1])
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    given = f"{shlex.split(before)[1]}\n" if before else "Hello\n/quit\n"
    result = CliRunner().invoke(cli, words[1:], input=given, default_map=TINY)
    assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.parametrize("document", RUN)
def test_commands_run(document: str, folder: Path) -> None:
    for block in blocks(document):
        if block.language == "sh" and not block.norun:
            for line in block.commands:
                run_line(line)
        elif block.language == "python" and not block.norun:
            exec(compile(block.body, document, "exec"), {})


def test_blocks_say_what_they_are() -> None:
    """A block without a language has no command, so that none is missed."""
    for document in DOCUMENTS:
        for block in blocks(document):
            assert block.language in LANGUAGES, (document, block.language)
            if block.language in ("", "text"):
                assert not block.body.startswith(("tda-export", "$ ", "pip ", "make ", "python ")), document


def test_what_does_not_run() -> None:
    reasons = Counter(block.norun for document in DOCUMENTS for block in blocks(document) if block.norun)
    assert reasons == NOT_RUN


@pytest.mark.parametrize("document", [*DOCUMENTS, "examples/README.md"])
def test_options_exist(document: str) -> None:
    for words in written_commands(document):
        if words[0] not in cli.commands:
            assert words[0] == "COMMAND", f"{document}: tda-export {words[0]}"
            continue
        options = {name for item in cli.commands[words[0]].params for name in (*item.opts, *item.secondary_opts)}
        written = {word.partition("=")[0] for word in words if word.startswith("--") and word.strip("-")}
        assert written <= {*options, "--help"}, f"{document}: {shlex.join(words)}"


def test_written_commands_are_found() -> None:
    """Commands in text and in tables count too."""
    words = list(written_commands("docs/evaluation.md"))
    assert ["eval", "DIR", "--text", "FILE", "--free", "512"] in words
    assert any(isinstance(cli.commands[item[0]], click.Command) for item in words)


def test_every_page_is_linked() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in readme
