"""The charts of a sweep's page: its jobs as rows in, Vega-Lite specifications out."""

from collections.abc import Sequence

from medusa_exp.runs.metric_table import is_larger_better
from medusa_exp.tracking.charts import Row, Spec, inline_data, spec_of

_LONGEST_LABEL = 110
"""Pixels; the table has settings in full."""


def coordinates_chart(rows: Sequence[Row], keys: Sequence[str], objective: str) -> Spec:
    """Draw parallel coordinates: an axis for each key and for the objective, a line for each job.

    Args:
        rows: of jobs with a value: `settings`, `value`, `number` and `is_best`.
        keys: of `settings`, that the jobs differ in.
        objective: the name of `value`.
    """
    import altair as alt

    places = _value_axis(rows, objective)[1]
    shades = places if is_larger_better(objective) else [1 - place for place in places]
    axes = [_ordinal_axis(rows, key) for key in keys] + [_value_axis(rows, objective)]
    points = [
        {
            "job": row["number"],
            "axis": name,
            "position": place,
            "shade": shade,
            "text": describe(row, keys, objective),
        }
        for name, places, _ in axes
        for row, place, shade in zip(rows, places, shades, strict=True)
    ]
    labels = [
        {"axis": name, "position": at, "label": label}
        for name, _, labels in axes
        for label, at in labels.items()
    ]
    x = alt.X(
        "axis:N",
        title=None,
        sort=[name for name, *_ in axes],
        scale=alt.Scale(type="point", padding=0.35),
        axis=alt.Axis(orient="top", labelAngle=0, labelLimit=170, domain=False),
    )
    y = alt.Y("position:Q", axis=None, scale=alt.Scale(domain=[-0.04, 1.04], nice=False))
    lines = (
        alt.Chart(inline_data(points))
        .mark_line()
        .encode(
            x=x,
            y=y,
            detail="job:N",
            opacity=alt.Opacity("shade:Q", scale=alt.Scale(range=[0.2, 1]), legend=None),
            strokeWidth=alt.StrokeWidth("shade:Q", scale=alt.Scale(range=[1, 3]), legend=None),
            tooltip=alt.Tooltip("text:N", title="job"),
        )
    )
    rules = alt.Chart(inline_data(labels)).mark_rule(style="edge").encode(x=x)
    texts = (
        alt.Chart(inline_data(labels))
        .mark_text(dx=6, dy=-7, align="left", limit=_LONGEST_LABEL)
        .encode(x=x, y=y, text="label:N")
    )
    return spec_of(rules + lines + texts, height=300)


def effects_chart(rows: Sequence[Row], keys: Sequence[str], objective: str) -> dict[str, Spec]:
    """Draw, for each key, the objective of every job against the key's value, and the best."""
    import altair as alt

    charts = {}
    better = "max" if is_larger_better(objective) else "min"
    for key in keys:
        order = _in_order({row["settings"].get(key, "") for row in rows})
        points = [
            {
                "setting": row["settings"].get(key, ""),
                "value": row["value"],
                "text": describe(row, keys, objective),
            }
            for row in rows
        ]
        x = alt.X("setting:O", title=key, sort=order, axis=alt.Axis(labelAngle=0, labelLimit=120))
        y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
        base = alt.Chart(inline_data(points), title=objective).encode(x=x)
        dots = base.mark_point(filled=True, size=60, opacity=0.7).encode(
            y=y, tooltip=alt.Tooltip("text:N", title="job")
        )
        best = base.mark_line(style="gap").encode(y=alt.Y(f"{better}(value):Q", title=None))
        charts[key] = spec_of(best + dots, height=200)
    return charts


def describe(row: Row, keys: Sequence[str], objective: str) -> str:
    """Return what a job is, in a line: `#3 head.num_heads=4: eval/speedup 2.31`."""
    settings = " ".join(f"{key}={row['settings'][key]}" for key in keys if key in row["settings"])
    return f"#{row['number']} {settings}: {objective} {row['value']:.4g}"


Axis = tuple[str, list[float], dict[str, float]]
"""Name, place of each row (0..1), labels and their places."""


def _ordinal_axis(rows: Sequence[Row], key: str) -> Axis:
    order = _in_order({row["settings"].get(key, "") for row in rows})
    place = {value: at / max(len(order) - 1, 1) for at, value in enumerate(order)}
    return key, [place[row["settings"].get(key, "")] for row in rows], place


def _value_axis(rows: Sequence[Row], objective: str) -> Axis:
    low, high = min(row["value"] for row in rows), max(row["value"] for row in rows)
    places = [(row["value"] - low) / (high - low or 1) for row in rows]
    return objective, places, {f"{low:.4g}": 0.0, f"{high:.4g}": 1.0} if high > low else {}


def _in_order(values: set[str]) -> list[str]:
    """Sort numbers as numbers, and words after them."""

    def order(value: str) -> tuple[int, float, str]:
        try:
            return 0, float(value), value
        except ValueError:
            return 1, 0.0, value

    return sorted(values, key=order)
