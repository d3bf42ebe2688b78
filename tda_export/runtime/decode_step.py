"""One token after another: everything bound once, and on CUDA captured once for every prompt."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import CHUNK_TOKENS, Prefill, PromptMask
from tda_export.runtime.session import STORAGE, Call, Sessions, device_tensor, empty_tensor


class _CapturedHere(threading.local):
    """The steps that this thread has captured. They go with it, as ONNX Runtime's captures do; its id comes again."""

    def __init__(self) -> None:
        self.steps: weakref.WeakSet[DecodeStep] = weakref.WeakSet()


_captured = _CapturedHere()


class DecodeStep:
    """Decodes one token at a time with a prompt's mask, or densely.

    The likeliest token is chosen where the logits are and written where the next step reads its input, so that greedy
    decoding copies one number to the host for each token.

    With native kernels on CUDA, masks and tail means lie in `fixed_inputs`, which prefill writes to: indices are padded
    to all neurons, so one captured graph serves every prompt. ONNX Runtime keeps captured graphs for each thread.

    Without native kernels a dense step runs the prefill graph with S = 1, which reads the weights in place: the
    function body would gather every row.
    """

    def __init__(self, sessions: Sessions, shape: ModelShape, capacity: int) -> None:
        self.cache = KvCache(shape, sessions.provider, capacity)
        self.fixed_inputs: dict[str, ort.OrtValue] = {}
        self._sessions, self._shape = sessions, shape
        self._second_level: dict[str, ort.OrtValue] = {}
        provider, layers = sessions.provider, range(shape.num_layers)
        if sessions.two_levels:
            self._second_level[contract.TOKEN_THRESHOLDS] = empty_tensor((shape.num_layers,), "float32", provider)
        self._token = device_tensor(np.zeros((1, 1), np.int64), provider)
        self._attended = device_tensor(self.cache.mask, provider)
        self._logits = empty_tensor((1, 1, shape.vocab_size), "float32", provider)
        self._greedy = True  # the call writes the next token itself
        if sessions.captures:
            indices = {contract.mask_indices(i): device_tensor(self._every_neuron(), provider) for i in layers}
            tails = {contract.tail_mean(i): device_tensor(self._no_tail(), provider, shape.dtype) for i in layers}
            self.fixed_inputs = indices | tails
            self._call = self._bind(self.fixed_inputs, sessions.next_graph_id())
        else:
            self.use(None)
        self._prefill = Prefill(sessions, shape, self.cache, self.fixed_inputs)

    def read(
        self,
        tokens: Sequence[int],
        thresholds: np.ndarray | None = None,
        *,
        prior: bool = True,
        decay: float | None = None,
        chunk: int = CHUNK_TOKENS,
    ) -> tuple[np.ndarray, PromptMask]:
        """Prefill a prompt (see `Prefill.read`)."""
        return self._prefill.read(tokens, thresholds, prior=prior, decay=decay, chunk=chunk)

    def reread(
        self, tokens: Sequence[int], thresholds: np.ndarray | None, decay: float
    ) -> tuple[np.ndarray, PromptMask]:
        """Refresh: read the last tokens densely, which replaces the keys and values that sparse steps left.

        Args:
            tokens: The newest n tokens, of which all but the last are in the cache.
            thresholds: As for `read`.
            decay: How much the statistics so far count beside these tokens.

        Returns:
            As `read`, with the mask of all that the statistics hold.
        """
        self.cache.truncate(self.cache.length - (len(tokens) - 1))
        return self.read(tokens, thresholds, decay=decay)

    def statistics(self) -> dict[str, np.ndarray]:
        """Copy the running statistics to the host (see `Prefill.statistics`)."""
        return self._prefill.statistics()

    def rewind(self, length: int, statistics: Mapping[str, np.ndarray]) -> None:
        """Go back to where the cache held `length` tokens, with the statistics of that time."""
        self.cache.truncate(length)
        self._prefill.restore(statistics)

    def use(
        self, mask: PromptMask | None, token_thresholds: np.ndarray | None = None, *, tail_mean: bool = True
    ) -> None:
        """Decode with a mask from now on, or with every neuron.

        Args:
            mask: Of `read`; None keeps every neuron.
            token_thresholds: float32 [L]; None skips no neuron of the mask.
            tail_mean: Put the mask's tail mean in place of the neurons outside it; otherwise nothing.
        """
        layers = range(self._shape.num_layers)
        if self._second_level:
            off = token_thresholds is None or mask is None
            values = np.zeros(len(layers), np.float32) if off else np.asarray(token_thresholds, np.float32)
            self._second_level[contract.TOKEN_THRESHOLDS].update_inplace(values)
        if not self._sessions.captures:
            if mask is None and not self._sessions.native:
                self._greedy = False
                self._call = self._bind_prefill()
            else:
                self._greedy = True
                if mask is not None and not tail_mean:
                    mask = mask.without_tail()
                self._call = self._bind(mask.inputs if mask else {})
            return
        for layer in layers:
            fixed = self.fixed_inputs[contract.mask_indices(layer)]
            if mask is None:
                fixed.update_inplace(self._every_neuron())
            elif mask.inputs[contract.mask_indices(layer)].data_ptr() != fixed.data_ptr():
                padded = np.full(self._shape.ffn_size, contract.PADDING_INDEX, np.int32)
                indices = mask.indices(layer)
                padded[: len(indices)] = indices
                fixed.update_inplace(padded)
            if mask is None or not tail_mean:
                self.fixed_inputs[contract.tail_mean(layer)].update_inplace(self._no_tail())

    def greedy(self, token: int | None = None) -> int:
        """Append `token` (None: the one chosen last) and return the likeliest next one, -1 if logits are not finite."""
        self._run(token)
        if self._greedy:
            return int(self._token.numpy()[0, 0])
        logits = self._logits.numpy()[0, -1]
        chosen = int(logits.argmax()) if np.isfinite(logits).all() else -1
        self._token.update_inplace(np.array([[chosen]], np.int64))
        return chosen

    def logits(self, token: int) -> np.ndarray:
        """Append `token` and return the next one's logits, float32 [V]."""
        self._run(token)
        return self._logits.numpy()[0, -1].copy()

    def _run(self, token: int | None) -> None:
        self.cache.reserve(1)
        self._attended.update_inplace(self.cache.mask)
        if self._sessions.captures and self not in _captured.steps:
            # A capture runs the step several times, each with the token that the one before chose: what it leaves at
            # the new token's place is written over by the run that counts.
            held = self._token.numpy().copy()
            self._call.run_only()
            self._token.update_inplace(held)
            _captured.steps.add(self)
        if token is not None:
            self._token.update_inplace(np.array([[token]], np.int64))
        self._call.run_only()
        self.cache.commit()

    def capture(self) -> None:
        """Capture the step for this thread before its first prompt, so that no token waits for it."""
        if self._sessions.captures and self not in _captured.steps:
            held = self.cache.length
            self._run(0)  # at the place of the next token, which is written over
            self.cache.truncate(held)

    def _bind(self, inputs: dict[str, ort.OrtValue], graph_id: str | None = None) -> Call:
        call = Call(self._sessions.decode, graph_id) if graph_id else Call(self._sessions.decode)
        self._bind_tokens(call)
        for name, value in (inputs | self._second_level).items():
            call.feed(name, value)
        call.write_to(contract.GREEDY_TOKENS, self._token)
        return call

    def _bind_prefill(self) -> Call:
        call = Call(self._sessions.prefill)
        self._bind_tokens(call)
        return call

    def _bind_tokens(self, call: Call) -> None:
        call.feed(contract.INPUT_IDS, self._token)
        call.feed(contract.ATTENTION_MASK, self._attended)
        self.cache.bind(call)
        call.write_to(contract.LOGITS, self._logits)

    def _every_neuron(self) -> np.ndarray:
        return np.arange(self._shape.ffn_size, dtype=np.int32)

    def _no_tail(self) -> np.ndarray:
        return np.zeros(self._shape.hidden_size, STORAGE.get(self._shape.dtype, self._shape.dtype))
