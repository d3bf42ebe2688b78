"""The second part of a calibration: the KL path, found on half of the sequences and measured on both halves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tda_export.calibration.curves import CurveSums
from tda_export.calibration.dense import Blended, DenseSequence, blend, read_dense
from tda_export.calibration.kl_path import (
    STEPS,
    WARM_UP,
    PathSearch,
    PathState,
    collect_estimates,
    densities_at,
)
from tda_export.calibration.kl_plan import SENSITIVITY_SEQUENCES, SETTLING_SEQUENCES, plan_for
from tda_export.calibration.kl_table import KlTable
from tda_export.calibration.marginals import EstimateHistogram, Level, score_thresholds
from tda_export.calibration.masked import LayerRun, choose_masking, down_weights, masked_kl, two_level_ffn
from tda_export.ffn_share import two_level_share
from tda_export.models.spec import DecoderSpec
from tda_export.progress import Advance
from tda_export.ranks import ALONE, Ranks

TINY = 1e-30

Row = tuple[torch.Tensor, ...]  # one row of each tensor of `KlTable` except the last, float32 on the CPU


@dataclass
class Sweep:
    """The progress of a run: the state of the path, and the measured rows, for the first ones of `KlPlan.settings`."""

    state: PathState
    rows: list[Row] = field(default_factory=list)

    def to(self, device: torch.device) -> Sweep:
        """Return the sweep with its state on a device."""
        return Sweep(self.state.to(device), self.rows)


def neuron_scales(model: Any, spec: DecoderSpec, sums: CurveSums) -> torch.Tensor:
    """Compute c_i = RMS(up_i · x) ||W_down[:, i]||, float32 [L, F], on the model's device."""
    norms = torch.stack([weight.float().norm(dim=0) for weight in down_weights(model, spec)])
    return sums.up_rms.float().to(norms.device) * norms


def find_path(
    model: Any,
    spec: DecoderSpec,
    tokens: torch.Tensor,
    prompt_tokens: int,
    scale: torch.Tensor,
    *,
    prior_tokens: float,
    seed: int,
    advance: Advance,
    resume: Sweep | None = None,
    save: Callable[[Sweep], None] = lambda sweep: None,
    ranks: Ranks = ALONE,
) -> KlTable:
    """Find the KL path and measure it.

    Args:
        model: A transformers model in evaluation mode.
        spec: Its architecture.
        tokens: int64 [N, P + C], N at least 2; even ones fit the path, odd ones are held out.
        prompt_tokens: P.
        scale: Neuron scales, float32 [L, F] (`neuron_scales`).
        prior_tokens: The pseudo-count of the prior.
        seed: The seed of the sequences' order.
        advance: Called with the number of passes over a sequence (`KlPlan.units`).
        resume: An interrupted sweep to continue.
        save: Called with the sweep after every step and every measured setting.
        ranks: The ranks that share the sequences of a step and of a measurement. Each rank first reads all of them
            densely.

    Raises:
        UsageError: N is less than 2.
    """
    model.requires_grad_(False)
    plan = plan_for(spec, len(tokens))
    tokens = torch.cat([tokens[::2], tokens[1::2]])
    sequences = read_dense(model, spec, tokens, prompt_tokens, advance)
    blended = blend(sequences, prior_tokens)
    search = PathSearch(model, spec, sequences[: plan.fitted], blended[: plan.fitted], scale, plan.batch, seed, ranks)
    sweep = resume or Sweep(search.start())
    state, rows = sweep.state, sweep.rows
    advance(state.step * min(plan.batch, plan.fitted) * 2)
    while state.step < WARM_UP + STEPS:
        search.advance(state)
        save(sweep)
        advance(min(plan.batch, plan.fitted) * 2)
    measuring = _Measuring(model, spec, sequences, blended, plan.fitted, scale, advance, ranks)
    advance(sum(plan.setting_units(share, spec.num_layers) for share in plan.settings[: len(rows)]))
    for share in plan.settings[len(rows) :]:
        measured = measuring.dense() if share is None else measuring.measure(state, share)
        rows.append(tuple(value.float().cpu() for value in measured))
        save(sweep)
    # A setting that reads no less than an earlier one (such as dense) drops neurons without any saving.
    kept = [row for number, row in enumerate(rows) if all(row[0] < before[0] for before in rows[:number])]
    columns = [torch.stack(values) for values in zip(*kept, strict=True)]
    return KlTable(*[*columns, torch.tensor([float(prior_tokens)])])


