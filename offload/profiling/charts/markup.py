"""Elements of HTML and SVG, escaped."""

import json
from collections.abc import Iterable

from markupsafe import Markup, escape

# Elements of HTML that have neither content nor an end.
VOID = {"input"}


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """One element; ``class_`` becomes ``class``, ``data_x`` becomes ``data-x``, and an attribute of None is left out.

    Numbers are positions and are written with two decimals, except in ``data_*`` attributes, which keep every digit.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_attribute(name, value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in VOID:
        return Markup(f"<{tag}{written}>")
    if not children:
        return Markup(f"<{tag}{written}></{tag}>")
    return Markup(f"<{tag}{written}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str]) -> Markup:
    """Parts in a row, each escaped unless it is markup."""
    return Markup("").join(parts)


def exact(values: Iterable[float | None]) -> str:
    """Numbers for a ``data_*`` attribute: every digit, "null" for a number that is not known."""
    return " ".join(json.dumps(value) for value in values)


def position(value: float) -> str:
    """A coordinate: two decimals, no zeros at the end."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


def _attribute(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value) if name.startswith("data_") else position(value)
