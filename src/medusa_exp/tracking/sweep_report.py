"""The report of a sweep: `report.html`, one self-contained page made from its jobs' files."""

import logging
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import altair as alt

from medusa_exp.config.command_line import split_override
from medusa_exp.config.privacy import shareable, shell_command
from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json
from medusa_exp.runs.jobs import objective_of, read_jobs
from medusa_exp.runs.locks import locked
from medusa_exp.runs.metric_table import METRICS, is_larger_better
from medusa_exp.tracking.charts import Row, Spec, inline_data, spec_of
from medusa_exp.tracking.run_report import finite_numbers, render

log = logging.getLogger(__name__)
_LONGEST_LABEL = 110
"""Pixels; the table has settings in full."""


def write_comparison(sweep_dir: Path) -> Path:
    """Write `sweep_dir/report.html` from the files of the jobs, and return its path.

    Jobs write it one after another, each from what all have left so far.
    """
    with locked(sweep_dir / ".report.lock"):
        shown = shareable(content(sweep_dir))
        return render("comparison.html.jinja", shown, sweep_dir / "report.html")


def content(sweep_dir: Path) -> Row:
    """Return what `comparison.html.jinja` shows, by the names it uses.

    `rows` has one for each job, `keys` the settings in which they differ, `shared` the overrides
    that all have, `best` the row with the best `value` of `objective`, or None, and `again` the
    command that measures the speed-up of that one.
    """
    jobs = read_jobs(sweep_dir)
    objective = objective_of(jobs.values())
    rows = [_job_row(sweep_dir, name, job, objective) for name, job in jobs.items()]
    keys = swept_keys(rows)
    ranked = [row for row in rows if row["value"] is not None]
    pick = max if is_larger_better(objective) else min
    best = pick(ranked, key=lambda row: row["value"], default=None)
    if best is not None:
        best["is_best"] = True
    return {
        "name": f"{rows[0]['name']}: {sweep_dir.name}" if rows else sweep_dir.name,
        "objective": objective,
        "rows": rows,
        "keys": keys,
        "columns": _columns(rows, objective),
        "best": best,
        "counts": _counts_by_status(rows),
        "values": _low_median_high([row["value"] for row in ranked]),
        "coordinates": coordinates_chart(ranked, keys, objective) if len(ranked) > 1 else None,
        "effects": effects_chart(ranked, keys, objective) if len(ranked) > 1 else None,
        "costs": costs_chart(rows, keys),
        "shared": _shared_overrides(jobs.values()),
        "again": _command_again(sweep_dir, best) if best else None,
    }


def _job_row(sweep_dir: Path, name: str, job: Row, objective: str) -> Row:
    run = _read_or_empty(sweep_dir / name / "run.json")
    metrics = finite_numbers(_read_or_empty(sweep_dir / name / "metrics.json"))
    is_ours = job["objective"] == objective
    has_page = (sweep_dir / name / "report.html").is_file()
    return {
        "job": name,
        "name": run.get("name", "sweep"),
        "link": f"{name}/report.html" if has_page else None,
        "settings": dict(map(split_override, job["overrides"])),
        "seconds": sum(entry.get("seconds", 0) for entry in run.get("stages", {}).values()),
        "metrics": metrics,
        "is_best": False,
        "value": job["value"] if is_ours else metrics.get(objective),
        **{key: job.get(key) for key in ("number", "status", "error")},
    }


def _read_or_empty(path: Path) -> Row:
    """Read a file of one job; nothing of it where it is damaged: the others are shown still."""
    try:
        return dict(read_json(path, {}))
    except UserError as error:
        log.warning("%s", error)
        return {}


def swept_keys(rows: list[Row]) -> list[str]:
    """Return the keys in which the jobs differ, in the order in which they were given."""
    seen = dict.fromkeys(key for row in rows for key in row["settings"])
    return [key for key in seen if len({row["settings"].get(key) for row in rows}) > 1]


def _shared_overrides(jobs: Iterable[Row]) -> list[str]:
    given = [job["overrides"] for job in jobs]
    return [item for item in given[0] if all(item in other for other in given)] if given else []


def _columns(rows: list[Row], objective: str) -> list[tuple[str, str, str]]:
    """Return (metric, title, format) of the columns that some job has a number for.

    The objective comes first, whatever it is.
    """
    columns = {row.name: (row.column, row.form) for row in METRICS if row.column}
    known = {objective: columns.get(objective, (objective, "%.4g")), **columns}
    return [
        (metric, title, form)
        for metric, (title, form) in known.items()
        if any(metric in row["metrics"] for row in rows)
    ]


