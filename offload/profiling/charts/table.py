"""A table of text and numbers."""

from collections.abc import Sequence

from markupsafe import Markup

from moe_offload.offload.profiling.charts.markup import element


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> Markup:
    """Rows under ``head``; the first ``text_columns`` are text, the others numbers, set flush right.

    The table scrolls inside its own box where the page is too narrow for it.
    """
    heads = (element("th", text, class_=_kind(index, text_columns), scope="col") for index, text in enumerate(head))
    return element(
        "div",
        element(
            "table",
            element("thead", element("tr", *heads)),
            element("tbody", *(element("tr", *_cells(row, text_columns)) for row in rows)),
        ),
        class_="table",
        tabindex="0",
    )


def _cells(row: Sequence[str], text_columns: int) -> list[Markup]:
    return [element("td", text, class_=_kind(index, text_columns)) for index, text in enumerate(row)]


def _kind(index: int, text_columns: int) -> str:
    return "text" if index < text_columns else "number"