class _Measuring:
    def __init__(
        self,
        model: Any,
        spec: DecoderSpec,
        sequences: list[DenseSequence],
        blended: list[Blended],
        fitted: int,
        scale: torch.Tensor,
        advance: Advance,
        ranks: Ranks,
    ) -> None:
        self._model, self._spec, self._scale, self._advance, self._ranks = model, spec, scale, advance, ranks
        self._sequences, self._blended, self._fitted = sequences, blended, fitted
        self._cases = list(zip(sequences, blended, strict=True))
        self._down = down_weights(model, spec)

    def measure(self, state: PathState, share: float) -> tuple[torch.Tensor, ...]:
        """Measure the path at a share of FFN bytes; return a row of each tensor of `KlTable`."""
        spec = self._spec
        densities = densities_at(state, share, len(spec.ffn_parts))
        level = self._settle(state, densities.token, score_thresholds(self._blended[: self._fitted], densities.mask))

        def run(case: tuple[DenseSequence, Blended], together: int) -> tuple[float, torch.Tensor, torch.Tensor]:
            sequence, statistics = case
            masking = choose_masking(self._down, statistics, level.score_square, level.token, self._scale)
            density, cett = torch.zeros(2, spec.num_layers), torch.zeros(spec.num_layers)

            def observe(layer: int, run: LayerRun) -> None:
                density[0, layer] = masking.keep[layer].float().mean()
                density[1, layer] = run.survivors.float().mean()
                whole = run.h @ self._down[layer].T  # [T, M]
                kept = run.used[0] @ self._down[layer].T + masking.tail[layer].to(run.used.dtype)
                lost = (whole - kept).float().norm(dim=1) / whole.float().norm(dim=1).clamp_min(TINY)
                cett[layer] = lost.mean()

            with torch.no_grad(), two_level_ffn(self._model, spec, masking, observe):
                kl = float(masked_kl(self._model, sequence))
            return kl, density, cett

        kls: list[list[float]] = [[], []]
        density, cett = torch.zeros(2, spec.num_layers), torch.zeros(spec.num_layers)
        for number, (kl, of_density, of_cett) in enumerate(self._ranks.in_order(self._cases, run)):
            kls[int(number >= self._fitted)].append(kl)
            density += of_density
            cett += of_cett
            self._advance(1)
        count = len(self._sequences)
        density, cett = density / count, cett / count
        measured = two_level_share(density[0], density[1], len(spec.ffn_parts)).mean()
        halves = [torch.tensor(half, dtype=torch.float64) for half in kls]
        errors = [half.std() / math.sqrt(len(half)) if len(half) > 1 else half.new_zeros(()) for half in halves]
        return (
            measured,
            torch.stack([half.mean() for half in halves]),
            torch.stack(errors),
            level.score_square.sqrt(),
            level.token,
            density[0],
            density[1],
            cett,
            self._sensitivities(level),
        )

    def dense(self) -> tuple[torch.Tensor, ...]:
        """Measure what dense reads when rows of zero activations are skipped; return a row of each tensor of
        `KlTable`."""
        spec, layers = self._spec, self._spec.num_layers
        none = torch.zeros(layers, device=self._scale.device)

        def run(case: tuple[DenseSequence, Blended], together: int) -> torch.Tensor:
            sequence, statistics = case
            masking = choose_masking(self._down, statistics, none, none, self._scale)
            active = torch.zeros(layers)

            def observe(layer: int, run: LayerRun) -> None:
                active[layer] = run.survivors.float().mean() / len(self._cases)

            with torch.no_grad(), two_level_ffn(self._model, spec, masking, observe):
                masked_kl(self._model, sequence)
            return active

        zeros = torch.zeros(layers)
        active = zeros.clone()
        for of_sequence in self._ranks.in_order(self._cases, run):
            active += of_sequence
            self._advance(1)
        ones, free = torch.ones_like(zeros), zeros.new_zeros(2)
        share = two_level_share(ones, active, len(spec.ffn_parts)).mean()
        return share, free, free, zeros, zeros, ones, active, zeros, zeros

    def _settle(self, state: PathState, token_density: torch.Tensor, score_square: torch.Tensor) -> Level:
        """Choose token thresholds for a density, from the estimates of a run at the path's own thresholds."""
        device, layers = self._scale.device, self._spec.num_layers
        number = min(SETTLING_SEQUENCES, self._fitted)
        histogram = EstimateHistogram(layers, device)
        thresholds = state.histogram.thresholds(token_density)
        collect_estimates(
            self._model,
            self._spec,
            self._sequences[:number],
            self._blended[:number],
            Level(score_square, thresholds),
            self._scale,
            self._down,
            histogram,
            self._advance,
            self._ranks,
        )
        return Level(score_square, histogram.thresholds(token_density))

    def _sensitivities(self, level: Level) -> torch.Tensor:
        """Measure the KL of masking each layer alone, [L], on sequences that the path was not fitted on if possible."""
        cases = self._cases[-SENSITIVITY_SEQUENCES:]

        def run(case: tuple[DenseSequence, Blended], together: int) -> torch.Tensor:
            sequence, statistics = case
            masking = choose_masking(self._down, statistics, level.score_square, level.token, self._scale)
            found = torch.zeros(self._spec.num_layers)
            for layer in range(self._spec.num_layers):
                with (
                    torch.no_grad(),
                    two_level_ffn(self._model, self._spec, masking, layers=range(layer, layer + 1)),
                ):
                    found[layer] = float(masked_kl(self._model, sequence)) / len(cases)
                self._advance(together)
            return found

        return torch.stack(list(self._ranks.in_order(cases, run))).sum(dim=0)
