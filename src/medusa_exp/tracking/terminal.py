"""What the terminal shows of a run, and what it is spared."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medusa_exp.runs.jobs import objective_of

_HEADLINES = (
    ("eval/speedup", "speed-up over plain decoding", "{:.2f}x"),
    ("eval/tokens_per_step", "tokens per backbone step", "{:.2f}"),
    ("eval/identical_fraction", "answers identical to plain decoding", "{:.1%}"),
    ("eval/prompt_lookup_tokens_per_step", "prompt lookup, tokens per step", "{:.2f}"),
    ("eval/prompt_lookup_speedup", "prompt lookup, speed-up", "{:.2f}x"),
    ("eval/baseline_vs_hf", "our plain decoding over model.generate", "{:.2f}x"),
    ("calibrate/predicted_speedup", "speed-up that calibration predicted", "{:.2f}x"),
    ("eval/outside_backbone_fraction", "share of a step outside the backbone", "{:.1%}"),
    ("eval/num_nodes", "nodes of the tree", "{:.0f}"),
    ("calibrate/break_even_batch_size", "batch size at which no tree pays", "{:.0f}"),
    ("eval/backbone_nats_per_token", "backbone's held-out loss, nats per token", "{:.3f}"),
    ("val/accept_length", "tokens per step, replayed in validation", "{:.2f}"),
    ("train/loss", "loss of the heads", "{:.3f}"),
)


def print_summary(
    out: Path, stages: list[str], entries: dict[str, Any], metrics: dict[str, float]
) -> None:
    """Print the time of each stage, the numbers that matter most, and where the files lie.

    Args:
        out: the run directory.
        stages: those of this call.
        entries: run.json's `stages`, by name.
        metrics: all of metrics.json, of earlier calls too.
    """
    console = Console()
    times = Table("stage", "seconds", title=None)
    for stage in stages:
        times.add_row(stage, f"{entries[stage]['seconds']:.1f}")
    figures = Table("figure", "value")
    for label, value in headlines(metrics):
        figures.add_row(label, value)
    console.print(times)
    if figures.row_count:
        console.print(figures)
    report = out / "report.html"
    if "report" in stages:
        console.print(f"report: {report}", soft_wrap=True, markup=False)
        return
    console.print(f"run directory: {out}", soft_wrap=True, markup=False)
    if report.is_file() and stages != ["chat"]:  # of which it shows nothing
        hint = "its report.html does not show this call yet: stages=[report] writes it again"
        console.print(hint, soft_wrap=True, markup=False)


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
    for name, label, form in _HEADLINES:
        if name in metrics:
            value = form.format(metrics[name])
            if f"{name}_low" in metrics:
                low, high = (form.format(metrics[f"{name}_{end}"]) for end in ("low", "high"))
                value += f" (95 %: {low} to {high})"
            yield label, value
    for name, speedup in metrics.items():
        size = re.fullmatch(r"eval/tree/b(\d+)/speedup", name)
        if size and size[1] != "1":
            yield f"speed-up, {size[1]} prompts at a time", f"{speedup:.2f}x"


def quiet_libraries(stages: list[str]) -> None:
    """Silence what libraries say about themselves; their warnings still come through."""
    from transformers.utils import logging as transformers_logging

    if {"pretrain", "regenerate", "train"} & set(stages):
        import lightning.pytorch  # it sets up its logging when it is imported

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    lightning = logging.getLogger("lightning.pytorch")
    lightning.handlers.clear()  # Hydra's handlers print what is passed on
