"""The measured cost of settings of the KL path: the part of a calibration from which a build chooses an allocation."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from tda_export.errors import UsageError

SHARES = (0.84, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # shares of FFN bytes at which the path is measured
FITTED, HELD_OUT = 0, 1  # halves of the sequences
MARGIN = 0.01  # how far the last measured share may miss its target


@dataclass(frozen=True)
class KlTable:
    """A settings of the path, from dense to sparse, for L layers. All tensors are float32 on the CPU.

    With ReLU the first setting drops nothing: zero activations are not read anyway, so dense reads less than all bytes.
    `share` [A]: measured share of FFN bytes that a token reads. `kl` [A, 2]: KL(dense || sparse) of all layers masked,
    in nats per token, on the sequences that the path was fitted on and on held-out ones; `kl_stderr` [A, 2] over
    sequences. `thresholds` [A, L] of neuron scores, `token_thresholds` [A, L] of gate estimates. `mask_density` and
    `token_density` [A, L]: shares of neurons in the prompt mask, and of those that a token does not skip. `cett` [A,
    L]: mean CETT of all dropped neurons. `sensitivity` [A, L]: KL when only that layer is masked. `prior_tokens` [1]:
    the pseudo-count of the prior that scores were blended with.
    """

    share: torch.Tensor
    kl: torch.Tensor
    kl_stderr: torch.Tensor
    thresholds: torch.Tensor
    token_thresholds: torch.Tensor
    mask_density: torch.Tensor
    token_density: torch.Tensor
    cett: torch.Tensor
    sensitivity: torch.Tensor
    prior_tokens: torch.Tensor

    def from_dense(self) -> KlTable:
        """Return the table with dense as its first setting, which reads all bytes unless the table has it already."""
        if not (self.thresholds[0].any() or self.token_thresholds[0].any()):
            return self
        ones = ("share", "mask_density", "token_density")

        def with_dense(name: str, column: torch.Tensor) -> torch.Tensor:
            dense = torch.ones_like(column[:1]) if name in ones else torch.zeros_like(column[:1])
            return torch.cat([dense, column])

        return replace(self, **{name: with_dense(name, getattr(self, name)) for name in COLUMNS})

    @property
    def predicted_kl(self) -> list[float]:
        """KL on held-out sequences, made to rise from setting to setting, starting at 0, [A]."""
        return torch.cummax(self.kl[:, HELD_OUT].clamp_min(0), dim=0).values.tolist()

    @property
    def most_sparsity(self) -> float:
        """The largest sparsity that was measured, rounded down so that a user may ask for it."""
        return math.floor(1000 * (1 - float(self.share[-1]))) / 1000

    def measurements(self) -> list[dict[str, float]]:
        """Return what each setting costs, as plain data: its share of FFN bytes, and KL in nats per token.

        KL on the sequences that the path was fitted on and on those held out, each with its standard error, and the sum
        of the KL of masking every layer alone.
        """
        rows = zip(self.share, self.kl, self.kl_stderr, self.sensitivity.sum(dim=1), strict=True)
        return [
            {
                "ffn_share": float(share),
                "fitted_kl": float(kl[FITTED]),
                "fitted_kl_stderr": float(error[FITTED]),
                "held_out_kl": float(kl[HELD_OUT]),
                "held_out_kl_stderr": float(error[HELD_OUT]),
                "single_layers_kl": float(layers),
            }
            for share, kl, error, layers in rows
        ]


COLUMNS = tuple(f.name for f in fields(KlTable) if f.name != "prior_tokens")  # the tensors with a row for each setting


@dataclass(frozen=True)
class KlSetting:
    """A point of the path: lists of L floats as in `KlTable`, and its expected share of FFN bytes and KL."""

    share: float
    kl: float
    thresholds: list[float]
    token_thresholds: list[float]
    mask_density: list[float]
    token_density: list[float]
    cett: list[float]


def setting_at(table: KlTable, share: float) -> KlSetting:
    """Interpolate the path at a share of FFN bytes.

    Between two measured settings logarithms of thresholds and of KL are linear in the share; where one of them is 0, as
    in dense, the thresholds and KL themselves are linear.

    Args:
        table: The table from calibration.
        share: The share of FFN bytes, in (0, 1]. Where dense reads less (ReLU), the result is dense with the share that
            it reads.

    Raises:
        UsageError: The share is below the sparsest setting that was measured.
    """
    table = table.from_dense()
    shares = table.share.tolist()
    if share < shares[-1]:
        raise UsageError(
            f"Sparsity {1 - share:.3g} is more than the calibration measured ({table.most_sparsity:.3f}). "
            "Give a lower --sparsity."
        )
    share = min(share, shares[0])
    after = next(i for i, measured in enumerate(shares) if measured <= share)
    width = shares[after - 1] - shares[after] if after else 0.0
    weight = (shares[after - 1] - share) / width if width > 0 else 1.0  # weight of the sparser setting
    named = {"kl": torch.tensor(table.predicted_kl, dtype=torch.float64)} | {
        name: getattr(table, name).double()
        for name in ("thresholds", "token_thresholds", "mask_density", "token_density", "cett")
    }

    def between(name: str) -> torch.Tensor:
        sparser = named[name][after]
        if weight == 1:
            return sparser
        denser = named[name][after - 1]
        linear = (1 - weight) * denser + weight * sparser
        if name not in ("kl", "thresholds", "token_thresholds"):
            return linear
        logarithmic = torch.exp((1 - weight) * denser.log() + weight * sparser.log())
        return torch.where((denser > 0) & (sparser > 0), logarithmic, linear)

    return KlSetting(share, float(between("kl")), *(between(f.name).tolist() for f in fields(KlSetting)[2:]))


def sparsest_within(table: KlTable, max_kl: float) -> KlSetting:
    """Return the sparsest point of the path whose predicted KL is at most `max_kl`, in nats per token.

    Raises:
        UsageError: `max_kl` is not positive.
    """
    if not max_kl > 0:
        raise UsageError(f"--max-kl {max_kl}: give a positive number of nats a token, such as 0.1.")
    table = table.from_dense()
    shares, kls = table.share.tolist(), table.predicted_kl
    if kls[-1] <= max_kl:
        return setting_at(table, shares[-1])
    after = next(i for i, kl in enumerate(kls) if kl > max_kl)
    low, high = kls[after - 1], kls[after]
    # Interpolates as `setting_at` does.
    weight = math.log(max_kl / low) / math.log(high / low) if low > 0 else max_kl / high
    setting = setting_at(table, max(shares[after], shares[after - 1] - weight * (shares[after - 1] - shares[after])))
    return replace(setting, kl=min(setting.kl, max_kl))  # guards against rounding
