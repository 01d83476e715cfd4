"""Charts of the reports: Vega-Lite specifications (JSON dicts) made from plain rows.

No colour stands here. A mark names its role (`style="reference"`) or one of the page's ranges
(`category`, `ramp`), and the page gives them colours, light or dark: see `page.html.jinja`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import altair as alt

Row = dict[str, Any]
Spec = dict[str, Any]

_PERCENT = alt.Axis(format=".0%", tickCount=5)
MEASURES = {"speedup": "speed-up", "tokens_per_step": "tokens per step"}


def category_chart(rows: Sequence[Row]) -> Spec:
    """Draw `speedup` and `tokens_per_step` of every `category`, joined by a line."""
    points = [
        {"category": row["category"], "measure": label, "value": row[key]}
        for row in rows
        for key, label in MEASURES.items()
        if row.get(key) is not None
    ]
    y = alt.Y("category:N", title=None, sort=[row["category"] for row in rows])
    scale, axis = alt.Scale(zero=False), alt.Axis(tickCount=6)
    x = alt.X("value:Q", title="times plain decoding", scale=scale, axis=axis)
    base = alt.Chart(inline_data(points))
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(
        x=x,
        y=y,
        color=alt.Color("measure:N", title=None),
        shape=alt.Shape("measure:N", title=None),
        tooltip=["category:N", "measure:N", alt.Tooltip("value:Q", format=".2f")],
    )
    gaps = base.mark_rule(style="gap").encode(x="min(value):Q", x2="max(value):Q", y=y)
    return spec_of(gaps + dots + _reference(x=1), height=30 * max(len(rows), 2))


def waterfall_chart(rows: Sequence[tuple[str, float | None, bool]]) -> Spec:
    """Draw bars from a first value to a last one, each beginning where the one before it ends.

    `rows` are (title, value, whether it is a part: a difference); None draws nothing. The first and
    the last are no parts, and begin at 0.
    """
    bars: list[Row] = []
    end = 0.0
    for title, value, is_part in rows:
        if value is None:
            continue
        start, end = (end, end + value) if is_part else (0.0, value)
        kind = ("lost" if value < 0 else "gained") if is_part else "speed-up"
        text = f"{value:+z.2f}" if is_part else f"{value:.2f}"
        bars.append({"part": title, "start": start, "end": end, "kind": kind, "text": text})
    kinds = ["speed-up", "lost", "gained"]
    most = max(bar[side] for bar in bars for side in ("start", "end"))
    scale = alt.Scale(domainMax=1.1 * most)  # with room for the label of the longest
    base = alt.Chart(inline_data(bars)).encode(
        y=alt.Y("part:N", title=None, sort=None, axis=alt.Axis(labelLimit=320)),
        tooltip=["part:N", alt.Tooltip("text:N", title="speed-up")],
    )
    marks = base.mark_bar(cornerRadius=2).encode(
        x=alt.X("start:Q", title="speed-up", axis=alt.Axis(tickCount=6), scale=scale),
        x2="end:Q",
        color=alt.Color("kind:N", title=None, scale=alt.Scale(domain=kinds)),
    )
    labels = (
        base.mark_text(align="left", dx=4)
        .encode(x=alt.X("right:Q"), text="text:N")
        .transform_calculate(right="max(datum.start, datum.end)")
    )
    return spec_of(marks + labels, height=30 * len(bars))


def accuracy_chart(rows: Sequence[Row]) -> Spec:
    """Draw a bar for every row of `head`, `kind` ("top-1", "top-5") and `share` (0..1)."""
    base = alt.Chart(inline_data(rows)).encode(
        x=alt.X("head:N", title=None, sort=None, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset("kind:N"),
        y=alt.Y("share:Q", title=None, axis=_PERCENT, scale=alt.Scale(domain=[0, 1])),
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        color=alt.Color("kind:N", title=None),
        tooltip=["head:N", "kind:N", alt.Tooltip("share:Q", format=".1%")],
    )
    labels = base.mark_text(dy=-7).encode(text=alt.Text("share:Q", format=".0%"))
    return spec_of(bars + labels)


def rank_chart(rank_share: Sequence[Sequence[float]]) -> Spec:
    """Draw how often each guess of each head is right, heads down and ranks across."""
    cells = [
        {"head": f"head {head}", "rank": rank, "share": share, "percent": f"{100 * share:.0f}"}
        for head, shares in enumerate(rank_share, 1)
        for rank, share in enumerate(shares)
    ]
    base = alt.Chart(inline_data(cells)).encode(
        x=alt.X("rank:O", title="rank of the guess (0 = likeliest)", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("head:N", title=None, sort=None),
        tooltip=["head:N", "rank:O", alt.Tooltip("share:Q", format=".2%", title="right")],
    )
    tiles = base.mark_rect(cornerRadius=3).encode(color=_ramp("share"))
    return spec_of(tiles + _on_ramp(base, "percent", "share"), height=46 * len(rank_share))


def tree_chart(
    parents: Sequence[int], ranks: Sequence[int], probability: Sequence[float] | None
) -> Spec:
    """Draw a tree from left to right: a column for each depth, a row for each leaf.

    `probability` of a node is that of a decoding step committing it; without it all nodes have
    one colour. Raises nothing for a tree of one node.
    """
    nodes = tree_layout(parents, ranks, probability)
    num_leaves = 1 + max(node["row"] for node in nodes)
    depth = max(node["depth"] for node in nodes)
    row_height = min(30.0, max(15.0, 560 / num_leaves))
    x = alt.X(
        "depth:Q",
        title=None,
        scale=alt.Scale(domain=[-0.3, depth + 0.3], nice=False),
        axis=alt.Axis(
            orient="top",
            values=list(range(1 + depth)),
            labelExpr="datum.value == 0 ? 'root' : 'head ' + datum.value",
            grid=False,
            domain=False,
        ),
    )
    scale = alt.Scale(domain=[-0.7, num_leaves - 0.3], reverse=True, nice=False)
    y = alt.Y("row:Q", title=None, axis=None, scale=scale)
    edges = [
        {"edge": child, "depth": nodes[node]["depth"], "row": nodes[node]["row"]}
        for child, parent in enumerate(parents)
        if child
        for node in (parent, child)
    ]
    lines = alt.Chart(inline_data(edges)).mark_line(style="edge").encode(x=x, y=y, detail="edge:N")
    tooltip = ["path:N", "depth:Q", *([] if probability is None else ["probability:Q"])]
    base = alt.Chart(inline_data(nodes)).encode(x=x, y=y, tooltip=tooltip)
    circles = base.mark_circle(style="node", size=(row_height - 2) ** 2 * 0.78, opacity=1)
    if probability is not None:
        circles = circles.encode(color=_ramp("probability"))
    labels = _on_ramp(base, "rank", "probability", size=min(11, row_height - 5))
    return spec_of(lines + circles + labels, height=int(row_height * num_leaves + 12))


def tree_layout(
    parents: Sequence[int], ranks: Sequence[int], probability: Sequence[float] | None
) -> list[Row]:
    """Return a row of chart data for each node: its depth, and a row of its own for each leaf.

    Leaves are numbered in depth-first order, likelier guesses first; a parent stands midway
    between its first and last child.
    """
    children: list[list[int]] = [[] for _ in parents]
    nodes: list[Row] = [{"path": "root", "depth": 0, "rank": ""}]
    for node in range(1, len(parents)):
        above = nodes[parents[node]]
        path = str(ranks[node]) if parents[node] == 0 else f"{above['path']} > {ranks[node]}"
        nodes.append({"path": path, "depth": above["depth"] + 1, "rank": str(ranks[node])})
        children[parents[node]].append(node)
    next_leaf, waiting = 0, [0]
    while waiting:
        node = waiting.pop()
        if not children[node]:
            nodes[node]["row"], next_leaf = float(next_leaf), next_leaf + 1
        waiting.extend(sorted(children[node], key=lambda child: -ranks[child]))
    for node in range(len(parents) - 1, -1, -1):
        rows = [nodes[child]["row"] for child in children[node]]
        if rows:
            nodes[node]["row"] = (min(rows) + max(rows)) / 2
        nodes[node]["probability"] = 1.0 if probability is None else round(probability[node], 4)
    return nodes


def calibration_chart(curve: Sequence[Row], field: str, title: str, chosen: int) -> Spec:
    """Draw `field` of the calibration curve against the number of nodes, and mark the choice.

    Tokens per second that are an estimate are pale.
    """
    x = alt.X("num_nodes:Q", title="nodes in the tree", axis=alt.Axis(tickMinStep=1))
    y = alt.Y(f"{field}:Q", title=None, scale=alt.Scale(zero=False))
    tooltip = [alt.Tooltip("num_nodes:Q", title="nodes"), alt.Tooltip(f"{field}:Q", format=",.2f")]
    base = alt.Chart(inline_data(curve), title=title).encode(x=x, y=y, tooltip=tooltip)
    points = base.mark_point(filled=True, size=34, opacity=1)
    if field == "tokens_per_second":
        pale = alt.condition("datum.is_estimate", alt.value(0.35), alt.value(1))
        points = points.encode(opacity=pale)
    lines = base.mark_line() + points
    marked = [row for row in curve if row["num_nodes"] == chosen]
    if marked:  # Vega warns about a layer without data
        ring = alt.Chart(inline_data(marked)).encode(x=x, y=y, tooltip=tooltip)
        lines += ring.mark_point(style="chosen", size=190)
    return spec_of(_reference(chosen) + lines, height=190)


def length_chart(lengths: Sequence[int]) -> Spec:
    """Draw the share of decoding steps that committed 1, 2, 3, ... tokens."""
    counts = Counter(lengths)
    rows = [
        {"tokens": tokens, "steps": counts[tokens], "share": counts[tokens] / len(lengths)}
        for tokens in range(1, max(counts) + 1)
    ]
    base = alt.Chart(inline_data(rows)).encode(
        x=alt.X("tokens:O", title="tokens committed in a step", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("share:Q", title="share of steps", axis=_PERCENT),
    )
    bars = base.mark_bar(cornerRadiusEnd=2).encode(
        tooltip=["tokens:O", "steps:Q", alt.Tooltip("share:Q", format=".1%")]
    )
    labels = base.mark_text(dy=-7).encode(text=alt.Text("share:Q", format=".0%"))
    return spec_of(bars + labels)


def curve_chart(rows: Sequence[Row], title: str, is_share: bool) -> Spec:
    """Draw lines of `value` against `step`, one for each `series`, colours in order of `rows`."""
    axis = _PERCENT if is_share else alt.Axis(tickCount=5)
    y = alt.Y("value:Q", title=None, axis=axis, scale=alt.Scale(zero=False))
    names = list(dict.fromkeys(row["series"] for row in rows))
    legend = alt.Legend() if len(names) > 1 else None
    shown = ".1%" if is_share else ".4~g"
    base = alt.Chart(inline_data(rows), title=title).encode(
        x=alt.X("step:Q", axis=alt.Axis(tickCount=5, format="~s")),
        y=y,
        color=alt.Color("series:N", title=None, sort=names, legend=legend),
        tooltip=["series:N", "step:Q", alt.Tooltip("value:Q", format=shown)],
    )
    return spec_of(base.mark_line() + base.mark_point(filled=True, size=20, opacity=1), height=200)


def inline_data(rows: Sequence[Row]) -> Any:
    """Return rows as what a chart takes its data from."""
    return alt.Data(values=list(rows))


def _reference(x: float) -> Any:
    return alt.Chart(inline_data([{"x": x}])).mark_rule(style="reference").encode(x="x:Q")


def _ramp(field: str) -> Any:
    """Colour by a share; the square root keeps small shares apart."""
    return alt.Color(f"{field}:Q", scale=alt.Scale(type="sqrt", domain=[0, 1]), legend=None)


def _on_ramp(base: Any, text: str, share: str, size: float = 11) -> Any:
    """Write on marks coloured by `_ramp`, in the ink that is legible there."""
    written = base.encode(text=f"{text}:N")
    pale = written.transform_filter(f"datum.{share} < 0.5")
    strong = written.transform_filter(f"datum.{share} >= 0.5")
    return pale.mark_text(style="on-pale", fontSize=size) + strong.mark_text(
        style="on-strong", fontSize=size
    )


def spec_of(chart: Any, height: int = 230) -> Spec:
    """Finish a chart: as wide as its place, its colours left to the page, no URL in it."""
    spec = chart.properties(width="container", height=height).to_dict()
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}
