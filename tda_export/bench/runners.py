"""A runner is one way of generating from an artifact: prefill a prompt, then one greedy token after another."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.dense import transposed_weights
from tda_export.graph.derive import (
    derived_dense,
    derived_probe,
    derived_truncation,
    initializer_names,
    truncation_sessions,
)
from tda_export.graph.greedy import greedy_model
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.decode_step import DecodeStep
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import EMPTY, PromptMask, bind_call, prefill
from tda_export.runtime.providers import CUDA
from tda_export.runtime.session import (
    BETWEEN_STEPS_US,
    NO_GRAPH,
    Call,
    Sessions,
    device_tensor,
    empty_tensor,
    initializer,
    map_weight,
    open_session,
)
from tda_export.runtime.token_step import TokenStep


class Runner(Protocol):
    """Prefill a prompt, then step, each step started as early as the last one allows; `logits` are those after a given
    token, float32 [V]."""

    def prefill(self, prompt: Sequence[int]) -> None: ...

    def steps(self, count: int) -> list[int]: ...

    def logits(self, token: int) -> np.ndarray: ...


def greedy_steps(step: TokenStep, token: int | None, count: int) -> list[int]:
    """Decode `count` tokens after `token` (None: the one chosen last)."""
    chosen = []
    for left in reversed(range(count)):
        chosen.append(step.greedy(token, ahead=left > 0))
        token = None
    return chosen


class SparseRunner:
    """The artifact's decode graph: with every neuron, or with the prompt mask."""

    def __init__(self, artifact: Artifact, sessions: Sessions, capacity: int, *, masked: bool = True) -> None:
        self._artifact, self.sessions, self.masked = artifact, sessions, masked
        self.thresholds: np.ndarray | None = None  # replaces the artifact's own
        self.mask: PromptMask | None = None
        self.token_thresholds: np.ndarray | None = None  # float32 [L], thresholds of the second level
        self._step = DecodeStep(self.sessions, self._artifact.shape, capacity)
        self._step.capture()

    @property
    def second_level(self) -> bool:
        """Whether tokens skip further neurons of the prompt mask."""
        return self.token_thresholds is not None

    def prefill(self, prompt: Sequence[int]) -> None:
        step = self._step
        step.cache.truncate(0)
        logits, mask = step.read(prompt, self.thresholds)
        step.use(mask if self.masked else None, self.token_thresholds)
        self.mask = mask if self.masked else None
        self._next: int | None = int(logits.argmax())

    def steps(self, count: int) -> list[int]:
        tokens = greedy_steps(self._step, self._next, count)
        self._next = None
        return tokens

    def logits(self, token: int) -> np.ndarray:
        logits = self._step.logits(token)
        self._step.cache.truncate(self._step.cache.length - 1)
        return logits


