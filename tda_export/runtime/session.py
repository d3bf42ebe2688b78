"""The two ONNX Runtime sessions of an artifact, with one copy of the weights."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from tda_export.errors import TdaError, UsageError, first_line, shown
from tda_export.graph import contract, operators
from tda_export.native.library import native_problem, register_native, warn_once
from tda_export.runtime import huge_pages
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.cuda_stream import Mark, StepStream, step_stream
from tda_export.runtime.graph_check import check_graph
from tda_export.runtime.providers import CUDA, EXECUTION_PROVIDERS, provider_arguments

ERRORS_ONLY = 3  # ONNX Runtime warns of every input that has a default
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
STORAGE = {"bfloat16": "uint16"}  # numpy has no bfloat16; uint16 holds its bits
THREADS = "TDA_EXPORT_THREADS"  # environment variable: threads of a session on the CPU; all cores unless it is set
MOST_THREADS = 1024
BETWEEN_STEPS_US = 500  # what a caller may take between two steps, in microseconds; to wake a thread takes up to 100
GRAPH_ID = "gpu_graph_id"  # a run option: which captured graph to replay
ASYNCHRONOUS = "disable_synchronize_execution_providers"  # a run option: do not wait for the GPU
NO_GRAPH = "-1"
KERNEL_ERROR = f"{operators.FUNCTION_DOMAIN}::"  # how the native library begins its errors

_cuda_lock = threading.RLock()


def alone_on(provider: str) -> contextlib.AbstractContextManager[object]:
    """Let one thread of this process at a time into such blocks on CUDA; on the CPU let all in.

    A capture of a step fails if another thread allocates or copies memory on the GPU meanwhile. Sessions open and
    generations advance in such a block. What uses CUDA without one, such as PyTorch or a session of the caller's own,
    is not kept out. The same thread may enter again.
    """
    return _cuda_lock if provider == CUDA else contextlib.nullcontext()


class Sessions:
    """Prefill and decode of one artifact on one provider.

    `native` says whether the native kernels are in use: in both sessions, except on the CPU in prefill of prompt masks,
    whose statistics have kernels only for CUDA. Without native kernels the function bodies run, and a warning appears
    once on standard error. With them, decode on CUDA is captured as a CUDA graph.

    The weights are uploaded to CUDA, or read into huge pages on the CPU, once, and given to both sessions as
    initializers. Where there are no huge pages (`huge_pages.read_file`), both sessions map weights.bin into memory.
    Decode on the CPU also packs float weights of attention and head for its products, a copy that makes it faster;
    prefill does not, and FFN weights are not copied again.
    """

    def __init__(self, artifact: Artifact, provider: str) -> None:
        with alone_on(provider):
            self._open_both(artifact, provider)

    def _open_both(self, artifact: Artifact, provider: str) -> None:
        self.provider = provider
        self.shared_weights = upload_weights(artifact) if provider == CUDA else read_weights(artifact)
        self._graph_ids = itertools.count(1)
        self.priced = artifact.layout == "priced"
        self.two_levels: bool = not self.priced and artifact.manifest["method"]["two_levels"]
        # The inputs with which decode reads every row; its defaults are the artifact's own.
        self.dense_inputs: dict[str, ort.OrtValue] = {}
        if self.two_levels:
            off = np.zeros(artifact.shape.num_layers, np.float32)
            self.dense_inputs = {contract.TOKEN_THRESHOLDS: device_tensor(off, provider)}
        elif self.priced:
            self.dense_inputs = {contract.PRICE: device_tensor(np.zeros(1, np.float32), provider)}
        problem = _native_problem(artifact, provider)
        if problem is None:
            try:
                self._open(artifact, native=True)
                return
            except TdaError as error:
                if KERNEL_ERROR not in str(error):  # not an error of the kernels, such as a missing compiler
                    raise
                problem = str(error)
        warn_once(problem)
        self._open(artifact, native=False)

    def _open(self, artifact: Artifact, *, native: bool) -> None:
        provider = self.provider
        self.native = native
        self.captures = native and provider == CUDA
        self.stream = step_stream() if self.captures else None  # of captured calls
        # The kernel that selects by threshold pads masks to the number of all neurons, so that buffers keep their size.
        self.pads_masks = self.captures and artifact.manifest["method"].get("selection") == "threshold"
        prefill, decode = contract.PREFILL_FILE, contract.DECODE_FILE
        weights = self.weights_of(artifact, prefill)
        self.prefill = open_session(
            artifact, prefill, provider, weights, native=native and (provider == CUDA or self.priced)
        )
        self.decode = open_session(
            artifact,
            decode,
            provider,
            self.weights_of(artifact, decode),
            native=native,
            capture=self.captures,
            wait_us=BETWEEN_STEPS_US,
            # Function bodies of a priced artifact multiply by whole matrices, which need no second copy.
            prepack=native or not self.priced,
        )
        declared = contract.graph_io(artifact.shape, artifact.layout, two_levels=self.two_levels)
        check_graph(self.prefill, artifact.file(prefill), *declared[prefill])
        check_graph(self.decode, artifact.file(decode), *declared[decode])

    def weights_of(self, artifact: Artifact, file: str) -> dict[str, ort.OrtValue]:
        """Return the shared weights that a graph reads, none where it maps weights.bin itself."""
        if not self.shared_weights:
            return {}
        return {name: self.shared_weights[name] for name in artifact.manifest["graph_weights"][file]}

    def next_graph_id(self) -> str:
        """Return a number for another captured graph of the decode session."""
        return str(next(self._graph_ids))


def _native_problem(artifact: Artifact, provider: str) -> str | None:
    if provider != CUDA and artifact.shape.dtype != "float32":
        return f"on the CPU they compute in float32 alone, and this artifact is {artifact.shape.dtype}"
    return native_problem()


def open_session(
    artifact: Artifact,
    graph: str | bytes,
    provider: str,
    weights: dict[str, ort.OrtValue],
    *,
    native: bool = False,
    capture: bool = False,
    prepack: bool = False,
    wait_us: int = 0,
) -> ort.InferenceSession:
    """Open one graph.

    Args:
        artifact: The artifact of the graph.
        graph: The file name of a graph, or a model derived from the artifact that refers to its weights.bin.
        provider: `cpu` or `cuda`.
        weights: Weights by name, which replace those that the graph refers to.
        native: Register the native kernels.
        capture: Capture runs as CUDA graphs, except runs with `NO_GRAPH`.
        prepack: Let ONNX Runtime copy constant weights of products into the layout that its kernels prefer.
        wait_us: For how long the session's threads on the CPU wait busily for the next run, in microseconds.

    Raises:
        TdaError: ONNX Runtime cannot load the graph, or cannot start the provider.
    """
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if threads := os.environ.get(THREADS):
        options.intra_op_num_threads = _thread_count(threads)
    if provider != CUDA:
        # Each session has its own threads. By default those of prefill would wait busily for tens of milliseconds after
        # the prompt and take the cores from the first steps of decode.
        if wait_us > 0:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(wait_us))
        else:
            options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
    if isinstance(graph, bytes):
        folder = str(artifact.weights_file.parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    if native:
        register_native(options)
    for name, value in weights.items():
        options.add_initializer(name, value)
    place = artifact.file(graph) if isinstance(graph, str) else artifact.folder
    model = str(place) if isinstance(graph, str) else graph
    try:
        session = ort.InferenceSession(model, options, providers=provider_arguments(provider, capture=capture))
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        raise TdaError(
            f"{place}: ONNX Runtime {ort.__version__} cannot load it ({first_line(error)}). "
            "Run 'tda-export verify' on the artifact."
        ) from error
    if session.get_providers()[0] != EXECUTION_PROVIDERS[provider]:
        raise TdaError(
            "ONNX Runtime could not start CUDA (its CUDA or cuDNN libraries are missing). Install "
            "'tda-export[cuda]', or use --provider cpu."
        )
    return session


def _thread_count(given: str) -> int:
    if not given.isdecimal() or len(given) > len(str(MOST_THREADS)) or not 1 <= int(given) <= MOST_THREADS:
        raise UsageError(
            f"{THREADS}={shown(given)}: give a whole number of threads from 1 to {MOST_THREADS}, or leave it out for "
            "all cores."
        )
    return int(given)


class Call:
    """One run of a session with its inputs and outputs bound. It may be run again with the same bindings.

    In a session that captures, `graph_id` names the captured graph: the first run captures it, which takes several
    internal runs and needs every input and output bound to device memory. `stream`, where given, is the session's own:
    then `start` returns before the GPU has finished, and `wait` waits for it.
    """

    def __init__(
        self, session: ort.InferenceSession, graph_id: str = NO_GRAPH, stream: StepStream | None = None
    ) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._outputs: list[str] = []
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(GRAPH_ID, graph_id)
        self._end = Mark(stream) if stream else None
        if stream:
            self._options.add_run_config_entry(ASYNCHRONOUS, "1")

    def feed(self, name: str, value: ort.OrtValue | np.ndarray) -> None:
        """Bind an input: a value in place, or an array that is copied to the device."""
        with _onnxruntime():
            if isinstance(value, np.ndarray):
                self._binding.bind_cpu_input(name, value)
            else:
                self._binding.bind_ortvalue_input(name, value)

    def write_to(self, name: str, value: ort.OrtValue) -> None:
        """Bind an output to existing memory."""
        with _onnxruntime():
            self._binding.bind_ortvalue_output(name, value)
        self._outputs.append(name)

    def allocate(self, name: str, device: str) -> None:
        """Let the next run allocate an output on `cpu` or `cuda`; later runs write to the same memory."""
        with _onnxruntime():
            self._binding.bind_output(name, device)
        if name not in self._outputs:
            self._outputs.append(name)

    def run(self) -> dict[str, ort.OrtValue]:
        """Run and return the outputs by name."""
        self.run_only()
        return dict(zip(self._outputs, self._binding.get_outputs(), strict=True))

    def run_only(self) -> None:
        """Run without returning outputs, for outputs that are bound to the caller's memory."""
        self.start()
        self.wait()

    def start(self) -> None:
        """Run; with a stream, only put the run on it."""
        with _onnxruntime():
            self._session.run_with_iobinding(self._binding, self._options)
        if self._end:
            self._end.set()

    def wait(self) -> None:
        """Wait until the run that was started last has finished."""
        if self._end:
            self._end.wait()


