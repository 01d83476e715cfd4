"""Terminal output: tables at the end of a run or sweep; libraries that are silenced."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medusa_exp.runs.files import read_json
from medusa_exp.runs.jobs import objective_of
from medusa_exp.runs.metric_table import METRICS, PARTS_OF_LOSS, fields
from medusa_exp.runs.record import RunRecord


def print_summary(record: RunRecord) -> None:
    """Print the time of this call's stages, their most important numbers, and where files lie.

    With a report, which shows the whole run, the numbers are the whole run's.
    """
    out, stages = record.out, record.config.stages
    console = Console()
    times = Table("stage", "seconds", title=None)
    for stage in stages:
        times.add_row(stage, f"{record.run['stages'][stage]['seconds']:.1f}")
    figures, metrics = Table("figure", "value"), record.metrics
    if "report" not in stages:
        names = {
            name for stage in stages for name in record.run["stages"][stage].get("metrics", ())
        }
        metrics = {name: value for name, value in metrics.items() if name in names}
    for label, value in headlines(metrics):
        figures.add_row(label, value)
    console.print(times)
    if figures.row_count:
        console.print(figures)
    if "evaluate" in stages and (why := read_json(out / "why.json")):
        _print_why(console, why)
    report = out / "report.html"
    if "report" in stages and report.is_file():
        console.print(f"report: {report}", soft_wrap=True, markup=False)
        return
    console.print(f"run directory: {out}", soft_wrap=True, markup=False)
    if report.is_file() and stages != ["chat"]:  # of which it shows nothing
        hint = "its report.html does not show this call yet: 'stages=[report]' writes it again"
        console.print(hint, soft_wrap=True, markup=False)


def _print_why(console: Console, why: dict[str, Any]) -> None:
    """Print what becomes of the tokens per step on the way to the speed-up, of why.json."""
    if found := why["waterfalls"]:
        table = Table("why not more?", title=None)
        for one in found:
            size = one["batch_size"]
            table.add_column("1 prompt" if size == 1 else f"{size} prompts", justify="right")
        ideals = (f"{one['ideal']:.2f}x  100 %" for one in found)
        table.add_row("tokens per step, if all steps cost the same", *ideals)
        for name, title in PARTS_OF_LOSS.items():
            shares = [_times_of(one, name) for one in found]
            if any(shares):
                table.add_row(f"  {title}", *shares)
        table.add_row("speed-up", *(f"{one['measured']:.2f}x      " for one in found))
        console.print(table)
    for sentence in (*why["advice"], why["when"]):
        # A command is one line, to be copied; where it is cut is for the terminal to say.
        console.print(Text(sentence), soft_wrap="`" in sentence)


def _times_of(waterfall: dict[str, Any], name: str) -> str:
    """Return what a part takes of the speed-up, and its share of the ideal."""
    parts = [part for part in waterfall["parts"] if part["name"] == name]
    return "".join(f"{-part['times']:+z.2f}x {-part['share']:+z5.0%}" for part in parts)


def print_jobs(sweep_dir: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Print a table of a sweep's jobs, and where their page is."""
    console = Console()
    objective = objective_of(jobs.values())
    shared = set.intersection(*(set(job["overrides"]) for job in jobs.values()))
    table = Table("job", "status", "settings", objective)
    for name, job in jobs.items():
        settings = " ".join(item for item in job["overrides"] if item not in shared)
        value = "" if job["value"] is None else f"{job['value']:.4g}"
        if value and job["objective"] != objective:
            value += f" ({job['objective']})"
        outcome = job.get("error") or value
        table.add_row(f"{job['number']} {name}", job["status"], Text(settings), Text(outcome))
    console.print(table)
    console.print(f"report: {sweep_dir / 'report.html'}", soft_wrap=True, markup=False)


def headlines(metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Yield what is said of a run first, and how."""
    if metrics.get("eval/is_lossless") == 0:
        yield "LOSSY", "typical acceptance changes answers"
    for metric in METRICS:
        name = metric.name
        if metric.is_headline and name in metrics:
            value = metric.text(metrics[name])
            if f"{name}_low" in metrics:
                low, high = (metric.text(metrics[f"{name}_{end}"]) for end in ("low", "high"))
                value += f" (95 %: {low} to {high})"
            yield metric.title, value
    for name, speedup in metrics.items():
        found = fields("eval/tree/b{batch_size}/speedup", name)
        if found and found["batch_size"] != "1":
            yield f"speed-up, {found['batch_size']} prompts at a time", f"{speedup:.2f}x"
        if found := fields("eval/server/c{concurrency}/speedup", name):
            yield f"speed-up in the engine, {found['concurrency']} on their way", f"{speedup:.2f}x"


def quiet_libraries(stages: list[str]) -> None:
    """Silence what libraries say about themselves; their warnings still come through."""
    from transformers.utils import logging as transformers_logging

    if {"pretrain", "regenerate", "train"} & set(stages):
        import lightning.pytorch  # it sets up its logging when it is imported

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "httpx2", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    lightning = logging.getLogger("lightning.pytorch")
    lightning.handlers.clear()  # Hydra's handlers print what is passed on