class DenseRunner:
    """The plain dense graph, captured on CUDA, with the settings that are fastest in ONNX Runtime."""

    functions = False  # whether the graph calls functions that native kernels may replace

    def __init__(self, artifact: Artifact, sessions: Sessions, capacity: int) -> None:
        provider, shape = sessions.provider, artifact.shape
        model, weights = self._graph(artifact, sessions)
        names = initializer_names(model)
        self._weights = {name: value for name, value in weights.items() if name in names}
        captures = provider == CUDA
        options: dict[str, Any] = {"native": sessions.native and self.functions}
        self._session = open_session(
            artifact,
            model,
            provider,
            self._weights,
            capture=captures,
            prepack=True,
            wait_us=BETWEEN_STEPS_US,
            **options,
        )
        # A session that captures is slower at runs that it does not capture.
        prompts = open_session(artifact, model, provider, self._weights, **options) if captures else self._session
        self._cache = KvCache(shape, provider, capacity)
        self._token = device_tensor(np.zeros((1, 1), np.int64), provider)
        self._attended = device_tensor(self._cache.mask, provider)
        self._logits = empty_tensor((1, 1, shape.vocab_size), "float32", provider)
        self._call = self._bound(self._session, self._logits, "1" if captures else NO_GRAPH)
        self._call.feed(contract.INPUT_IDS, self._token)
        self._call.feed(contract.ATTENTION_MASK, self._attended)
        self._prompt_logits = empty_tensor((1, 1, shape.vocab_size), "float32", "cpu")
        self._prompt_call = self._bound(prompts, self._prompt_logits, NO_GRAPH)
        # The next token is chosen on the device, as in the other runners and other stacks, outside the graph.
        choose = open_session(
            artifact, greedy_model(shape.vocab_size), provider, {}, native=sessions.native, capture=captures
        )
        self._choose = Call(choose, "1" if captures else NO_GRAPH)
        self._choose.feed(contract.LOGITS, self._logits)
        self._choose.write_to(contract.GREEDY_TOKENS, self._token)
        self._run(0)  # captures the graph
        self._choose.run_only()
        self._cache.truncate(0)

    @staticmethod
    def _graph(artifact: Artifact, sessions: Sessions) -> tuple[bytes, dict[str, Any]]:
        """Return the graph and the weights that it may read."""
        weights = dict(sessions.shared_weights)
        for name, original in transposed_weights(artifact.matrices).items():
            array = _transposed(map_weight(artifact, original))
            dtype = artifact.manifest["weights"][original]["dtype"]
            weights[name] = initializer(array, sessions.provider, dtype)
        return derived_dense(artifact), weights

    def _bound(self, session: ort.InferenceSession, logits: ort.OrtValue, graph_id: str) -> Call:
        call = Call(session, graph_id)
        self._cache.bind(call)
        call.write_to(contract.LOGITS, logits)
        return call

    def prefill(self, prompt: Sequence[int]) -> None:
        self._cache.truncate(0)
        self._cache.reserve(len(prompt))
        self._prompt_call.feed(contract.INPUT_IDS, np.array([list(prompt)], np.int64))
        self._prompt_call.feed(contract.ATTENTION_MASK, self._cache.mask)
        self._prompt_call.run_only()
        self._cache.commit()
        self._next: int | None = int(self._prompt_logits.numpy()[0, -1].argmax())

    def steps(self, count: int) -> list[int]:
        return [self._one() for _ in range(count)]

    def _one(self) -> int:
        self._run(self._next)
        self._next = None
        self._choose.run_only()
        return int(self._token.numpy()[0, 0])

    def logits(self, token: int) -> np.ndarray:
        self._run(token)
        self._cache.truncate(self._cache.length - 1)
        logits: np.ndarray = self._logits.numpy()[0, -1].copy()
        return logits

    def _run(self, token: int | None) -> None:
        self._cache.reserve(1)
        self._attended.update_inplace(self._cache.mask)
        if token is not None:
            self._token.update_inplace(np.array([[token]], np.int64))
        self._call.run_only()
        self._cache.commit()


class TruncationRunner(DenseRunner):
    """Threshold truncation (`graph/truncation.py`): prompts are read by the artifact's own prefill.

    It drops each token's small neurons with stock operators, which still read every row.
    """

    functions = True

    def __init__(self, artifact: Artifact, sessions: Sessions, capacity: int, thresholds: np.ndarray) -> None:
        shape = artifact.shape
        self._sessions, self._shape = sessions, shape
        self._thresholds = device_tensor(thresholds, sessions.provider)
        self._kept = empty_tensor((shape.num_layers, 1), "int64", sessions.provider)
        super().__init__(artifact, sessions, capacity)

    @staticmethod
    def _graph(artifact: Artifact, sessions: Sessions) -> tuple[bytes, dict[str, Any]]:
        return derived_truncation(artifact), dict(sessions.shared_weights)

    def _bound(self, session: ort.InferenceSession, logits: ort.OrtValue, graph_id: str) -> Call:
        call = super()._bound(session, logits, graph_id)
        call.feed(contract.THRESHOLDS, self._thresholds)
        call.write_to(contract.KEPT_NEURONS, self._kept)
        return call

    @property
    def density(self) -> float:
        """Return the share of neurons that the last token kept."""
        return float(self._kept.numpy().mean()) / self._shape.ffn_size

    def prefill(self, prompt: Sequence[int]) -> None:
        self._cache.truncate(0)
        logits, _ = prefill(self._sessions, self._shape, prompt, self._cache)
        self._next = int(logits.argmax())


