"""The table of prices: what it saves and costs to read only the rows that are worth a price, and the price for a
budget.

This module needs neither PyTorch nor NumPy, since drivers choose prices at run time.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from tda_export.errors import UsageError
from tda_export.packing import Packing, Parts
from tda_export.weights.plan import FLOAT, HEAD

KL_POWER = 1.5  # near dense: KL grows as the cube of the dropped share, which grows as the root of the price
SHARE_POWER = 0.5
ROUNDING = 1e-9  # tolerance of a requested share


@dataclass(frozen=True)
class PriceRow:
    """What a price costs and saves. A share is the part of the linears' bytes, over all layers, that is read.

    `price`: λ. `share`: of all linears of the layers; `ffn_share` and `attention_share`: of the linears of FFN and
    attention; `parts`: of each part, a mean over layers, and of the head where its rows have prices. `kl`: KL to dense
    in nats per token, with its standard error. `agreement`: share of tokens where the likeliest next token is the same
    as dense's.
    """

    price: float
    share: float
    ffn_share: float
    attention_share: float
    parts: dict[str, float]
    kl: float
    kl_stderr: float
    agreement: float

    @property
    def sparsity(self) -> float:
        """The share of the bytes of the layers' linears that is not read."""
        return 1.0 - self.share

    @property
    def head_share(self) -> float:
        """The share of the head's bytes that is read."""
        return self.parts.get(HEAD, 1.0)

    @property
    def kl_text(self) -> str:
        """The KL as text for readers, with one standard error where it is known."""
        return f"{self.kl:.4f}" + (f" ± {self.kl_stderr:.4f}" if self.kl_stderr else "")


@dataclass(frozen=True)
class ShortPrompts:
    """What the prices of a table cost after prompts shorter than the table's own, and the lengths of both.

    `prompt_tokens`: length of the short prompts; `table_prompt_tokens`: length of the prompts of the table, which is
    larger. `kl` and `kl_stderr`: one number for each row of the table, in nats per token.
    """

    prompt_tokens: int
    table_prompt_tokens: int
    kl: tuple[float, ...]
    kl_stderr: tuple[float, ...]

    def weight(self, prompt_tokens: int) -> float:
        """Return the weight of the short prompts' KL in the KL after a prompt of this length, by the logarithm of the
        length."""
        if prompt_tokens < 1:
            return 1.0
        own = math.log(self.table_prompt_tokens)
        there = (own - math.log(prompt_tokens)) / (own - math.log(self.prompt_tokens))
        return min(1.0, max(0.0, there))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ShortPrompts:
        """Read the object back from plain data."""
        kl, error = (tuple(map(float, content[name])) for name in ("kl", "kl_stderr"))
        return cls(int(content["prompt_tokens"]), int(content["table_prompt_tokens"]), kl, error)