def _counts_by_status(rows: list[Row]) -> dict[str, int]:
    states = [row["status"] for row in rows]
    order = ("done", "failed", "running", "interrupted")
    return {state: states.count(state) for state in order if state in states}


def _low_median_high(values: list[float]) -> Row | None:
    if not values:
        return None
    return {"low": min(values), "median": statistics.median(values), "high": max(values)}


def _command_again(sweep_dir: Path, row: Row) -> str:
    """Return the command that measures a job's speed-up, again or for the first time."""
    is_evaluated = "eval/speedup" in row["metrics"]
    stages = "evaluate,report" if is_evaluated else "calibrate,evaluate,report"
    where = f"run_dir={sweep_dir / row['job']}"
    return shell_command(["python", "-m", "medusa_exp", f"stages=[{stages}]", where])


def coordinates_chart(rows: Sequence[Row], keys: Sequence[str], objective: str) -> Spec:
    """Draw parallel coordinates: an axis for each key and for the objective, a line for each job.

    Args:
        rows: of jobs with a value: `settings`, `value`, `number` and `is_best`.
        keys: of `settings`, that the jobs differ in.
        objective: the name of `value`.
    """
    places = _value_axis(rows, objective)[1]
    shades = places if is_larger_better(objective) else [1 - place for place in places]
    axes = [_ordinal_axis(rows, key) for key in keys] + [_value_axis(rows, objective)]
    points = [
        {
            "job": row["number"],
            "axis": name,
            "position": place,
            "shade": shade,
            "text": job_label(row, keys, objective),
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
    lines = alt.Chart(inline_data(points)).encode(
        x=x,
        y=y,
        detail="job:N",
        opacity=alt.Opacity("shade:Q", scale=alt.Scale(range=[0.2, 1]), legend=None),
        strokeWidth=alt.StrokeWidth("shade:Q", scale=alt.Scale(range=[1, 3]), legend=None),
        tooltip=alt.Tooltip("text:N", title="job"),
    )
    base = alt.Chart(inline_data(labels)).encode(x=x)
    rules, texts = base.mark_rule(style="edge"), base.encode(y=y, text="label:N")
    texts = texts.mark_text(dx=6, dy=-7, align="left", limit=_LONGEST_LABEL)
    return spec_of(rules + lines.mark_line() + texts, height=300)


def effects_chart(rows: Sequence[Row], keys: Sequence[str], objective: str) -> dict[str, Spec]:
    """Draw, for each key, the objective of every job against the key's value, and the best."""
    charts = {}
    labels = [job_label(row, keys, objective) for row in rows]
    better = "max" if is_larger_better(objective) else "min"
    for key in keys:
        order = _in_order({row["settings"].get(key, "") for row in rows})
        points = [
            {"setting": row["settings"].get(key, ""), "value": row["value"], "text": label}
            for row, label in zip(rows, labels, strict=True)
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


def costs_chart(rows: Sequence[Row], keys: Sequence[str]) -> Spec | None:
    """Draw tokens per step against what a step costs, a point for each job that was evaluated.

    The cost is that of a step with heads over one of plain decoding, which makes a token each:
    their quotient is the speed-up. None where fewer than two jobs have been.
    """
    names = ("eval/tokens_per_step", "eval/speedup")
    points = []
    for row in rows:
        tokens, speedup = (row["metrics"].get(name) for name in names)
        if tokens and speedup:
            label = _settings_text(row, keys)
            text = f"#{row['number']} {label}: {tokens:.2f} tokens, {speedup:.2f} times as fast"
            points.append(
                {"cost": tokens / speedup, "tokens": tokens, "setting": label, "text": text}
            )
    if len(points) < 2:
        return None
    loose = alt.Scale(zero=False, padding=20)
    base = alt.Chart(inline_data(points)).encode(
        x=alt.X("cost:Q", title="cost of a step (plain decoding: 1)", scale=loose),
        y=alt.Y("tokens:Q", title="tokens per step", scale=loose),
        tooltip=alt.Tooltip("text:N", title="job"),
    )
    dots = base.mark_point(filled=True, size=60, opacity=0.7)
    texts = base.mark_text(dx=8, align="left", limit=3 * _LONGEST_LABEL).encode(text="setting:N")
    return spec_of(dots + texts, height=300)


def job_label(row: Row, keys: Sequence[str], objective: str) -> str:
    """Return what a job is, in a line: `#3 head.num_heads=4: eval/speedup 2.31`."""
    return f"#{row['number']} {_settings_text(row, keys)}: {objective} {row['value']:.4g}"


def _settings_text(row: Row, keys: Sequence[str]) -> str:
    return " ".join(f"{key}={row['settings'][key]}" for key in keys if key in row["settings"])


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
