"""A page of one file: a template of ours with its style inline, and figures written alike on every page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from onnxslim_llm.report.format import bytes_text, count_text, figure_text, percent_text, seconds_text

__all__ = ["render_page"]

_TEMPLATES = files("onnxslim_llm.report").joinpath("templates")
_FILTERS = {
    "bytes": bytes_text,
    "count": count_text,
    "figure": figure_text,
    "percent": percent_text,
    "seconds": seconds_text,
}


def render_page(template: str, content: Mapping[str, Any], filters: Mapping[str, Callable[..., str]]) -> str:
    """The text of a page.

    Args:
        template: the name of one in `templates`, without its endings.
        content: what the template names.
        filters: of this template, beside those that all have.
    """
    source = _TEMPLATES.joinpath(f"{template}.html.j2").read_text(encoding="utf-8")
    environment = Environment(loader=DictLoader({template: source}), autoescape=True, undefined=StrictUndefined)
    environment.filters.update({**_FILTERS, **filters})
    css = Markup(_TEMPLATES.joinpath("report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(css=css, **content)
