"""Commands on randomly altered files: one clear error line, or a right result, or verify finds the change."""

from __future__ import annotations

import json
import random
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tda_export.files import sha256
from tda_export.graph import contract
from tests.conftest import run_cli, run_ok
from tests.fuzz import Case, Outcome, mutate_bytes, mutate_json, run_all
from tests.tiny import save_tiny_model

PROMPT = "The sea is calm tonight"
SECONDS = 60.0  # for one mutation, which takes a fraction of a second
GENERATE = (PROMPT, "--max-new-tokens", 6, "--provider", "cpu", "--json")
# The output of a generation that is the same in every run.
FIGURES = ("prompt_tokens", "new_tokens", "density", "sparsity", "dense_bytes_per_token")
# Float16: NaN, infinities, the smallest and the largest denormal, the largest numbers, zeros.
SCALES = np.array([0x7E00, 0x7C00, 0xFC00, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x0000, 0x8000], np.uint16)
FORMATS = ("int4_g32", "int4_g64", "int4_g128", "int8_g32", "int8_g64", "float32", "float16", "int3_g32", "", None, 4)


def run(*arguments: object) -> Outcome:
    """Run a command in this process."""
    result = run_cli(*arguments)
    text = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        text = "".join(traceback.format_exception(*result.exc_info))  # type: ignore[misc]
    return Outcome(result.exit_code, result.stdout, result.stderr, text)


def told(stdout: str) -> list[object]:
    """Return the text of a generation, and its figures except times."""
    result = json.loads(stdout)
    return [result["text"], result["tokens"], *(result["metrics"][name] for name in FIGURES)]


def generates_or_says_why(folder: Path, where: Path) -> str:
    """An altered artifact generates what the good one does, or verify finds that it was altered."""
    outcome = run("generate", folder, *GENERATE)
    if outcome.exit_code or outcome.problem:
        verified = run("verify", folder, "--files-only", "--provider", "cpu", "--json")
        inspected = run("inspect", folder)
        return outcome.problem or verified.problem or inspected.problem
    if told(outcome.stdout) == json.loads((where / "told.json").read_text()):
        return ""
    verified = run("verify", folder, "--files-only", "--provider", "cpu", "--json")
    if verified.exit_code == 0:
        return f"another result, and verify passes it: {outcome.stdout}"
    return verified.problem


def copied(folder: Path, where: Path, name: str) -> Path:
    return Path(shutil.copytree(where / name, folder / name))


def manifest_values(folder: Path, random: random.Random, where: Path) -> str:
    artifact = copied(folder, where, "artifact")
    path = artifact / contract.MANIFEST_FILE
    path.write_text(mutate_json(path.read_text(), random), encoding="utf-8", errors="surrogatepass")
    return generates_or_says_why(artifact, where)


def manifest_bytes(folder: Path, random: random.Random, where: Path) -> str:
    return _bytes_of(contract.MANIFEST_FILE, folder, random, where)


def graph_bytes(folder: Path, random: random.Random, where: Path) -> str:
    return _bytes_of(random.choice([contract.PREFILL_FILE, contract.DECODE_FILE]), folder, random, where)


def other_bytes(folder: Path, random: random.Random, where: Path) -> str:
    names = [contract.WEIGHTS_FILE, contract.TOKENIZER_FILE, "tokenizer_config.json", contract.CALIBRATION_FILE]
    return _bytes_of(random.choice(names), folder, random, where)


def _bytes_of(name: str, folder: Path, random: random.Random, where: Path) -> str:
    artifact = copied(folder, where, "artifact")
    (artifact / name).write_bytes(mutate_bytes((artifact / name).read_bytes(), random))
    if name != contract.MANIFEST_FILE and random.random() < 0.7:  # otherwise the size shows the change
        _enter_size(artifact, name)
    return generates_or_says_why(artifact, where)


