"""Compare methods of prompt masks: dense, TDA with one and two levels, Griffin, threshold truncation.

The prompt mask is cut by rank at exactly the requested sparsity, so that all methods read equally many bytes.
"""

from __future__ import annotations

import numpy as np

from tda_export.bench.decode import GATE_SHARE, SECOND_LEVEL_FACTOR, Bench, BenchSettings
from tda_export.bench.probe import Probe
from tda_export.bench.runners import (
    BodyLogits,
    DenseRunner,
    Runner,
    SparseRunner,
    TruncationRunner,
    truncated_logits,
)
from tda_export.errors import TdaError, UsageError
from tda_export.ffn_share import truncation_share, two_level_share
from tda_export.graph.derive import artifact_method, derived_sessions
from tda_export.graph.method import griffin
from tda_export.runtime.artifact import Artifact
from tda_export.runtime.session import Sessions


class MaskBench(Bench):
    """Benchmarks an artifact with prompt masks."""

    def __init__(
        self, artifact: Artifact, sessions: Sessions, settings: BenchSettings, prompt: list[int], capacity: int
    ) -> None:
        super().__init__(artifact, sessions, settings, prompt, capacity)
        self.probe = Probe(artifact, sessions, prompt)
        self.token_thresholds: np.ndarray | None = None
        self.up_down_density = 1.0
        for name in settings.methods:
            self.runners[name] = getattr(self, f"_make_{name}")()

    def _make_dense(self) -> Runner:
        return DenseRunner(self.artifact, self.sessions, self.capacity)

    def _make_dense_native(self) -> Runner:
        return SparseRunner(self.artifact, self.sessions, self.capacity, masked=False)

    def _make_tda(self) -> Runner:
        self._require_thresholds("tda")
        runner = SparseRunner(self.artifact, self.sessions, self.capacity)
        runner.thresholds = self.probe.score_thresholds(1.0 - self.settings.sparsity)
        return runner

    def _make_griffin(self) -> Runner:
        sessions = derived_sessions(self.artifact, self.sessions, griffin(self.settings.sparsity))
        return SparseRunner(self.artifact, sessions, self.capacity)

    def _require_thresholds(self, name: str) -> None:
        method = artifact_method(self.artifact)
        if method.selection != "threshold":
            raise UsageError(
                f"{self.artifact.folder} was built with --method {method.name}, which {name} cannot be derived from. "
                "Give an artifact of --method tda."
            )

    def _make_two_levels(self) -> Runner:
        self._require_thresholds("two_levels")
        if not artifact_method(self.artifact).two_levels:
            raise UsageError(f"{self.artifact.folder} was built without token thresholds. Leave two_levels out.")
        kept = 1.0 - self.settings.sparsity
        mask_density = min(1.0, GATE_SHARE * kept)
        runner = SparseRunner(self.artifact, self.sessions, self.capacity)
        runner.thresholds = self.probe.score_thresholds(mask_density)
        runner.prefill(self.prompt)
        assert runner.mask is not None
        matrices = self.artifact.ffn_matrices
        wanted = (matrices * kept - mask_density) / (matrices - 1)
        self.token_thresholds, self.up_down_density = self.probe.token_thresholds(runner, wanted)
        runner.token_thresholds = self.token_thresholds
        return runner

    def _make_tt(self) -> Runner:
        self.truncation_thresholds = self.probe.truncation_thresholds(1.0 - self.settings.sparsity)
        return TruncationRunner(self.artifact, self.sessions, self.capacity, self.truncation_thresholds)

    def check(self) -> None:
        """Compare each method's logits after the prompt and one token with another way to compute them."""
        token = self.prompt[-1]
        found = {}
        for name, runner in self.runners.items():
            runner.prefill(self.prompt)
            found[name] = runner.logits(token)
        body = BodyLogits(self.artifact, self.sessions, self.capacity)
        for name, logits in found.items():
            runner = self.runners[name]
            if name == "dense_native" and "dense" in found:
                self.compare(name, logits, found["dense"])
            elif isinstance(runner, SparseRunner):
                level = self.token_thresholds if name == "two_levels" else None
                factor = SECOND_LEVEL_FACTOR if name == "two_levels" else 1.0
                self.compare(name, logits, body.after(runner, self.prompt, token, level), factor)
            elif name == "tt":
                thresholds = self.truncation_thresholds
                expected = truncated_logits(self.artifact, self.sessions, self.prompt, token, thresholds)
                self.compare(name, logits, expected, SECOND_LEVEL_FACTOR)
            elif not np.isfinite(logits).all():
                raise TdaError(f"{name}: its logits are not finite, so nothing was timed.")

    def bytes_read(self, name: str) -> tuple[int, int]:
        artifact, shape = self.artifact, self.artifact.shape
        runner, ffn = self.runners[name], artifact.dense_ffn_bytes
        if isinstance(runner, SparseRunner):
            neurons = shape.num_layers * shape.ffn_size
            masked = runner.mask.count(shape.num_layers) / neurons if runner.mask is not None else 1.0
            skipping = self.up_down_density if name == "two_levels" else masked * self.probe.active_share(runner)
            ffn = round(ffn * two_level_share(masked, skipping, artifact.ffn_matrices))
        if isinstance(runner, TruncationRunner):
            ffn = round(ffn * truncation_share(runner.density, artifact.ffn_matrices))
        return ffn, self.other_bytes