@dataclass(frozen=True)
class PriceTable:
    """Measured rows, from dense (price 0) to sparse.

    A price holds for one packing and for the stored format of the rows that it was measured with: the label `formats`
    (`RowBytes`), or floats of `element_bytes` (`rescaled`). The price for a given share grows with the number of tokens
    that follow a token; calibration had `continuation_tokens`. `short`: the KL after shorter prompts (`after`), None
    where it was not measured.
    """

    packing: Packing
    element_bytes: int
    continuation_tokens: int
    rows: tuple[PriceRow, ...]
    formats: str = FLOAT
    short: ShortPrompts | None = None

    def __post_init__(self) -> None:
        numbers = [[*_numbers(row)] for row in self.rows]
        prices = [row.price for row in self.rows]
        shares = [
            [row.share, row.ffn_share, row.attention_share, *row.parts.values(), row.agreement] for row in self.rows
        ]
        for wrong, what in (
            (self.packing not in get_args(Packing), f"packing {self.packing!r} is not known"),
            (not (self.element_bytes > 0 and self.continuation_tokens > 0), "sizes are not positive"),
            (len(self.rows) < 2, "fewer than two rows"),
            (not all(math.isfinite(number) for row in numbers for number in row), "a number is not finite"),
            (bool(prices) and prices[0] != 0, "the first row is not dense"),
            (any(low >= high for low, high in itertools.pairwise(prices)), "prices do not rise"),
            (not all(0 <= share <= 1 for row in shares for share in row), "a share is outside [0, 1]"),
            (any(row.kl < 0 or row.kl_stderr < 0 for row in self.rows), "a KL is negative"),
            (len({tuple(row.parts) for row in self.rows}) > 1, "rows are of different parts"),
        ):
            if wrong:
                raise ValueError(f"table of prices: {what}")
        if self.short is not None:
            _check_short(self.short, len(self.rows))

    @property
    def most_sparsity(self) -> float:
        """The largest sparsity that was measured, rounded down so that a user may ask for it."""
        return math.floor(1000 * (1 - self._shares[-1])) / 1000

    @property
    def least_share(self) -> float:
        """The smallest share of the bytes of the layers' linears that was measured."""
        return self._shares[-1]

    @property
    def most_kl(self) -> float:
        """The largest KL that was measured, in nats per token, rounded down to three digits so that a user may ask for
        it."""
        return _rounded_down(self._kls[-1])

    @property
    def most_price(self) -> float:
        """The largest price that was measured."""
        return self.rows[-1].price

    @property
    def short_kl_texts(self) -> list[list[str]]:
        """The KL of each row after short prompts as text for readers: one column, or none where it was not measured."""
        if self.short is None:
            return [[] for _ in self.rows]
        return [[f"{kl:.4f}"] for kl in self.short.kl]

    def price_for(self, *, sparsity: float | None = None, max_kl: float | None = None) -> float:
        """Choose the price for one of two budgets. The price is 0 where dense meets the budget, as ReLU's zeros allow.

        Args:
            sparsity: Share of the bytes of the layers' linears not to read, in [0, 1).
            max_kl: The largest predicted KL to dense, positive, in nats per token; the sparsest price within it is
                chosen.

        Raises:
            UsageError: None or both are given, or the budget is beyond what was measured.
        """
        if (sparsity is None) == (max_kl is None):
            raise UsageError("A price is chosen by a sparsity or by a KL. Give exactly one.")
        if max_kl is not None:
            return self._price_for_kl(max_kl)
        assert sparsity is not None
        if not 0 <= sparsity < 1:
            raise UsageError(f"sparsity {sparsity} is outside [0, 1). Give a fraction such as 0.3.")
        share, shares = 1.0 - sparsity, self._shares
        if share >= shares[0]:
            return 0.0
        if share < shares[-1] - ROUNDING:
            raise UsageError(
                f"Sparsity {sparsity} is more than was measured with prices ({self.most_sparsity:.3f}, at KL "
                f"{self.most_kl:g} to dense). Give a sparsity up to {self.most_sparsity:g}."
            )
        share = max(share, shares[-1])
        after = next(i for i, value in enumerate(shares) if value <= share)
        weight = (shares[after - 1] - share) / (shares[after - 1] - shares[after])
        return self._between(after, weight, SHARE_POWER)

    def predicted(self, price: float) -> PriceRow:
        """Interpolate what a price saves and costs. A price of 0 or less is dense.

        Between measured prices, a share is linear in the logarithm of the price and KL is a power of the price. Between
        dense and the first measured price, the dropped share grows as the root of the price, and KL as the cube of
        that.

        Raises:
            UsageError: The price is not a number, or is beyond what was measured.
        """
        if math.isnan(price) or price > self.most_price:
            raise UsageError(
                f"Price {price:g} is beyond what was measured: up to {self.most_price:.6g}, which leaves "
                f"{self.most_sparsity:.3f} of the bytes unread. Give a price up to that, or a sparsity."
            )
        prices = [row.price for row in self.rows]
        after = max(1, bisect.bisect_left(prices, price))
        low, high = self.rows[after - 1], self.rows[after]
        weight, kl_weight = (self._weight(after, max(price, 0.0), power) for power in (SHARE_POWER, KL_POWER))

        def mean(name: str, weight: float = weight) -> float:
            return (1 - weight) * getattr(low, name) + weight * getattr(high, name)

        return PriceRow(
            price=max(price, 0.0),
            share=(1 - weight) * self._shares[after - 1] + weight * self._shares[after],
            ffn_share=mean("ffn_share"),
            attention_share=mean("attention_share"),
            parts={part: (1 - weight) * low.parts[part] + weight * high.parts[part] for part in low.parts},
            kl=self._kl_between(after, kl_weight),
            kl_stderr=mean("kl_stderr", kl_weight),
            agreement=mean("agreement"),
        )

    @property
    def prices_head(self) -> bool:
        """Whether the head's rows have prices too."""
        return HEAD in self.rows[0].parts

    def rescaled(self, element_bytes: int) -> PriceTable:
        """Return the table for floats of another size: a price is per byte.

        Raises:
            ValueError: The size is not positive, or the rows are not floats.
        """
        if self.formats != FLOAT:
            raise ValueError(f"table of prices: measured for {self.formats}, not for floats")
        factor = self.element_bytes / element_bytes if element_bytes > 0 else 0.0
        rows = tuple(replace(row, price=row.price * factor) for row in self.rows)
        return replace(self, element_bytes=element_bytes, rows=rows)

    def after(self, prompt_tokens: int) -> PriceTable:
        """Return the table with the KL that is expected after a prompt of this length.

        Between the two measured lengths the logarithm of the KL is linear in the logarithm of the length; beyond them
        the KL is that of the nearer length. Where only one length was measured, the table itself is returned.
        """
        weight = 0.0 if self.short is None else self.short.weight(prompt_tokens)
        if self.short is None or weight == 0:
            return self
        pairs = zip(self.rows, self.short.kl, self.short.kl_stderr, strict=True)
        rows = tuple(
            replace(
                row,
                kl=_mean_kl(row.kl, kl, weight),
                kl_stderr=(1 - weight) * row.kl_stderr + weight * error,
            )
            for row, kl, error in pairs
        )
        return replace(self, rows=rows, short=None)

    def of_parts(self, parts: Parts) -> PriceTable:
        """Return the table whose `share` counts the FFN's or attention's bytes only, for settings where only those may
        drop rows. The head never counts.

        The shares were measured while all linears, and mostly the head, drop rows, and hardly depend on that. KL does
        depend on it; the table keeps the KL measured with all that has prices.
        """
        if parts in ("all", "layers"):
            return self
        rows = tuple(replace(row, share=getattr(row, f"{parts}_share")) for row in self.rows)
        return replace(self, rows=rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain data."""
        content = asdict(self) | {"rows": [asdict(row) for row in self.rows]}
        if self.short is not None:
            content["short"] |= {"kl": list(self.short.kl), "kl_stderr": list(self.short.kl_stderr)}
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PriceTable:
        """Read a table back from plain data.

        Raises:
            ValueError: The content is not a table of prices.
        """
        try:
            rows = tuple(
                PriceRow(**{field.name: _plain(row[field.name]) for field in fields(PriceRow)})
                for row in content["rows"]
            )
            sizes = (int(content["element_bytes"]), int(content["continuation_tokens"]))
            short = content.get("short")  # older tables lack it
            short = None if short is None else ShortPrompts.from_dict(short)
            return cls(content["packing"], *sizes, rows, str(content.get("formats", FLOAT)), short)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"table of prices: incomplete ({error})") from error

    @property
    def _shares(self) -> list[float]:
        """Shares, made to fall from row to row, since noise may have raised one."""
        shares = [row.share for row in self.rows]
        return [min(shares[: i + 1]) for i in range(len(shares))]

    @property
    def _kls(self) -> list[float]:
        """KL, made to rise from row to row, starting at 0."""
        kls = [0.0, *(row.kl for row in self.rows[1:])]
        return [max(kls[: i + 1]) for i in range(len(kls))]

    def _price_for_kl(self, max_kl: float) -> float:
        if not 0 < max_kl < math.inf:
            raise UsageError(f"--max-kl {max_kl}: give a positive number of nats a token, such as 0.05.")
        kls = self._kls
        if max_kl > kls[-1]:
            raise UsageError(
                f"KL {max_kl} is more than was measured with prices ({kls[-1]:.4g}, at sparsity "
                f"{self.most_sparsity:.3f}). Give a KL up to {self.most_kl:g}."
            )
        if max_kl == kls[-1]:
            return self.most_price
        after = next(i for i, kl in enumerate(kls) if kl > max_kl)
        low, high = kls[after - 1], kls[after]
        weight = math.log(max_kl / low) / math.log(high / low) if low > 0 else max_kl / high
        return self._between(after, weight, KL_POWER)

    def _between(self, after: int, weight: float, power: float) -> float:
        """Return the price that weights the row `after` by `weight` and the row before it by the rest."""
        low, high = self.rows[after - 1].price, self.rows[after].price
        if low == 0:
            return high * weight ** (1 / power)
        return min(high, max(low, math.exp((1 - weight) * math.log(low) + weight * math.log(high))))

    def _weight(self, after: int, price: float, power: float) -> float:
        """Undo `_between`."""
        low, high = self.rows[after - 1].price, self.rows[after].price
        weight = (price / high) ** power if low == 0 else math.log(price / low) / math.log(high / low)
        return min(1.0, max(0.0, weight))

    def _kl_between(self, after: int, weight: float) -> float:
        low, high = self._kls[after - 1], self._kls[after]
        if weight in (0.0, 1.0):
            return high if weight else low
        if low == 0:
            return weight * high
        return min(high, math.exp((1 - weight) * math.log(low) + weight * math.log(high)))


def _rounded_down(value: float) -> float:
    """Round to three digits, towards 0."""
    if value == 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    rounded = float(f"{math.floor(value / step) * step:.3g}")
    return rounded if rounded <= value else value


def _mean_kl(kl: float, short: float, weight: float) -> float:
    """Return the weighted geometric mean, or the arithmetic one where a value is 0."""
    if min(kl, short) <= 0:
        return (1 - weight) * kl + weight * short
    return math.exp((1 - weight) * math.log(kl) + weight * math.log(short))


def _check_short(short: ShortPrompts, rows: int) -> None:
    numbers = [*short.kl, *short.kl_stderr]
    if not 0 < short.prompt_tokens < short.table_prompt_tokens:
        raise ValueError("table of prices: short prompts are not shorter than its own")
    if not (len(short.kl) == len(short.kl_stderr) == rows):
        raise ValueError("table of prices: the KL after short prompts is not of every row")
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError("table of prices: a KL after short prompts is negative or not finite")


def _numbers(row: PriceRow) -> list[float]:
    values = asdict(row)
    return [*values.pop("parts").values(), *values.values()]


def _plain(value: Any) -> Any:
    return {str(part): float(share) for part, share in value.items()} if isinstance(value, dict) else float(value)
