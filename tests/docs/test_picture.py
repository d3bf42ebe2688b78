"""README's picture is drawn from docs/picture.json, and its figures are those of docs/results.md."""

from __future__ import annotations

import json
import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import DOCUMENTS, ROOT

DATA: dict[str, Any] = json.loads((ROOT / "docs/picture.json").read_text(encoding="utf-8"))
POINTS = [(panel, point) for panel in DATA["panels"] for point in panel["points"]]
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)")


def section(title: str) -> str:
    """Return the text below a heading of results.md, up to the next heading."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"# {title}\n")
    assert found, f"docs/results.md has no section {title}"
    return rest.partition("\n#")[0]


def anchors(path: Path) -> set[str]:
    """Return the names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_picture_is_current() -> None:
    """python docs/make_picture.py draws it."""
    made = runpy.run_path(str(ROOT / "docs/make_picture.py"))["picture"](DATA)
    ElementTree.fromstring(made)
    assert (ROOT / "docs/picture.svg").read_text(encoding="utf-8") == made


@pytest.mark.parametrize(("panel", "point"), POINTS, ids=[point["label"] for _, point in POINTS])
def test_figures_are_in_the_results(panel: dict[str, Any], point: dict[str, Any]) -> None:
    if point["faster"] != "1":  # the point that the others are compared with
        assert re.search(rf"(?<![\d.]){re.escape(point['faster'])}(?![\d.])", section(panel["speed_section"]))
    if "kl_section" in point:
        assert point["kl"] in section(point["kl_section"])


@pytest.mark.parametrize("document", [*DOCUMENTS, "examples/README.md"])
def test_links_lead_somewhere(document: str) -> None:
    page = ROOT / document
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{document}: {path}"
        if anchor:
            assert anchor in anchors(target), f"{document}: {path}#{anchor}"
