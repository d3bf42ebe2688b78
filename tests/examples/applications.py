"""The examples as users run them: each in a process of its own, from prompt to token ids."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import onnxruntime
from tokenizers import Tokenizer

from tda_export.graph import contract
from tda_export.native.build import FOLDER as NATIVE_SOURCES
from tda_export.native.build import find_compiler
from tda_export.runtime import load
from tda_export.runtime.generate import MaskMode

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE_IDS = """
import { load } from "./artifact.mjs";
const [folder, prompt, dense, count, price] = process.argv.slice(1);
const artifact = await load(folder);
const tokens = [];
const options = { dense: dense === "dense", maxNewTokens: Number(count), price: price && Number(price) };
for await (const token of artifact.generate(artifact.encode(prompt), options)) tokens.push(token);
console.log(tokens.join(" "));
"""
# Packages that a clean environment of an example lacks. None in sys.modules makes an import fail.
FOREIGN = ("tda_export", "torch", "transformers", "onnx", "onnx_ir", "onnxruntime_genai")

Application = Callable[[Path, str, MaskMode | None, int], list[int]]


def run(*command: object, folder: Path | None = None, text: str | None = None) -> str:
    """Run a command and return its output. A failure shows the error."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def ids(printed: str) -> list[int]:
    return [int(word) for word in printed.split()]


def node_problem() -> str | None:
    """Return what the Node example lacks here, or None. In CI it must lack nothing."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found" if missing and not os.environ.get("CI") else None


def ours(artifact: Path, prompt: str, mask: MaskMode | None, count: int, price: float | None = None) -> list[int]:
    """Run the package's own driver. Without a mask it uses the artifact's method, at its own price or another."""
    model = load(artifact, provider="cpu")
    how = None if price is None else model.at(price=price)
    return [token.id for token in model.generate(prompt, mask=mask, max_new_tokens=count, deployment=how)]


def dense_option(mask: MaskMode | None) -> list[str]:
    return ["--dense"] if mask == "dense" else []


def genai(artifact: Path, prompt: str, mask: MaskMode | None, count: int, *options: object) -> list[int]:
    options = (*options, *dense_option(mask), "--max-new-tokens", count, "--ids")
    return ids(run(sys.executable, EXAMPLES / "genai_generate.py", artifact, prompt, *options))


def minimal(artifact: Path, prompt: str, mask: MaskMode | None, count: int, price: float | None = None) -> list[int]:
    """Run the script in an interpreter that cannot import the packages that it does not need."""
    words = [str(artifact), prompt, *dense_option(mask), "--max-new-tokens", str(count), "--ids"]
    words += [] if price is None else [f"--price={price}"]
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({FOREIGN})); sys.argv[1:] = {words!r}\n"
        f"runpy.run_path({str(EXAMPLES / 'python_minimal.py')!r}, run_name='__main__')"
    )
    return ids(run(sys.executable, "-I", "-c", code))


class Applications:
    """The examples that are installed or compiled in a folder when they are first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def node_folder(self) -> Path:
        """The Node example with its packages, as `npm ci` installs them."""
        ignored = shutil.ignore_patterns("node_modules")
        folder = Path(shutil.copytree(EXAMPLES / "node", self._folder / "node", ignore=ignored))
        run("npm", "ci", "--no-audit", "--no-fund", folder=folder)
        return folder

    @cached_property
    def cpp_program(self) -> Path:
        """The C++ example, compiled against the project's ABI declaration and linked to the library of this Python."""
        library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
        (self._folder / "libonnxruntime.so.1").symlink_to(library)  # its name in a release
        program = self._folder / "generate"
        headers = [f"-I{Path(__file__).parent}", f"-I{NATIVE_SOURCES}"]
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *headers]
        link = [self._folder / "libonnxruntime.so.1", f"-Wl,-rpath,{self._folder}"]
        run(*find_compiler(), *flags, EXAMPLES / "cpp" / "generate.cc", *link, "-o", program)
        return program

    def node(
        self, artifact: Path, prompt: str, mask: MaskMode | None, count: int, price: float | None = None
    ) -> list[int]:
        command = ("node", "--input-type=module", "-e", NODE_IDS, artifact, prompt, mask, count)
        return ids(run(*command, *([] if price is None else [price]), folder=self.node_folder))

    def cpp(self, artifact: Path, prompt: str, mask: MaskMode | None, count: int, *options: object) -> list[int]:
        """Run the C++ example, which takes token ids."""
        tokens = Tokenizer.from_file(str(artifact / contract.TOKENIZER_FILE)).encode(prompt).ids
        return ids(run(self.cpp_program, artifact, *dense_option(mask), "--max-new-tokens", count, *options, *tokens))

    def priced(self, name: str, artifact: Path, prompt: str, count: int, price: float) -> list[int]:
        """Run an application that takes a price, any but GenAI."""
        if name == "cpp":
            return self.cpp(artifact, prompt, None, count, "--price", price)
        return {"minimal": minimal, "node": self.node}[name](artifact, prompt, None, count, price)

    def named(self, name: str) -> Application:
        """Return an application of APPLICATIONS."""
        return {"genai": genai, "minimal": minimal, "node": self.node, "cpp": self.cpp}[name]
