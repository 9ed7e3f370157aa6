"""Puts the sections into the frame of the page."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_offload import __version__
from moe_offload.offload.profiling.page.curves_section import curves_section
from moe_offload.offload.profiling.page.figure import Section
from moe_offload.offload.profiling.page.headline import headline
from moe_offload.offload.profiling.page.heat_section import heat_section
from moe_offload.offload.profiling.page.layers_section import layers_section
from moe_offload.offload.profiling.page.prediction_section import prediction_section
from moe_offload.offload.profiling.page.routing_section import routing_section
from moe_offload.offload.profiling.page.settings_section import settings_section
from moe_offload.offload.profiling.page.time_section import time_section
from moe_offload.offload.profiling.page.tokens_section import tokens_section
from moe_offload.offload.profiling.report import ProfileReport

# Sections of the page in order, each with the sections of the report that it shows.
SECTIONS = (
    (time_section, ("timing",)),
    (tokens_section, ("steps",)),
    (layers_section, ("layers",)),
    (heat_section, ("usage",)),
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
        missing=missing_elsewhere(report),
        json=script_json(report.to_json()),
        version=__version__,
    )


def sections(report: ProfileReport) -> list[Section]:
    """Every section, those without figures too: they say what is missing."""
    return [make(report, missing_of(report, names)) for make, names in SECTIONS]


def missing_of(report: ProfileReport, names: tuple[str, ...]) -> tuple[str, ...]:
    """Why figures of these sections of the report are not there."""
    return tuple(each.reason for each in report.missing if each.section in names)


def missing_elsewhere(report: ProfileReport) -> tuple[str, ...]:
    """Why figures of the header are not there, and whatever else no section of the page shows."""
    shown = {name for _, names in SECTIONS for name in names}
    return tuple(
        f"{each.section.replace('_', ' ')}: {each.reason}" for each in report.missing if each.section not in shown
    )


def script_json(text: str) -> Markup:
    """JSON that may stand in a script element: no text in it can end the element."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
