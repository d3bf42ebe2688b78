"""The page is well-formed and escaped, and loads nothing from outside."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from markupsafe import Markup

from tda_export.report.colours import RAMP_STEPS, css_variables
from tda_export.report.markup import clean, element, number, shorten
from tda_export.report.page import Figure, Page, Section, Table, is_report, render

MARKUP = "<script>alert('x')</script> & \"q\" \x00"


def page(text: str) -> Page:
    section = Section(
        text,
        [text],
        [Figure(element("svg", text, aria_label=text), text), Figure(element("svg"), "", wide=True)],
        [Table(text, [text, "n"], [[text, 1.5]]), Table(text, [], [[text]], folded=True)],
        [text],
    )
    return Page(text, text, [section, section])


def test_text_is_escaped_everywhere() -> None:
    html = render(page(MARKUP))
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 2 * 10
    assert "\x00" not in html
    # The template closes all elements, so a page without its doctype is well-formed XML.
    root = ET.fromstring(html.removeprefix("<!DOCTYPE html>"))
    assert root.findtext(".//h1") == MARKUP.replace("\x00", "\ufffd")
    assert [len(row) for row in root.findall(".//tbody/tr")] == [2, 1, 2, 1]


def test_page_asks_for_nothing_outside() -> None:
    html = render(page("plain"))
    assert not re.search(r"<(script|link|iframe|img)\b|@import|url\(|https?:", html)
    identifiers = re.findall(r' id="(s\d+)"', html)
    assert identifiers == ["s1", "s2"]
    assert re.findall(r'href="#(s\d+)"', html) == identifiers


def test_every_colour_has_a_value_in_light_and_dark() -> None:
    html, colours = render(page("plain")), css_variables()
    assert colours["light"].keys() == colours["dark"].keys()
    assert f"ramp-{RAMP_STEPS - 1}" in colours["light"]
    defined = set(re.findall(r"--([\w-]+):", html))
    assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= defined | {"columns"}
    assert colours["dark"].keys() <= defined


def test_is_report(tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    path.write_text(render(page(MARKUP)), encoding="utf-8")
    assert is_report(path)
    path.write_text("<html>")
    assert not is_report(path)
    assert not is_report(tmp_path)


def test_element() -> None:
    assert element("a", "<", Markup("<b/>"), x=1.0, class_="c d", stroke_width=0.126, gone=None) == (
        '<a x="1" class="c d" stroke-width="0.13">&lt;<b/></a>'
    )
    assert element("text", x='"><script>') == '<text x="&#34;&gt;&lt;script&gt;"/>'
    assert (number(-0.001), number(100.0), number(2.5)) == ("0", "100", "2.5")


def test_clean_and_shorten() -> None:
    assert clean("a\x1b[31m\ud800\tb") == "a\ufffd[31m\ufffd\tb"
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("abcd", 4) == "abcd"