def _change_manifest(artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = artifact / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _enter_size(artifact: Path, name: str) -> None:
    size = (artifact / name).stat().st_size
    _change_manifest(artifact, lambda manifest: manifest["files"][name].update(size=size))


def _enter(artifact: Path, name: str) -> None:
    """Write the size and hash of a changed file into the manifest, as if it had been built so."""
    entry = {"size": (artifact / name).stat().st_size, "sha256": sha256(artifact / name)}
    _change_manifest(artifact, lambda manifest: manifest["files"].update({name: entry}))


def graph_names(folder: Path, random: random.Random, where: Path) -> str:
    """Change a name in a graph; the manifest has the graph's new hash."""
    artifact = copied(folder, where, "artifact")
    name = random.choice([contract.PREFILL_FILE, contract.DECODE_FILE])
    model = onnx.load(artifact / name, load_external_data=False)
    graph, other = model.graph, random.choice(["other", "", "\x1b[2J\n", "x" * 5000, contract.LOGITS])
    kind = random.choice(["input", "output", "initializer", "node input", "node output", "operator", "domain", "place"])
    if kind in ("input", "output", "initializer"):
        random.choice(getattr(graph, kind)).name = other
    elif kind in ("node input", "node output"):
        part = kind.split()[1]
        names = random.choice([values for node in graph.node if (values := getattr(node, part))])
        names[random.randrange(len(names))] = other
    elif kind == "operator":
        random.choice(graph.node).op_type = other
    elif kind == "domain":
        random.choice(graph.node).domain = other
    else:
        external = [tensor for tensor in graph.initializer if tensor.external_data]
        random.choice(random.choice(external).external_data).value = random.choice([other, "-1", "9" * 30, "../x"])
    (artifact / name).write_bytes(model.SerializeToString())
    _enter(artifact, name)
    return generates_or_says_why(artifact, where)


def tokenizer_values(folder: Path, random: random.Random, where: Path) -> str:
    artifact = copied(folder, where, "artifact")
    name = random.choice([contract.TOKENIZER_FILE, "tokenizer_config.json", contract.GENERATION_CONFIG_FILE])
    text = mutate_json((artifact / name).read_text(), random)
    (artifact / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    _enter_size(artifact, name)
    problem = generates_or_says_why(artifact, where)
    return problem or run("generate", artifact, "--chat", *GENERATE).problem


def calibration_bytes(folder: Path, random: random.Random, where: Path) -> str:
    path = folder / "calibration.safetensors"
    data = (where / path.name).read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    if random.random() < 0.5:  # the header is a small part of the file
        path.write_bytes(mutate_bytes(data[:header], random) + data[header:])
    else:
        path.write_bytes(mutate_bytes(data, random))
    return _calibration(path, where)


def calibration_values(folder: Path, random: random.Random, where: Path) -> str:
    """Change a value of a calibration's record, or of its header, which has the places of tensors."""
    path = folder / "calibration.safetensors"
    data = (where / path.name).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if random.random() < 0.5:
        header["__metadata__"]["tda_export"] = mutate_json(header["__metadata__"]["tda_export"], random)
        text = json.dumps(header)
    else:
        text = mutate_json(json.dumps(header), random)
    encoded = text.encode("utf-8", "surrogatepass")
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    return _calibration(path, where)


def _calibration(path: Path, where: Path) -> str:
    """A changed calibration is refused; an accepted one has its old values."""
    from tda_export.calibration.file import read_calibration
    from tda_export.errors import TdaError

    outcome = run("report", path, "-o", path.with_suffix(".html"))
    if outcome.problem or outcome.exit_code:
        return outcome.problem
    try:
        read, good = read_calibration(path), read_calibration(where / "calibration.safetensors")
    except TdaError as error:
        return f"report took what is refused: {error}"
    return "" if read.provenance == good.provenance else f"another record: {read.provenance}"


def model_config(folder: Path, random: random.Random, where: Path) -> str:
    """Change a model's config.json, and build an artifact without a calibration."""
    model = copied(folder, where, "model")
    path = model / "config.json"
    path.write_text(mutate_json(path.read_text(), random), encoding="utf-8", errors="surrogatepass")
    griffin = ("--method", "griffin", "--sparsity", 0.5, "--no-verify", "--provider", "cpu")
    built = run("build", model, *griffin, "-o", folder / "built")
    if built.problem or built.exit_code:
        left = [path.name for path in folder.iterdir() if path.name != "model"]
        return built.problem or (f"left behind: {left}" if left else "")
    return run("generate", folder / "built", *GENERATE).problem


def code_values(folder: Path, random: random.Random, where: Path) -> str:
    """Change codes, scales or zero points of one matrix; the manifest has the new hash."""
    artifact = copied(folder, where, "artifact")
    manifest = json.loads((artifact / contract.MANIFEST_FILE).read_text())
    matrices = [matrix["tensors"] for matrix in manifest["matrices"].values()]
    place = random.choice([0, 1, 1, 1, 2])
    entry = manifest["weights"][random.choice(matrices)[place]]
    path, size = artifact / contract.WEIGHTS_FILE, contract.tensor_bytes(entry["shape"], entry["dtype"])
    data = bytearray(path.read_bytes())
    if place == 1:
        scales = np.frombuffer(data, np.uint16, size // 2, entry["offset"])
        chosen = random.choices(range(len(scales)), k=random.choice([1, len(scales)]))
        scales[chosen] = random.choice(SCALES)
    else:
        filled = random.choice([random.randbytes(size), bytes(size), b"\xff" * size])
        data[entry["offset"] : entry["offset"] + size] = filled
    path.write_bytes(data)
    _enter(artifact, path.name)
    price = random.choice([(), ("--price", 0.001), ("--price", 1e30)])
    return run("generate", artifact, *GENERATE, *price).problem or run("inspect", artifact).problem


def weights_length(folder: Path, random: random.Random, where: Path) -> str:
    """Cut weights.bin; the manifest may have the new size. This is always an error."""
    artifact = copied(folder, where, "artifact")
    path = artifact / contract.WEIGHTS_FILE
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(random.choice([0, 1, size // 2, size - 1, random.randrange(size)]))
    if random.random() < 0.8:
        _enter(artifact, path.name)
    outcome = run("generate", artifact, *GENERATE)
    return outcome.problem or ("" if outcome.exit_code else f"it generates all the same: {outcome.stdout}")


def matrix_values(folder: Path, random: random.Random, where: Path) -> str:
    """Change format, sizes or place of a matrix, or of one of its tensors, in the manifest."""
    artifact = copied(folder, where, "artifact")

    def size(value: int) -> int:
        return random.choice([value + 1, value - 1, 2 * value, value // 2, 0, -1, 2**40])

    def change(manifest: dict[str, Any]) -> None:
        matrix = random.choice(list(manifest["matrices"].values()))
        tensor = manifest["weights"][random.choice(matrix["tensors"])]
        key = random.choice(["format", "format", "rows", "columns", "tensors", "major", "shape", "dtype", "offset"])
        if key == "format":
            matrix[key] = random.choice(FORMATS)
        elif key == "tensors":
            matrix[key] = random.choice([matrix[key][:-1], matrix[key][::-1], [*matrix[key], "other"], []])
        elif key == "major":
            matrix[key] = "input" if matrix[key] == "output" else "output"
        elif key == "shape":
            tensor[key][random.randrange(2)] = size(tensor[key][1])
        elif key == "dtype":
            tensor[key] = random.choice(["uint8", "int8", "float16", "float32", ""])
        else:
            holder = tensor if key == "offset" else matrix
            holder[key] = size(holder[key])

    _change_manifest(artifact, change)
    return generates_or_says_why(artifact, where)


def node_sizes(folder: Path, random: random.Random, where: Path) -> str:
    """Change a number of a node, or shape or type of a weight in a graph; the manifest has the graph's new hash."""
    artifact = copied(folder, where, "artifact")
    name = random.choice([contract.PREFILL_FILE, contract.DECODE_FILE])
    model = onnx.load(artifact / name, load_external_data=False)
    kinds = ("RowLinear", "Linear", "GatherBlock", "Subgraph")
    nodes = [node for node in model.graph.node if node.op_type.startswith(kinds)]
    (together,) = [node for node in nodes if node.op_type == "Subgraph"]

    def other(value: int) -> int:
        return random.choice([0, -1, value + 1, value - 1, 2 * value, value // 2, 2**31, 2**62])

    chance = random.random()
    if chance < 0.5:
        text = together.attribute[0].s.decode()
        # A number of an attribute, or of the place of a tensor.
        number = random.choice(list(re.finditer(r"(?<=[=iov])\d+\b", text)))
        text = f"{text[: number.start()]}{other(int(number.group()))}{text[number.end() :]}"
        together.attribute[0].s = text.encode()
    elif chance < 0.7:
        node = random.choice([node for node in nodes if node is not together])
        attribute = random.choice([value for value in node.attribute if value.type == value.INT])
        attribute.i = other(attribute.i)
    else:
        names = {weight for node in nodes for weight in node.input}
        tensor = random.choice([tensor for tensor in model.graph.initializer if tensor.name in names])
        if random.random() < 0.7:
            tensor.dims[random.randrange(len(tensor.dims))] = random.choice([0, -1, 1, tensor.dims[0] + 1, 2**40])
        else:
            tensor.data_type = random.choice([1, 2, 3, 10, 16, 21, 22])
    (artifact / name).write_bytes(model.SerializeToString())
    _enter(artifact, name)
    return run("generate", artifact, *GENERATE).problem


MUTATIONS: dict[Callable[[Path, random.Random, Path], str], int] = {
    manifest_values: 110,
    manifest_bytes: 20,
    graph_bytes: 40,
    graph_names: 30,
    other_bytes: 30,
    tokenizer_values: 20,
    calibration_bytes: 30,
    calibration_values: 30,
    model_config: 30,
}


# For artifacts of integers. Each gets half of the seeds.
INTEGER_MUTATIONS: dict[Callable[[Path, random.Random, Path], str], int] = {
    code_values: 16,
    weights_length: 4,
    matrix_values: 10,
    node_sizes: 12,
}


def _good(artifact: Path, folder: Path) -> Path:
    """Make a folder with an artifact and the text that it generates."""
    shutil.copytree(artifact, folder / "artifact")
    outcome = run("generate", folder / "artifact", *GENERATE)
    assert outcome.exit_code == 0, outcome
    (folder / "told.json").write_text(json.dumps(told(outcome.stdout)))
    assert not generates_or_says_why(folder / "artifact", folder)
    return folder


@pytest.fixture(scope="module")
def floats(tiny_artifact: Path, tiny_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact, a calibration and a model, and the text that the artifact generates."""
    folder = _good(tiny_artifact, tmp_path_factory.mktemp("floats", numbered=False))
    shutil.copy(tiny_calibration, folder / "calibration.safetensors")
    save_tiny_model("llama", folder / "model", num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def integers(
    tiny_model: Path, priced_calibration: Path, integer_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Folders like `floats`: one with four bits, one with mostly eight in groups that do not divide every row."""
    both = tmp_path_factory.mktemp("artifacts") / "both"
    formats = ("--weights", "int8", "--group", 64, "--weights-for", "layers.0.*=int4")
    run_ok("build", tiny_model, "--calibration", priced_calibration, *formats, "--price", "0", "-o", both)
    names = {"int4_g32": integer_artifact, "int8_g64": both}
    return [_good(artifact, tmp_path_factory.mktemp(name, numbered=False)) for name, artifact in names.items()]


def test_altered_files(floats: Path, integers: list[Path]) -> None:
    cases = [Case(check, seed, floats) for check, count in MUTATIONS.items() for seed in range(count)]
    assert len(cases) >= 300
    for check, count in INTEGER_MUTATIONS.items():
        cases += [Case(check, seed, integers[seed % 2]) for seed in range(count)]
    wrong = run_all(cases, SECONDS)
    assert not wrong, "\n\n".join(f"{case}: {problem}" for case, problem in wrong.items())
