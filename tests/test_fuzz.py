"""Files that were altered at random: a command gives one clear line, or what it gives is right, or verify finds it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tda_export.files import sha256
from tda_export.graph import contract
from tests.fuzz import Case, mutate_bytes, mutate_json, run, run_all
from tests.tiny import save_tiny_model

PROMPT = "The sea is calm tonight"
SECONDS = 60.0  # for one mutation, of which each takes a fraction of a second
GENERATE = (PROMPT, "--max-new-tokens", 6, "--provider", "cpu", "--json")
# What a generation says that does not differ from run to run.
FIGURES = ("prompt_tokens", "new_tokens", "density", "sparsity", "dense_bytes_per_token")


def told(stdout: str) -> list[object]:
    """What a generation said: its text, and the figures that are no times."""
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
    if name != contract.MANIFEST_FILE and random.random() < 0.7:  # else the size tells already
        _enter_size(artifact, name)
    return generates_or_says_why(artifact, where)


def _enter_size(artifact: Path, name: str) -> None:
    path = artifact / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["files"][name]["size"] = (artifact / name).stat().st_size
    path.write_text(json.dumps(manifest))


def graph_names(folder: Path, random: random.Random, where: Path) -> str:
    """A name within a graph is another, and the manifest has the graph's new hash."""
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
    path = artifact / contract.MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"size": (artifact / name).stat().st_size, "sha256": sha256(artifact / name)}
    path.write_text(json.dumps(manifest))
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
    if random.random() < 0.5:  # the header is little of it
        path.write_bytes(mutate_bytes(data[:header], random) + data[header:])
    else:
        path.write_bytes(mutate_bytes(data, random))
    return _calibration(path, where)


def calibration_values(folder: Path, random: random.Random, where: Path) -> str:
    """A value of its record, or of its header, which says where tensors are."""
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
    """A calibration that is not as it was is refused; one that passes is as it was."""
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
    """A model's config.json, of which an artifact is built without any calibration."""
    model = copied(folder, where, "model")
    path = model / "config.json"
    path.write_text(mutate_json(path.read_text(), random), encoding="utf-8", errors="surrogatepass")
    griffin = ("--method", "griffin", "--sparsity", 0.5, "--no-verify", "--provider", "cpu")
    built = run("build", model, *griffin, "-o", folder / "built")
    if built.problem or built.exit_code:
        left = [path.name for path in folder.iterdir() if path.name != "model"]
        return built.problem or (f"left behind: {left}" if left else "")
    return run("generate", folder / "built", *GENERATE).problem


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


@pytest.fixture(scope="module")
def good(tiny_artifact: Path, tiny_calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact, a calibration and a model, and what the artifact generates."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_artifact, folder / "artifact")
    shutil.copy(tiny_calibration, folder / "calibration.safetensors")
    save_tiny_model("llama", folder / "model", num_hidden_layers=1)
    outcome = run("generate", folder / "artifact", *GENERATE)
    assert outcome.exit_code == 0, outcome
    (folder / "told.json").write_text(json.dumps(told(outcome.stdout)))
    assert not generates_or_says_why(folder / "artifact", folder)
    return folder


def test_altered_files(good: Path) -> None:
    cases = [Case(check, seed, good) for check, count in MUTATIONS.items() for seed in range(count)]
    assert len(cases) >= 300
    wrong = run_all(cases, SECONDS)
    assert not wrong, "\n\n".join(f"{case}: {problem}" for case, problem in wrong.items())
