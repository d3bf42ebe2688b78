"""Sessions: errors of ONNX Runtime become one line, and graphs with outside files are refused."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from tda_export.errors import TdaError, UsageError
from tda_export.graph import contract
from tda_export.native import library
from tda_export.runtime import Model, load
from tda_export.runtime.artifact import open_artifact
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.providers import CPU, CUDA
from tda_export.runtime.session import BETWEEN_STEPS_US, THREADS, Call, alone_on, device_tensor, open_session
from tests.runtime.conftest import edit_manifest


@pytest.mark.parametrize("location", ["../weights.bin", "link.bin"])
def test_weights_outside_the_folder_are_never_read(tiny_artifact: Path, tmp_path: Path, location: str) -> None:
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))
    shutil.copy(folder / contract.WEIGHTS_FILE, tmp_path / contract.WEIGHTS_FILE)
    (folder / "link.bin").symlink_to(tmp_path / contract.WEIGHTS_FILE)
    model = onnx.load(folder / contract.DECODE_FILE, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / contract.DECODE_FILE).write_bytes(model.SerializeToString())
    size = (folder / contract.DECODE_FILE).stat().st_size
    edit_manifest(folder, lambda manifest: manifest["files"][contract.DECODE_FILE].update(size=size))
    with pytest.raises(TdaError, match=r"decode\.onnx: ONNX Runtime .* cannot load it .*escapes model directory"):
        open_session(open_artifact(folder), contract.DECODE_FILE, "cpu", {})


@pytest.mark.parametrize("name", [contract.PREFILL_FILE, contract.DECODE_FILE])
def test_damaged_graph(artifact_copy: Path, name: str) -> None:
    path = artifact_copy / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(TdaError, match=rf"{name}: ONNX Runtime [\d.]+ cannot load it .*'tda-export verify'"):
        load(artifact_copy, provider="cpu")


def test_external_data_at_an_absolute_path(artifact_copy: Path) -> None:
    """Refused even if the file is the artifact's own, since it would be another on another machine."""
    path = artifact_copy / contract.DECODE_FILE
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for item in tensor.external_data:
            if item.key == "location":
                item.value = str(artifact_copy / contract.WEIGHTS_FILE)
    onnx.save(graph, path)
    edit_manifest(artifact_copy, lambda manifest: manifest["files"][path.name].update(size=path.stat().st_size))
    with pytest.raises(TdaError, match=r"decode.onnx: ONNX Runtime [\d.]+ cannot load it"):
        load(artifact_copy, provider="cpu")


def test_failing_run(model: Model) -> None:
    shape = model.artifact.shape
    cache = KvCache(shape, "cpu", shape.max_positions)
    cache.reserve(1)
    call = Call(model.sessions.decode)
    call.feed(contract.INPUT_IDS, np.array([[5]], np.int64))
    call.feed(contract.ATTENTION_MASK, cache.mask)
    cache.bind(call)
    call.feed(contract.mask_indices(0), device_tensor(np.array([shape.ffn_size], np.int32), "cpu"))
    call.allocate(contract.LOGITS, "cpu")
    with pytest.raises(TdaError, match=r"ONNX Runtime failed \(.*\). Run 'tda-export verify'"):
        call.run()


def rename(folder: Path, file: str, old: str, new: str) -> None:
    """Rename an input or output everywhere in a graph, as a flipped bit may do."""
    path = folder / file
    model = onnx.load(path, load_external_data=False)
    values = [*model.graph.input, *model.graph.output, *model.graph.initializer]
    for value in values:
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            for number, name in enumerate(names):
                names[number] = new if name == old else name
    path.write_bytes(model.SerializeToString())
    edit_manifest(folder, lambda manifest: manifest["files"][file].update(size=path.stat().st_size))


@pytest.mark.parametrize(
    ("file", "old", "problem"),
    [
        (contract.DECODE_FILE, contract.INPUT_IDS, "no input input_ids"),
        (contract.DECODE_FILE, contract.past_key(1), r"no input past_key_values\.1\.key"),
        (contract.DECODE_FILE, contract.mask_indices(0), r"no input mask_indices\.0"),
        (contract.DECODE_FILE, contract.TOKEN_THRESHOLDS, "no input token_thresholds"),
        (contract.DECODE_FILE, contract.LOGITS, "no output logits"),
        (contract.DECODE_FILE, contract.GREEDY_TOKENS, "no output greedy_tokens"),
        (contract.PREFILL_FILE, contract.ATTENTION_MASK, "no input attention_mask"),
        (contract.PREFILL_FILE, contract.past_neuron_stats(2), r"no input past_neuron_stats\.2"),
        (contract.PREFILL_FILE, contract.THRESHOLDS, "no input thresholds"),
        (contract.PREFILL_FILE, contract.present_mask_indices(0), r"no output present_mask_indices\.0"),
        (contract.PREFILL_FILE, contract.present_tail_mean(0), r"no output present_tail_mean\.0"),
    ],
)
def test_a_name_that_is_another(artifact_copy: Path, file: str, old: str, problem: str) -> None:
    """A file with the right hash may still be of another version, or hostile."""
    rename(artifact_copy, file, old, "other")
    with pytest.raises(TdaError, match=rf"{file}: the graph has {problem}\. Copy or build the artifact again\.$"):
        load(artifact_copy, provider="cpu")


