"""What the page is made of, before it becomes HTML."""

from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Figure:
    """One chart or table: what it is called, itself, what its colours mean, how it is read, what was summed up for it.

    ``half`` figures stand side by side where the page is wide.
    """

    title: str
    body: Markup
    reading: str
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""
    half: bool = False


@dataclass(frozen=True)
class Section:
    """Figures of one subject, and a sentence that says what they show in this run."""

    name: str
    title: str
    finding: str
    figures: tuple[Figure, ...] = field(default=())
    missing: tuple[str, ...] = ()
