"""Puts the sections into the frame of the page."""

from dataclasses import replace

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_offload import __version__
from moe_offload.offload.profiling.page.curves_section import curves_section
from moe_offload.offload.profiling.page.figure import Section
from moe_offload.offload.profiling.page.headline import TITLES, headline
from moe_offload.offload.profiling.page.heat_section import heat_section
from moe_offload.offload.profiling.page.layers_section import layers_section
from moe_offload.offload.profiling.page.prediction_section import prediction_section
from moe_offload.offload.profiling.page.routing_section import routing_section
from moe_offload.offload.profiling.page.settings_section import settings_section
from moe_offload.offload.profiling.page.time_section import time_section
from moe_offload.offload.profiling.page.tokens_section import tokens_section
from moe_offload.offload.profiling.report import ProfileReport

# Sections of the page in order, each with what the report has to tell for it.
SECTIONS = (
    (time_section, ("timing",)),
    (tokens_section, ("steps", "hit_ratio_decode", "timing")),
    (layers_section, ("layers", "hit_ratio_decode", "timing")),
    (heat_section, ("usage", "residency")),
    (curves_section, ("curves",)),
    (prediction_section, ("prediction",)),
    (routing_section, ("experts",)),
    (settings_section, ("run",)),
)


def render(report: ProfileReport) -> str:
    """The whole page; it needs no other file and makes no request."""
    environment = Environment(
        loader=PackageLoader("moe_offload.offload.profiling", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        report=report,
        headline=headline(report),
        sections=sections(report),
        missing=missing_of_header(report),
        json=script_json(report.to_json()),
        version=__version__,
    )


def sections(report: ProfileReport) -> list[Section]:
    """Every section, those without figures too: they say what is missing."""
    made = []
    for make, names in SECTIONS:
        section = make(report, missing_of(report, names))
        # A section that has figures needs no word about those of others.
        made.append(replace(section, missing=missing_of(report, names[:1])) if section.figures else section)
    return made


def missing_of(report: ProfileReport, names: tuple[str, ...]) -> tuple[str, ...]:
    """Why figures of these names are not there, each reason once."""
    return tuple(dict.fromkeys(each.reason for each in report.missing if each.section in names))


def missing_of_header(report: ProfileReport) -> tuple[str, ...]:
    """Which figures of the header are not there, and whatever else no section shows, by reason."""
    shown = {names[0] for _, names in SECTIONS}
    by_reason: dict[str, list[str]] = {}
    for each in report.missing:
        if each.section not in shown:
            name = TITLES.get(each.section, each.section.replace("_", " "))
            by_reason.setdefault(each.reason, []).append(name)
    return tuple(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def script_json(text: str) -> Markup:
    """JSON that may stand in a script element: no text in it can end the element."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
