"""The report's charts as pictures: Vega-Lite specifications in, a PNG out.

The page of the report gives its charts colours by CSS; here they get its light ones.
"""

from typing import Any

_INK, _SOFT, _LINE = "#1c2422", "#59635f", "#dfe3e0"
_ACCENT, _SECOND, _RAMP = "#0b6b66", "#74857f", ["#eef5f3", "#0b6b66"]
_THEME: dict[str, Any] = {
    "background": "#fcfcfb",
    "font": "sans-serif",
    "mark": {"color": _ACCENT},
    "axis": {"labelColor": _SOFT, "titleColor": _SOFT, "gridColor": _LINE, "ticks": False},
    "axisX": {"grid": False},
    "view": {"stroke": None},
    "text": {"color": _INK},
    "title": {"anchor": "start", "color": _INK},
    "range": {"ramp": _RAMP, "heatmap": _RAMP},
    "style": {
        "reference": {"color": _SOFT, "strokeDash": [3, 3], "opacity": 0.7},
        "chosen": {"color": _ACCENT, "strokeWidth": 2, "filled": False, "fill": None},
        "edge": {"color": _SECOND, "strokeWidth": 1.2, "opacity": 0.7},
        "node": {"stroke": _ACCENT, "strokeWidth": 1},
        "on-pale": {"color": _INK},
        "on-strong": {"color": "#ffffff"},
    },
}
_WIDTH = 720


def png(*charts: dict[str, Any]) -> bytes:
    """Draw charts of `charts.py` below one another."""
    import vl_convert

    sized = [{**chart, "width": _WIDTH} for chart in charts]
    drawing: bytes = vl_convert.vegalite_to_png({"vconcat": sized}, config=_THEME, scale=2)
    return drawing
