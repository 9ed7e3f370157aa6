"""A page as a tree that tests can ask: elements by class or attribute, and their texts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "img", "hr"}


@dataclass
class Element:
    """One element; ``text`` is its own text, without that of the elements in it."""

    tag: str
    attributes: dict[str, str]
    children: list["Element"] = field(default_factory=list)
    text: str = ""

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def walk(self) -> Iterator["Element"]:
        """This element and all below it, in the order of the page."""
        yield self
        for child in self.children:
            yield from child.walk()

    def all(self, tag: str = "", class_: str = "", **attributes: str) -> list["Element"]:
        """Every element below with this tag, class and these ``data-*`` attributes."""
        data = {f"data-{name}": value for name, value in attributes.items()}
        return [
            each
            for each in self.walk()
            if (not tag or each.tag == tag)
            and (not class_ or class_ in each.classes)
            and all(each.attributes.get(name) == value for name, value in data.items())
        ]

    def one(self, tag: str = "", class_: str = "", **attributes: str) -> "Element":
        """The only element that `all` finds."""
        (found,) = self.all(tag, class_, **attributes)
        return found

    def full_text(self) -> str:
        """Its text and that of all below, runs of white space as one."""
        return " ".join(" ".join(each.text for each in self.walk()).split())


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attributes})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        ended = self.open.pop()
        assert ended.tag == tag, f"<{ended.tag}> is ended by </{tag}>"

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def parse(page: str) -> Element:
    """The tree of a page whose elements are all closed, each by its own tag."""
    builder = _Builder()
    builder.feed(page)
    builder.close()
    assert len(builder.open) == 1, f"not closed: {[each.tag for each in builder.open[1:]]}"
    return builder.root
