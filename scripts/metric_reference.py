"""Write docs/reference/metrics.md from METRICS: `python scripts/metric_reference.py`."""

from pathlib import Path

from medusa_exp.runs.metric_table import METRICS, Metric

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "metrics.md"
HEAD = """\
# Metrics

Every number that a stage leaves in `metrics.json`, by stage. This page is written from `METRICS` in
`src/medusa_exp/runs/metric_table.py` by `python scripts/metric_reference.py`.

- **better**: the end that a sweep looks for; no entry where neither end is better.
- **timed**: depends on a clock, or is chosen by what one says, so two equal runs differ in it.
- `{head}`, `{depth}` and `{batch_size}` stand for a number, `{method}` and `{category}` for a name.
- Shares are 0 to 1.
"""


def reference() -> str:
    """Return the page."""
    page = HEAD
    for stage in dict.fromkeys(metric.stage for metric in METRICS):
        page += f"\n## {stage}\n\n| metric | what it is | better | timed |\n|---|---|---|---|\n"
        page += "".join(_row(metric) for metric in METRICS if metric.stage == stage)
    return page


def _row(metric: Metric) -> str:
    timed = "yes" if metric.is_timed else ""
    return f"| `{metric.name}` | {metric.title} | {metric.better or ''} | {timed} |\n"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