class _onnxruntime:
    """Turns an exception of ONNX Runtime within the block into an error of one line."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):  # ONNX Runtime's exceptions share no narrower base
            raise TdaError(
                f"ONNX Runtime failed ({first_line(error)}). Run 'tda-export verify' on the artifact."
            ) from error


def device_tensor(array: np.ndarray, provider: str, dtype: str | None = None) -> ort.OrtValue:
    """Copy an array to the provider's memory; for `dtype` bfloat16 the array holds the bits as uint16."""
    array = np.ascontiguousarray(array)
    if dtype != "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy(array, provider, 0)
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, ONNX_TYPES[dtype], provider, 0)
    value.update_inplace(array)
    return value


def empty_tensor(shape: tuple[int, ...], dtype: str, provider: str) -> ort.OrtValue:
    """Allocate an array of zeros in the provider's memory."""
    return device_tensor(np.zeros(shape, STORAGE.get(dtype, dtype)), provider, dtype)


def empty_tensors(arrays: Sequence[tuple[Sequence[int], str]], provider: str) -> list[ort.OrtValue]:
    """Allocate arrays of zeros, for (shape, dtype) each: in the provider's memory, on the CPU in huge pages."""
    if provider == CUDA or any(dtype in STORAGE for _, dtype in arrays):
        return [empty_tensor(tuple(shape), dtype, provider) for shape, dtype in arrays]
    return huge_pages.zeros(arrays)


