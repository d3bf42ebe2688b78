"""How the search for the KL path splits the sequences, and how many passes over them it takes."""

from __future__ import annotations

from dataclasses import dataclass

from tda_export.calibration.kl_path import STEPS, WARM_UP
from tda_export.calibration.kl_table import SHARES
from tda_export.errors import UsageError
from tda_export.models.spec import DecoderSpec

BATCHES = 8  # a step takes an eighth of the sequences
SETTLING_SEQUENCES = 12  # the number on which a measured setting's token thresholds are chosen
SENSITIVITY_SEQUENCES = 2  # the number on which each layer alone is measured, for every setting


@dataclass(frozen=True)
class KlPlan:
    """How many sequences each part reads. Of N in all, `fitted` fit the path. With ReLU, `dense` is measured too."""

    sequences: int
    dense: bool = False

    def __post_init__(self) -> None:
        if self.sequences < 2:
            raise UsageError(
                f"The KL path is fitted on half of the sequences and measured on the others, and {self.sequences} is "
                "too few for that. Give --sequences 2 or more and text for them, or --curves-only."
            )

    @property
    def fitted(self) -> int:
        """The number of sequences that the path is fitted on; the others are held out."""
        return (self.sequences + 1) // 2

    @property
    def batch(self) -> int:
        """The number of sequences of one step of the path."""
        return max(2, self.sequences // BATCHES)

    @property
    def path_units(self) -> int:
        """The number of passes over a sequence that the path takes; a forward and backward pass counts as two."""
        return (WARM_UP + STEPS) * min(self.batch, self.fitted) * 2

    @property
    def settings(self) -> tuple[float | None, ...]:
        """The shares of FFN bytes to measure at, in order; None is dense."""
        return (None, *SHARES) if self.dense else SHARES

    def setting_units(self, share: float | None, layers: int) -> int:
        """Return the number of passes over a sequence for measuring one of `settings`."""
        if share is None:
            return self.sequences
        settling = min(SETTLING_SEQUENCES, self.fitted)
        return settling + self.sequences + layers * min(SENSITIVITY_SEQUENCES, self.sequences)

    def units(self, layers: int) -> int:
        """Return the number of all passes over a sequence."""
        measuring = sum(self.setting_units(share, layers) for share in self.settings)
        return self.sequences + self.path_units + measuring


def plan_for(spec: DecoderSpec, sequences: int) -> KlPlan:
    """Return the plan for an architecture.

    Raises:
        UsageError: There are fewer than two sequences.
    """
    return KlPlan(sequences, dense=spec.activation == "relu")
