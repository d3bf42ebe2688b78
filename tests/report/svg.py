"""Read charts back: elements, and the values of points by the labelled ticks."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def parse(chart: str) -> ET.Element:
    """Parse a chart, which must be well-formed XML, and drop the namespace."""
    root = ET.fromstring(str(chart))
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
    return root


def by_class(root: ET.Element, name: str, tag: str | None = None) -> list[ET.Element]:
    return [
        element
        for element in root.iter()
        if name in element.get("class", "").split() and (tag is None or element.tag == tag)
    ]


def tick_value(label: str) -> float:
    """Read 0.05, 20, 10⁻⁵ and 2·10⁻⁵."""
    match = re.fullmatch(r"(?:([\d.]+)·)?10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", label)
    if match:
        return float(match[1] or 1) * 10.0 ** int(match[2].translate(SUPERSCRIPTS))
    return float(label)


def reader(root: ET.Element, axis: str, *, log: bool = False):  # type: ignore[no-untyped-def]
    """Return a function from a place to a value, by the outermost two ticks of an axis, x or y."""
    ticks = [element for element in by_class(root, "tick") if axis in element.get("class", "").split()]
    shift = 4 if axis == "y" else 0  # the text's baseline is below the tick
    known = sorted((tick_value(tick.text or ""), float(tick.get(axis, "")) - shift) for tick in ticks)
    (low, start), (high, end) = known[0], known[-1]
    if log:
        low, high = math.log(low), math.log(high)

    def value(place: float) -> float:
        found = low + (place - start) / (end - start) * (high - low)
        return math.exp(found) if log else found

    return value


def corners(element: ET.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in element.get("points", "").split()]  # type: ignore[misc]


def centre(mark: ET.Element) -> tuple[float, float]:
    """Return the place of a mark: a circle's centre, or the mean of a polygon's corners."""
    if mark.tag == "circle":
        return float(mark.get("cx", "")), float(mark.get("cy", ""))
    points = corners(mark)
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
