"""The packages that an import may load. Every check runs in a fresh interpreter."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import tda_export
from tda_export.cli.main import cli

PACKAGE = Path(tda_export.__file__).parent

CONVERSION = ("torch", "transformers", "onnx", "onnx_ir", "datasets", "safetensors", "huggingface_hub")
SERVER = ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client")
TELEMETRY_OFF = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "GITHUB_ACTIONS", "TF_BUILD")
HEAVY = (*CONVERSION, *SERVER, "onnxruntime", "numpy", "tokenizers", "jinja2")


def loaded(code: str) -> set[str]:
    """Run `code` in a fresh interpreter and return the top-level modules that it loaded."""
    report = "import json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def parents(module: str) -> list[str]:
    """Return the packages that are imported before a module."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def imported_at_once(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Return what a module imports at its own import, not later in a function."""
    for statement in body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) != "TYPE_CHECKING":
            yield from imported_at_once([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try | ast.ClassDef):
            yield from imported_at_once(statement.body)


def test_no_module_imports_itself_on_the_way() -> None:
    """Any module may be imported first. A package counts as imported where a module of it is."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {
        module: {
            needed
            for name in imported_at_once(ast.parse(path.read_text(encoding="utf-8")).body)
            for needed in (name, *parents(name))
            if needed in modules and needed not in (module, *parents(module))
        }
        for module, path in modules.items()
    }
    assert len(graph) > 150
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", ["tda_export.runtime", "tda_export.runtime.scoring"])
def test_runtime_loads_no_conversion_packages(module: str) -> None:
    modules = loaded(f"import {module}")
    assert modules.isdisjoint((*CONVERSION, *SERVER))
    assert {"numpy", "onnxruntime", "tokenizers", "jinja2"} <= modules  # shows that the check works


def test_tables_of_prices_load_nothing() -> None:
    assert loaded("import tda_export.pricing, tda_export.float_kl").isdisjoint(HEAVY)


def test_runtime_runs_without_conversion_packages(tiny_artifact: object) -> None:
    """Even if none of them is installed: None in sys.modules makes an import fail."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({CONVERSION}))\n"
        "from tda_export.runtime import load\n"
        f"generation = load({str(tiny_artifact)!r}, provider='cpu').generate('Hi', chat=True, max_new_tokens=4)\n"
        "assert len(list(generation)) == 4\n"
        f"sys.modules = {{name: module for name, module in sys.modules.items() if name not in {CONVERSION}}}"
    )
    assert loaded(code).isdisjoint(CONVERSION)


def test_the_server_loads_no_conversion_packages() -> None:
    modules = loaded("import tda_export.serve.app, tda_export.serve.run")
    assert modules.isdisjoint(CONVERSION)
    assert modules.issuperset(SERVER)


def test_a_chat_runs_without_conversion_packages(tiny_artifact: object) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({CONVERSION}))\n"
        "import io; sys.stdin = io.StringIO('Hi')\n"
        "from tda_export.cli.main import cli\n"
        f"try: cli(['chat', {str(tiny_artifact)!r}, '--max-new-tokens', '4'], prog_name='tda-export')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        f"sys.modules = {{name: module for name, module in sys.modules.items() if name not in {CONVERSION}}}"
    )
    assert loaded(code).isdisjoint(CONVERSION)


def test_generate_runs_without_conversion_packages(tiny_artifact: object) -> None:
    """Its failures too: it knows PyTorch's exceptions without importing it."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({CONVERSION}))\n"
        "from tda_export.cli.main import cli\n"
        "def run(*arguments):\n"
        "    try: cli(['generate', *arguments], prog_name='tda-export')\n"
        "    except SystemExit as end: return end.code\n"
        f"assert run({str(tiny_artifact)!r}, 'Hi', '--max-new-tokens', '4') == 0\n"
        "assert run('nowhere', 'Hi') == 1\n"
        "import tda_export.runtime.model as model\n"
        "def refuse(*arguments): raise MemoryError\n"
        "model.Sessions = refuse\n"
        f"assert run({str(tiny_artifact)!r}, 'Hi') == 1\n"
        f"sys.modules = {{name: module for name, module in sys.modules.items() if name not in {CONVERSION}}}"
    )
    assert loaded(code).isdisjoint(CONVERSION)


@pytest.mark.parametrize("command", [[], *([name] for name in cli.commands)], ids=lambda words: " ".join(words))
def test_help_is_light(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from tda_export.cli.main import cli\n"
        f"try: cli({[*command, '--help']}, prog_name='tda-export')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "else: raise AssertionError('it did not exit')"
    )
    assert loaded(code).isdisjoint(HEAVY)


def test_bad_option_is_light() -> None:
    code = (
        "from tda_export.cli.main import cli\n"
        "try: cli(['generate', 'x', '--provider', 'tpu'], prog_name='tda-export')\n"
        "except SystemExit as end: assert end.code == 2, end.code"
    )
    assert loaded(code).isdisjoint(HEAVY)


def environment(setting: str | None, **more: str) -> dict[str, str]:
    """Return this environment with the user's ORT_DISABLE_TELEMETRY, and without other ways to turn telemetry off."""
    others = {name: os.environ[name] for name in os.environ if name not in TELEMETRY_OFF}
    return others | ({} if setting is None else {"ORT_DISABLE_TELEMETRY": setting}) | more


@pytest.mark.parametrize(("setting", "expected"), [(None, "1"), ("0", "0"), ("", "")])
@pytest.mark.parametrize(
    "module", ["tda_export", "tda_export.__main__", "tda_export.runtime", "tda_export.graph.parity"]
)
def test_telemetry_is_off_unless_the_user_decided(module: str, setting: str | None, expected: str) -> None:
    """It is off before ONNX Runtime is imported, whichever module comes first."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *others):\n"
        "        if name == 'onnxruntime': print(os.environ.get('ORT_DISABLE_TELEMETRY')); sys.exit()\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"import {module}\n"
        "import onnxruntime"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(setting))
    assert done.stdout == f"{expected}\n", done.stderr


def test_nothing_is_written_to_the_users_home(tiny_artifact: object, tmp_path: Path) -> None:
    """ONNX Runtime's telemetry would keep a device id there."""
    command = [sys.executable, "-m", "tda_export", "generate", str(tiny_artifact), "Hi", "--max-new-tokens", "2"]
    homes = {name: str(tmp_path) for name in ("HOME", "USERPROFILE", "LOCALAPPDATA", "XDG_CACHE_HOME")}
    subprocess.run(command, capture_output=True, check=True, env=environment(None, **homes))
    assert list(tmp_path.iterdir()) == []
