"""Fixtures that several packages' tests share."""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import settings

from tda_export.cli.main import cli
from tda_export.models.source import resolve_model
from tda_export.models.spec import DecoderSpec
from tda_export.runtime.providers import cuda_problem
from tests.examples.applications import Applications, node_problem
from tests.tiny import save_tiny_model

settings.register_profile("untimed", deadline=None)  # a busy machine must not fail a test
settings.load_profile("untimed")

# This project does not ship this model.
collect_ignore = [] if os.environ.get("TDA_EXPORT_GEMMA3") else ["test_gemma3.py"]

TINY_LENGTHS = ("--sequences", "4", "--prompt-tokens", "32", "--continuation-tokens", "16")
CALIBRATE_TINY = ("--method", "tda", *TINY_LENGTHS)
PRICE_TINY = ("--method", "priced", *TINY_LENGTHS)
QUANTIZE_TINY = ("--kl-sequences", "2", *TINY_LENGTHS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run. Files marked `long` come first, then those of most tests: in several
    processes, what comes last should be short."""
    for marker, problem in (("gpu", cuda_problem()), ("node", node_problem())):
        for item in items:
            if problem and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=problem))
    long = {item.path for item in items if item.get_closest_marker("long")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in long, -tests[item.path]))  # within a file, as before


def build_tda(model: object, calibration: object) -> tuple[object, ...]:
    """Return the arguments of `tda-export build --method tda`, without an output."""
    return "build", model, "--method", "tda", "--calibration", calibration


def run_cli(*arguments: object, **options: object) -> Result:
    """Run `tda-export` in this process. The result has exit_code, stdout and stderr."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]


def run_ok(*arguments: object) -> Result:
    """Run `tda-export` and require success."""
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="session")
def applications(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Applications]:
    """Installs the examples in a temporary folder, which is deleted afterwards, since Node's packages are large."""
    folder = tmp_path_factory.mktemp("applications")
    yield Applications(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama in a Hugging Face folder."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, DecoderSpec]]:
    """Loads the tiny model of a family in transformers, without gradients of its weights, and its spec."""

    @functools.cache
    def load(name: str) -> tuple[Any, DecoderSpec]:
        source = resolve_model(str(save_tiny_model(name, tmp_path_factory.mktemp("family") / name)))
        return source.reference().requires_grad_(False), source.spec

    return load


@pytest.fixture(scope="session")
def tiny_calibration(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's calibration at sparsity 0.5 on the built-in text."""
    path = tmp_path_factory.mktemp("calibrations") / "tiny.safetensors"
    run_ok("calibrate", tiny_model, "-o", path, "--sparsity", "0.5", *CALIBRATE_TINY)
    return path


@pytest.fixture(scope="session")
def tiny_artifact(tiny_model: Path, tiny_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's verified artifact. All tests share it: copy it before changing it."""
    path = tmp_path_factory.mktemp("artifacts") / "tiny"
    run_ok(*build_tda(tiny_model, tiny_calibration), "-o", path)
    return path


@pytest.fixture(scope="session")
def priced_calibration(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's calibration of prices at sparsity 0.5 on the built-in text."""
    path = tmp_path_factory.mktemp("calibrations") / "priced.safetensors"
    run_ok("calibrate", tiny_model, "-o", path, "--sparsity", "0.5", *PRICE_TINY)
    return path


@pytest.fixture(scope="session")
def priced_artifact(tiny_model: Path, priced_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's verified artifact of priced rows. All tests share it: copy it before changing it."""
    path = tmp_path_factory.mktemp("artifacts") / "priced"
    run_ok("build", tiny_model, "--calibration", priced_calibration, "-o", path)
    return path


@pytest.fixture(scope="session")
def integer_artifact(tiny_model: Path, priced_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's verified artifact of four-bit rows. It decodes densely unless a price is given."""
    path = tmp_path_factory.mktemp("artifacts") / "integers"
    run_ok("build", tiny_model, "--calibration", priced_calibration, "--weights", "int4", "--price", "0", "-o", path)
    return path


@pytest.fixture(scope="session")
def token_artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's artifact with a calibration of the token estimator, which threshold truncation needs."""
    folder = tmp_path_factory.mktemp("token")
    sequences = ("--sequences", "2", "--prompt-tokens", "24", "--continuation-tokens", "8")
    output = folder / "calibration.safetensors"
    run_ok("calibrate", tiny_model, "-o", output, "--method", "tda", "--estimator", "token", *sequences)
    calibration = ("--calibration", folder / "calibration.safetensors")
    run_ok("build", tiny_model, "--method", "tda", *calibration, "--no-verify", "-o", folder / "artifact")
    return folder / "artifact"
