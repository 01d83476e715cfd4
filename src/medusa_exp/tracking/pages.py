"""Templates to self-contained pages: scripts and styles stand inside, nothing is loaded."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from medusa_exp.tracking import run_report as content


def render(template: str, values: dict[str, Any]) -> str:
    """Return the page of a template in this directory; what is put in is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text_parts"] = content.text_parts
    environment.filters["breakable"] = lambda name: re.findall(r"[^._/]*[._/]?", name)[:-1]
    return environment.get_template(template).render(values, scripts=_scripts())


@cache
def _scripts() -> str:
    """Return Vega, Vega-Lite and vegaEmbed as one script that can stand inside a page."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub asks too much
    return bundle.replace("</script", "<\\/script")
