"""Compare prices: dense with ONNX Runtime's own operators, dense by the row kernel, and at one or several prices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from tda_export.bench.decode import SECOND_LEVEL_FACTOR, Bench, BenchSettings
from tda_export.bench.runners import DenseRunner, greedy_steps
from tda_export.deployments import chosen_price
from tda_export.errors import TdaError
from tda_export.evaluation.priced_setting import NO_MASK, PricedSetting, open_priced
from tda_export.graph import contract
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import decode
from tda_export.runtime.priced import PricedPrefill, PricedStep
from tda_export.runtime.session import Sessions, device_tensor, open_session

COUNTED_TOKENS = 64  # the number of tokens whose rows are counted


class PricedRunner:
    """The artifact's decode graph at a price."""

    def __init__(self, artifact: Artifact, sessions: Sessions, capacity: int, price: float) -> None:
        self.price = price
        self._step = PricedStep(sessions, artifact.shape, capacity)
        self._step.follow(PriceDeployment(price))
        self._step.capture()
        self.written: list[int] = []

    def prefill(self, prompt: Sequence[int]) -> None:
        self._step.cache.truncate(0)
        self._next: int | None = int(self._step.begin(prompt, PriceDeployment(self.price)).argmax())
        self.written = [self._next]

    def steps(self, count: int) -> list[int]:
        tokens = greedy_steps(self._step, self._next, count)
        self._next = None
        self.written += tokens
        return tokens

    def logits(self, token: int) -> np.ndarray:
        logits = self._step.logits(token)
        self._step.cache.truncate(self._step.cache.length - 1)
        return logits


class PricedBench(Bench):
    """Benchmarks a priced artifact."""

    def __init__(
        self, artifact: Artifact, sessions: Sessions, settings: BenchSettings, prompt: list[int], capacity: int
    ) -> None:
        super().__init__(artifact, sessions, settings, prompt, capacity)
        for method in settings.methods:
            if method == "dense":
                self.runners["dense"] = DenseRunner(artifact, sessions, capacity)
            elif method == "dense_native":
                self.runners["dense_native"] = PricedRunner(artifact, sessions, capacity, 0.0)
            else:
                chosen = settings.prices or {"priced": chosen_price(artifact, sparsity=settings.sparsity).price}
                for name, price in chosen.items():
                    self.runners[name] = PricedRunner(artifact, sessions, capacity, price)

    @cached_property
    def _body(self) -> Sessions:
        """Sessions whose decode runs the function bodies."""
        sessions, artifact = copy.copy(self.sessions), self.artifact
        weights = sessions.weights_of(artifact, contract.DECODE_FILE)
        sessions.decode = open_session(artifact, contract.DECODE_FILE, sessions.provider, weights)
        return sessions

    def check(self) -> None:
        token, shape = self.prompt[-1], self.artifact.shape
        for name, runner in self.runners.items():
            runner.prefill(self.prompt)
            found = runner.logits(token)
            if not isinstance(runner, PricedRunner):
                if not np.isfinite(found).all():
                    raise TdaError(f"{name}: its logits are not finite, so nothing was timed.")
                continue
            cache = KvCache(shape, self.sessions.provider, self.capacity)
            PricedPrefill(self._body, shape, cache).read(self.prompt)
            given = {contract.PRICE: device_tensor(np.array([runner.price], np.float32), self.sessions.provider)}
            expected = decode(self._body, cache, [token], None, given)[0]
            # Rounding decides whether rows just worth the price are read.
            self.compare(name, found, expected, SECOND_LEVEL_FACTOR if runner.price > 0 else 1.0)
        del self._body

    def bytes_read(self, name: str) -> tuple[int, int]:
        runner = self.runners[name]
        if not isinstance(runner, PricedRunner) or runner.price <= 0:
            return self.artifact.sparse_bytes, self.other_bytes
        setting: PricedSetting = open_priced("priced", self.artifact, self.sessions, PriceDeployment(runner.price), {})
        cache = KvCache(self.artifact.shape, self.sessions.provider, self.capacity)
        setting.read(self.prompt, cache)
        counted = setting.decode_counted(
            cache, runner.written[: min(COUNTED_TOKENS, self.settings.new_tokens)], NO_MASK
        )
        ffn = counted.ffn_share * self.artifact.dense_ffn_bytes
        attention = counted.attention_share * (self.artifact.linear_bytes - self.artifact.dense_ffn_bytes)
        return round(ffn + attention), self.other_bytes - round((1 - counted.head_share) * self.artifact.head.bytes)