def initializer(array: np.ndarray, provider: str, dtype: str) -> ort.OrtValue:
    """Copy an array to where sessions can share it as an initializer."""
    value = device_tensor(array, provider, dtype)
    # On a device, a value taken through DLPack counts as the user's own, as add_initializer requires.
    return ort.OrtValue.from_dlpack(value) if provider == CUDA else value


def upload_weights(artifact: Artifact) -> dict[str, ort.OrtValue]:
    """Copy weights.bin to the GPU, tensor by tensor, for any number of sessions to share."""
    return {
        name: initializer(map_weight(artifact, name), CUDA, entry["dtype"])
        for name, entry in artifact.manifest["weights"].items()
    }


def read_weights(artifact: Artifact) -> dict[str, ort.OrtValue]:
    """Read weights.bin into huge pages, for any number of sessions to share on the CPU.

    Returns:
        Nothing where the mapped file serves as well (`huge_pages.read_file`), or for bfloat16, which numpy lacks.
    """
    entries = artifact.manifest["weights"]
    if any(entry["dtype"] in STORAGE for entry in entries.values()):
        return {}
    size = artifact.manifest["files"][contract.WEIGHTS_FILE]["size"]
    if (memory := huge_pages.read_file(artifact.weights_file, size)) is None:
        return {}
    return {
        name: huge_pages.in_place(np.ndarray(entry["shape"], entry["dtype"], memory.data, entry["offset"]))
        for name, entry in entries.items()
    }


def map_weight(artifact: Artifact, name: str) -> np.ndarray:
    """Map one tensor of weights.bin into memory; bfloat16 as its bits in uint16."""
    entry = artifact.manifest["weights"][name]
    return np.memmap(
        artifact.file(contract.WEIGHTS_FILE),
        dtype=STORAGE.get(entry["dtype"], entry["dtype"]),
        mode="r",
        offset=entry["offset"],
        shape=tuple(entry["shape"]),
    )
