"""The page: sections of text, charts and tables, put into one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tda_export.report.colours import css_variables
from tda_export.report.markup import clean

TEMPLATE = "page.html.jinja"
GENERATOR = '<meta name="generator" content="tda-export report"/>'  # identifies a file as a report


@dataclass(frozen=True)
class Figure:
    """A chart with its caption; `wide` takes the page's full width."""

    chart: Markup
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells. Texts are left-aligned, numbers (as numbers or texts with units) right-aligned.

    `folded` hides the table behind its caption.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    folded: bool = False
    texts: int = 1  # the number of leading text columns


@dataclass(frozen=True)
class Section:
    """A heading and its content, in this order: lead, paragraphs, figures, tables, notes.

    `lead` summarises the section in a sentence or two, in larger letters.
    """

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    lead: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """Write the page as HTML without external resources. All text is escaped; charts are already markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else clean(value),
    )
    colours = {
        mode: Markup("".join(f"--{name}:{colour};" for name, colour in names.items()))
        for mode, names in css_variables().items()
    }
    return environment.get_template(TEMPLATE).render(page=page, colours=colours, generator=Markup(GENERATOR))


def is_report(path: Path) -> bool:
    """Return whether a file is a report."""
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(1000)
    except OSError:
        return False
