"""Draw docs/picture.svg, loss against speed, from docs/picture.json: python docs/make_picture.py.

Every figure in the JSON stands in the section of docs/results.md that it names; a test compares them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
DATA, PICTURE = FOLDER / "picture.json", FOLDER / "picture.svg"

WIDTH, HEIGHT = 860, 340
PANEL, LEFT, GAP = 350, 62, 50  # width of a panel, left margin, space between panels
TOP, BOTTOM = 44, 262  # y of the largest and of no loss
MOST_KL = 0.5
MOST_FASTER = 2.75
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f; } .small { font-size: 12px; fill: #57606a; }
  .title { font-weight: 600; } .axis { stroke: #8c959f; } .grid { stroke: #d0d7de; stroke-dasharray: 2 3; }
  .ours { fill: #0969da; } .line { fill: none; stroke: #0969da; stroke-width: 2; } .back { fill: #ffffff; }
  .peer { fill: #ffffff; stroke: #bc4c00; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #9198a1; } .back, .peer { fill: #0d1117; } .grid { stroke: #3d444d; }
    .ours { fill: #4493f8; } .line { stroke: #4493f8; } .peer { stroke: #f0883e; }
  }
"""


def text(x: float, y: float, content: str, *, style: str = "", anchor: str = "start") -> str:
    """Return a line of text, at its baseline."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def height(kl: float) -> float:
    """Return the y of a loss in nats per token."""
    return BOTTOM - (BOTTOM - TOP) * kl / MOST_KL


def panel(data: dict[str, Any], left: float) -> list[str]:
    """Return the marks of one panel: peers are hollow."""
    scale = PANEL / MOST_FASTER
    parts = [text(left, 22, data["title"], style="title"), line(left, BOTTOM, left + PANEL, BOTTOM, "axis")]
    parts.append(line(left, TOP, left, BOTTOM, "axis"))
    for kl in (0, 0.1, 0.2, 0.3, 0.4, 0.5):
        parts.append(text(left - 8, height(kl) + 4, f"{kl:g}", style="small", anchor="end"))
        parts.append(line(left, height(kl), left + PANEL, height(kl), "grid"))
    for faster in (0, 0.5, 1, 1.5, 2, 2.5):
        parts.append(text(left + faster * scale, BOTTOM + 18, f"{faster:g}", style="small", anchor="middle"))
    parts.append(text(left + PANEL / 2, BOTTOM + 36, data["axis"], style="small", anchor="middle"))
    points = [(left + float(point["faster"]) * scale, point) for point in data["points"]]
    ours = " ".join(f"{x:.1f},{height(float(point['kl'])):.1f}" for x, point in points if not point.get("peer"))
    parts.append(f'<polyline points="{ours}" class="line"/>')
    for x, point in points:
        y = height(float(point["kl"]))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{"peer" if point.get("peer") else "ours"}"/>')
        right = point["side"] == "right"
        parts.append(text(x + (9 if right else -9), y - 6, point["label"], anchor="start" if right else "end"))
    return parts


def picture(data: dict[str, Any]) -> str:
    """Return the SVG of all panels, side by side with the same axis of loss."""
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" class="back"/>']
    for number, one in enumerate(data["panels"]):
        parts += panel(one, LEFT + number * (PANEL + GAP))
    parts.append(
        f'<text transform="translate(18 {(TOP + BOTTOM) / 2}) rotate(-90)" class="small" text-anchor="middle">'
        "KL to the float model, nats per token</text>"
    )
    parts.append(text(LEFT, HEIGHT - 14, data["caption"], style="small"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")