def test_sizes_and_dtypes_that_are_others(artifact_copy: Path) -> None:
    edit_manifest(artifact_copy, lambda manifest: manifest["shape"].update(num_kv_heads=4))
    with pytest.raises(TdaError, match=r"an input past_key_values\.0\.key of .* instead of float32 \[1, 4, "):
        load(artifact_copy, provider="cpu")


def test_an_input_without_a_default_that_is_not_known(artifact_copy: Path) -> None:
    path = artifact_copy / contract.DECODE_FILE
    model = onnx.load(path, load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("new\n", onnx.TensorProto.FLOAT, [1]))
    path.write_bytes(model.SerializeToString())
    edit_manifest(artifact_copy, lambda manifest: manifest["files"][path.name].update(size=path.stat().st_size))
    with pytest.raises(TdaError, match=r"an input 'new\\n' that this format does not know"):
        load(artifact_copy, provider="cpu")


@pytest.mark.parametrize("bind", ["feed an array", "feed a value", "write_to", "allocate"])
def test_what_cannot_be_bound(model: Model, bind: str) -> None:
    """ONNX Runtime refuses at binding, or at running."""
    call, value = Call(model.sessions.decode), device_tensor(np.zeros(1, np.float32), "cpu")
    binding: dict[str, Callable[[], None]] = {
        "feed an array": lambda: call.feed("other", np.zeros(1, np.float32)),
        "feed a value": lambda: call.feed("other", value),
        "write_to": lambda: call.write_to("other", value),
        "allocate": lambda: call.allocate("other", "cpu"),
    }

    def bind_and_run() -> None:
        binding[bind]()
        call.run()

    with pytest.raises(TdaError, match=r"^ONNX Runtime failed \(.*\)\. Run 'tda-export verify' on the artifact\.$"):
        bind_and_run()


def test_threads_of_sessions(tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS, "2")
    sessions = load(tiny_artifact, provider="cpu").sessions
    assert sessions.decode.get_session_options().intra_op_num_threads == 2
    for wrong in ("0", "-1", "two", "1.5", "1025", "1000000"):
        monkeypatch.setenv(THREADS, wrong)
        with pytest.raises(
            UsageError, match=rf"^TDA_EXPORT_THREADS={wrong}: give a whole number of threads from 1 to 1024, or"
        ):
            load(tiny_artifact, provider="cpu")


@pytest.mark.parametrize("name", ["TDA_EXPORT_NATIVE", "TDA_EXPORT_HUGE_PAGES"])
def test_switches(tiny_artifact: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for good in ("0", "1", ""):
        monkeypatch.setenv(name, good)
        library.native_problem.cache_clear()
        assert load(tiny_artifact, provider="cpu").sessions.native == (name != "TDA_EXPORT_NATIVE" or good != "0")
    for wrong in ("false", "2"):
        monkeypatch.setenv(name, wrong)
        library.native_problem.cache_clear()
        with pytest.raises(UsageError, match=rf"^{name}={wrong}: give 0, or leave it out\.$"):
            load(tiny_artifact, provider="cpu")
    monkeypatch.delenv(name)
    library.native_problem.cache_clear()


def test_threads_of_one_session_leave_the_cores_to_the_other(tiny_artifact: Path) -> None:
    sessions = load(tiny_artifact, provider="cpu").sessions
    entry = sessions.prefill.get_session_options().get_session_config_entry
    assert entry("session.force_spinning_stop") == "1"
    entry = sessions.decode.get_session_options().get_session_config_entry
    assert entry("session.intra_op.spin_duration_us") == str(BETWEEN_STEPS_US)


@pytest.mark.parametrize(("provider", "waits"), [(CUDA, True), (CPU, False)])
def test_generations_of_several_threads_take_turns_on_a_gpu(tiny_artifact: Path, provider: str, waits: bool) -> None:
    """A capture in one thread fails if another one calls CUDA meanwhile."""
    generation = load(tiny_artifact, provider=CPU).generate([3, 4, 5], max_new_tokens=2)
    generation._provider = provider
    tokens, runs = [], threading.Event()

    def work() -> None:
        runs.set()
        tokens.append(next(generation))

    thread = threading.Thread(target=work, daemon=True)
    with alone_on(provider), alone_on(provider):
        thread.start()
        assert runs.wait(60)
        thread.join(1 if waits else 60)
        assert len(tokens) == (0 if waits else 1)
    thread.join(60)
    assert len(tokens) == 1