def truncated_logits(
    artifact: Artifact, sessions: Sessions, prompt: Sequence[int], token: int, thresholds: np.ndarray
) -> np.ndarray:
    """Compute the logits of threshold truncation after a prompt and one token, uncaptured, without native kernels."""
    stock = copy.copy(sessions)
    stock.native = False
    derived = truncation_sessions(artifact, stock)
    cache = KvCache(artifact.shape, sessions.provider, len(prompt) + 1)
    prefill(sessions, artifact.shape, prompt, cache)
    inputs = {contract.THRESHOLDS: device_tensor(thresholds, sessions.provider)}
    return bind_call(derived.decode, cache, [token], inputs).run()[contract.LOGITS].numpy()[0, -1]


class BodyLogits:
    """The function body's logits under a prompt mask: a slow way to the same logits, for checks."""

    def __init__(self, artifact: Artifact, sessions: Sessions, capacity: int) -> None:
        self._artifact, self._capacity = artifact, capacity
        self._sessions = copy.copy(sessions)
        weights = sessions.weights_of(artifact, contract.DECODE_FILE)
        self._sessions.decode = open_session(artifact, contract.DECODE_FILE, sessions.provider, weights)

    def after(
        self,
        runner: SparseRunner,
        prompt: Sequence[int],
        token: int,
        token_thresholds: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read a prompt, then one token under the mask that `runner` would use; return logits, float32 [V].

        Without token thresholds no neuron of the mask is skipped, whatever the artifact's own thresholds are.
        """
        sessions, shape = self._sessions, self._artifact.shape
        cache = KvCache(shape, sessions.provider, self._capacity)
        _, mask = prefill(runner.sessions, shape, prompt, cache, runner.thresholds)
        inputs = sessions.dense_inputs | (mask.inputs if runner.masked else {})
        for layer in range(shape.num_layers if runner.masked else 0):
            kept = mask.indices(layer)  # unpadded, since the body gathers a row for every entry
            if len(kept):
                inputs[contract.mask_indices(layer)] = device_tensor(kept, sessions.provider)
        if token_thresholds is not None:
            inputs[contract.TOKEN_THRESHOLDS] = device_tensor(token_thresholds, sessions.provider)
        return bind_call(sessions.decode, cache, [token], inputs).run()[contract.LOGITS].numpy()[0, -1]


def ffn_inputs(
    artifact: Artifact, sessions: Sessions, prompt: Sequence[int], tokens: Sequence[int]
) -> list[np.ndarray]:
    """Read a prompt and then given tokens densely, and return every FFN's input for the given tokens: L arrays [S, M].

    Half precision comes back as float32 too.
    """
    provider, shape = sessions.provider, artifact.shape
    model = derived_probe(artifact)
    names = initializer_names(model)
    weights = {name: value for name, value in sessions.shared_weights.items() if name in names}
    session = open_session(artifact, model, provider, weights, native=sessions.native)
    cache = KvCache(shape, provider, len(prompt) + len(tokens))
    prefill(sessions, shape, prompt, cache)
    call = bind_call(session, cache, tokens, EMPTY)
    for layer in range(shape.num_layers):
        call.allocate(contract.ffn_input(layer), provider)
    outputs = call.run()
    import torch

    return [
        torch.from_dlpack(outputs[contract.ffn_input(layer)])[0].float().cpu().numpy()
        for layer in range(shape.num_layers)
    ]


def _transposed(array: np.ndarray) -> np.ndarray:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of a read-only array
        tensor: torch.Tensor = torch.from_numpy(array).T.contiguous()  # faster than numpy's
    return tensor.numpy()
