"""Decode one token after another under a prompt mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from tda_export.graph import contract
from tda_export.graph.contract import ModelShape
from tda_export.runtime.deployment import AnyDeployment, Deployment
from tda_export.runtime.phases import CHUNK_TOKENS, Prefill, PromptMask
from tda_export.runtime.session import STORAGE, Call, Sessions, device_tensor, empty_tensor
from tda_export.runtime.token_step import DENSE, Reading, TokenStep, Width


class DecodeStep(TokenStep):
    """Decodes one token at a time with a prompt mask, or densely.

    The step owns the memory of its prompt masks. With native kernels on CUDA, masks and tail means lie in
    `fixed_inputs`, to which prefill writes. Indices are padded to the number of all neurons, so one captured graph
    serves every prompt.

    Without native kernels a dense step runs the prefill graph with S = 1, which reads the weights in place; the
    function body would gather every row.
    """

    def __init__(self, sessions: Sessions, shape: ModelShape, capacity: int) -> None:
        super().__init__(sessions, shape, capacity)
        self.fixed_inputs: dict[str, ort.OrtValue] = {}
        self.mask: PromptMask | None = None  # of the tokens that `begin` read last
        self._every_logit = device_tensor(np.zeros(1, np.int64), sessions.provider)
        self._second_level: dict[str, ort.OrtValue] = {}
        provider, layers = sessions.provider, range(shape.num_layers)
        if sessions.two_levels:
            self._second_level[contract.TOKEN_THRESHOLDS] = empty_tensor((shape.num_layers,), "float32", provider)
        if sessions.captures:
            indices = {contract.mask_indices(i): device_tensor(self._every_neuron(), provider) for i in layers}
            tails = {contract.tail_mean(i): device_tensor(self._no_tail(), provider, shape.dtype) for i in layers}
            self.fixed_inputs = indices | tails
        self._inputs: Mapping[str, ort.OrtValue] = self.fixed_inputs
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
            tokens: The newest n tokens. All but the last are in the cache.
            thresholds: As for `read`.
            decay: The factor of the statistics so far, which are added to those of these tokens.

        Returns:
            As `read`, with the prompt mask of all tokens in the statistics.
        """
        self.cache.truncate(self.cache.length - (len(tokens) - 1))
        return self.read(tokens, thresholds, decay=decay)

    def begin(self, tokens: Sequence[int], how: AnyDeployment, *, more: bool = False) -> np.ndarray:
        assert isinstance(how, Deployment)
        logits, self.mask = self.read(tokens, how.thresholds, prior=how.prior, decay=1.0 if more else None)
        return logits

    def refresh(self, tokens: Sequence[int], how: AnyDeployment) -> np.ndarray:
        assert isinstance(how, Deployment)
        logits, self.mask = self.reread(tokens, how.thresholds, how.refresh.decay)
        return logits

    def follow(self, how: AnyDeployment | None) -> Reading:
        if how is None:
            self.use(None)
            return DENSE
        assert isinstance(how, Deployment)
        assert self.mask is not None
        self.use(self.mask, how.token_thresholds, tail_mean=how.tail_mean)
        densities = self.mask.densities(self._shape.num_layers, self._shape.ffn_size)
        return Reading(float(densities.mean()), how.ffn_share(densities))

    def checkpoint(self) -> dict[str, np.ndarray]:
        """Copy the running statistics to the host (see `Prefill.statistics`)."""
        return self._prefill.statistics()

    def rewind(self, length: int, checkpoint: dict[str, np.ndarray]) -> None:
        super().rewind(length, checkpoint)
        self._prefill.restore(checkpoint)

    def use(
        self, mask: PromptMask | None, token_thresholds: np.ndarray | None = None, *, tail_mean: bool = True
    ) -> None:
        """Decode with a prompt mask from now on, or with every neuron.

        Args:
            mask: The prompt mask from `read`; None keeps every neuron.
            token_thresholds: float32 [L]; None skips no neuron of the mask.
            tail_mean: Replace the neurons outside the mask by its tail mean; otherwise by nothing.
        """
        layers = range(self._shape.num_layers)
        if self._second_level:
            off = token_thresholds is None or mask is None
            values = np.zeros(len(layers), np.float32) if off else np.asarray(token_thresholds, np.float32)
            self._second_level[contract.TOKEN_THRESHOLDS].update_inplace(values)
        if not self._sessions.captures:
            self._greedy = mask is not None or self._sessions.native
            if mask is not None and not tail_mean:
                mask = mask.without_tail()
            self._inputs = mask.inputs if mask else {}
            self._bind_anew()
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

    def _bind(self, width: Width) -> Call:
        if not self._greedy:
            call = Call(self._sessions.prefill)
            self._bind_tokens(call, width)
            call.feed(contract.NUM_LOGITS, self._every_logit)
            return call
        call = Call(self._sessions.decode, width.graph_id, self._sessions.stream)
        self._bind_tokens(call, width)
        for name, value in {**self._inputs, **self._second_level}.items():
            call.feed(name, value)
        call.write_to(contract.LOGITS, width.logits)
        call.write_to(contract.GREEDY_TOKENS, width.chosen)
        return call

    def _every_neuron(self) -> np.ndarray:
        return np.arange(self._shape.ffn_size, dtype=np.int32)

    def _no_tail(self) -> np.ndarray:
        return np.zeros(self._shape.hidden_size, STORAGE.get(self._shape.dtype, self._shape.dtype))
