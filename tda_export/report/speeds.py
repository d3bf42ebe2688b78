"""Speeds from `tda-export bench --json`, and their chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from tda_export.report.axes import around
from tda_export.report.charts import line_chart
from tda_export.report.drawing import Series

BASELINES = ("dense", "dense_native")  # ways of decoding that read everything
SHARE = "bytes read (share of those that may be left out)"


@dataclass(frozen=True)
class Speed:
    """One way of decoding in one run of `bench`.

    `share` is the share that a token reads of the bytes that may be skipped: of the FFN or, with prices, of all
    linears. `ms`, `low` and `high` are milliseconds per token: median, smallest and largest over rounds. `speedup` is
    relative to the run's dense way; None for that way itself.
    """

    model: str
    dtype: str
    device: str
    prompt_tokens: int
    new_tokens: int
    name: str
    share: float
    ms: float
    low: float
    high: float
    speedup: float | None = None

    @property
    def run(self) -> str:
        """The fields that one chart's speeds have in common."""
        tokens = f"{self.prompt_tokens} + {self.new_tokens} tokens"
        return f"{short_name(self.model)} in {self.dtype} on {self.device}, {tokens}"


def short_name(model: str) -> str:
    """Return a model's name for titles: the last part where it is a path."""
    return Path(model).name if Path(model).is_absolute() else model


def nearest_speed(speeds: Sequence[Speed], share: float, model: str) -> Speed | None:
    """Return a model's speed measured nearest to a share of bytes, if any is within 0.05 of it."""
    known = [one for one in speeds if one.speedup is not None and one.model == model and one.name not in BASELINES]
    near = [one for one in known if abs(one.share - share) <= 0.05]
    return min(near, key=lambda one: abs(one.share - share), default=None)


def speed_chart(speeds: Sequence[Speed]) -> Markup:
    """Draw milliseconds per token against the share of bytes, one mark for each way of one run."""
    names = sorted({one.name for one in speeds})
    series = []
    for style, name in enumerate(names):
        points = sorted((one for one in speeds if one.name == name), key=lambda one: one.share)
        series.append(
            Series(
                name.replace("_", " "),
                [one.share for one in points],
                [one.ms for one in points],
                style=style,
                line=len(points) > 1,
                names=[f"{name}, {one.low:.2f} to {one.high:.2f} ms" for one in points],
            )
        )
    y = around("milliseconds a token", [one.ms for one in speeds], zero=True)
    return line_chart("Time a token by bytes", series, around(SHARE, [one.share for one in speeds]), y)


def speed_rows(speeds: Sequence[Speed]) -> list[list[object]]:
    """Return a row of a table for each speed, under `SPEED_COLUMNS`."""
    return [
        [
            one.run,
            one.name.replace("_", " "),
            f"{one.share:.3f}",
            f"{one.ms:.2f}",
            f"{one.low:.2f} to {one.high:.2f}",
            "–" if one.speedup is None else f"{one.speedup:.2f}",
        ]
        for one in speeds
    ]


SPEED_COLUMNS = ("run", "decode", "bytes read, share", "ms a token", "from, to", "times as fast as dense")
