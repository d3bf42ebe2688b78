"""The two ONNX Runtime sessions of an artifact, with one copy of the weights."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from tda_export.errors import TdaError, first_line
from tda_export.graph import contract
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.providers import CUDA, EXECUTION_PROVIDERS, provider_arguments

ERRORS_ONLY = 3  # ONNX Runtime warns of every input that has a default


class Sessions:
    """Prefill and decode of one artifact on one provider.

    On CUDA the weights are uploaded once and given to both sessions as initializers. On the CPU both map weights.bin
    into memory; prepacking would copy every MatMul weight for each session, so it is off.
    """

    def __init__(self, artifact: Artifact, provider: str) -> None:
        self.provider = provider
        self.shared_weights = upload_weights(artifact) if provider == CUDA else {}
        self.prefill = open_session(artifact, contract.PREFILL_FILE, provider, self.shared_weights)
        self.decode = open_session(artifact, contract.DECODE_FILE, provider, self.shared_weights)


def open_session(
    artifact: Artifact, file: str, provider: str, shared_weights: dict[str, ort.OrtValue]
) -> ort.InferenceSession:
    """Open one graph; `shared_weights` (by name, on the device) take the place of its own copies.

    Raises:
        TdaError: ONNX Runtime cannot load the graph, or cannot start the provider.
    """
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.disable_prepacking", "1")
    if shared_weights:
        for name in artifact.manifest["graph_weights"][file]:
            options.add_initializer(name, shared_weights[name])
    try:
        session = ort.InferenceSession(str(artifact.file(file)), options, providers=provider_arguments(provider))
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        raise TdaError(
            f"{artifact.file(file)}: ONNX Runtime {ort.__version__} cannot load it ({first_line(error)}). "
            "Run 'tda-export verify' on the artifact."
        ) from error
    if session.get_providers()[0] != EXECUTION_PROVIDERS[provider]:
        raise TdaError(
            "ONNX Runtime could not start CUDA (its CUDA or cuDNN libraries are missing). Install "
            "'tda-export[cuda]', or use --provider cpu."
        )
    return session


class Call:
    """One run of a session with its inputs and outputs bound; may be run again with the same bindings."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._outputs: list[str] = []

    def feed(self, name: str, value: ort.OrtValue | np.ndarray) -> None:
        """Bind an input: a value where it lies, or an array that is copied to the device."""
        if isinstance(value, np.ndarray):
            self._binding.bind_cpu_input(name, value)
        else:
            self._binding.bind_ortvalue_input(name, value)

    def write_to(self, name: str, value: ort.OrtValue) -> None:
        """Bind an output to memory that is there already."""
        self._binding.bind_ortvalue_output(name, value)
        self._outputs.append(name)

    def allocate(self, name: str, device: str) -> None:
        """Let the run allocate an output on `cpu` or `cuda`."""
        self._binding.bind_output(name, device)
        self._outputs.append(name)

    def run(self) -> dict[str, ort.OrtValue]:
        """Run and return the outputs by name."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise TdaError(
                f"ONNX Runtime failed ({first_line(error)}). Run 'tda-export verify' on the artifact."
            ) from error
        return dict(zip(self._outputs, self._binding.get_outputs(), strict=True))


def device_tensor(array: np.ndarray, provider: str) -> ort.OrtValue:
    """Copy an array to the provider's memory."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), provider, 0)


def empty_tensor(shape: tuple[int, ...], dtype: str, provider: str) -> ort.OrtValue:
    """Allocate an array of zeros in the provider's memory."""
    return device_tensor(np.zeros(shape, dtype), provider)


def upload_weights(artifact: Artifact) -> dict[str, ort.OrtValue]:
    """Copy weights.bin to the GPU, tensor by tensor, for any number of sessions to share."""
    shared = {}
    for name, entry in artifact.manifest["weights"].items():
        view = np.memmap(
            artifact.file(contract.WEIGHTS_FILE),
            dtype=entry["dtype"],
            mode="r",
            offset=entry["offset"],
            shape=tuple(entry["shape"]),
        )
        # A value taken through DLPack counts as the user's own, which add_initializer asks for.
        shared[name] = ort.OrtValue.from_dlpack(ort.OrtValue.ortvalue_from_numpy(view, CUDA, 0))
    return shared
