"""Elements of SVG and HTML as text. Everything that is not an element already is escaped."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

# Characters that XML cannot hold: control characters, and surrogates (undecodable bytes in a file name).
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
REPLACEMENT = "\ufffd"


def clean(text: object) -> str:
    """Return the text of an object, with U+FFFD for characters that HTML or XML files cannot hold."""
    return FORBIDDEN.sub(REPLACEMENT, str(text))


def element(name: str, *children: object, **attributes: object) -> Markup:
    """Write an element.

    Args:
        name: The tag.
        **children: Markup is inserted unchanged, everything else as escaped text.
        ***attributes: None is left out; underscores become dashes, a trailing one is removed (`class_`), and numbers
        keep two decimals.
    """
    parts = [Markup("<"), name]
    for key, value in attributes.items():
        if value is not None:
            written = number(value) if isinstance(value, float) else clean(value)
            parts.append(Markup(' {}="{}"').format(key.removesuffix("_").replace("_", "-"), written))
    if not children and name not in ("div", "span", "td", "th"):
        return Markup("").join([*parts, Markup("/>")])
    inner = [child if isinstance(child, Markup) else escape(clean(child)) for child in children]
    return Markup("").join([*parts, Markup(">"), *inner, Markup("</{}>").format(name)])


def number(value: float) -> str:
    """Write a coordinate: two decimals, no zeros at the end."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")


def shorten(text: object, characters: int) -> str:
    """Shorten a text to a number of characters."""
    text = clean(text)
    return text if len(text) <= characters else text[: characters - 1] + "…"
