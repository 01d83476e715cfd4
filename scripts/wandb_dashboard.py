"""Create the project's dashboard on W&B, or bring it up to date: one workspace, as code.

    python scripts/wandb_dashboard.py ENTITY/PROJECT            needs `wandb login`
    python scripts/wandb_dashboard.py ENTITY/PROJECT --print    shows its specification

Needs `pip install 'medusa-exp[dashboard]'`. `tests/tracking/test_wandb_artifacts.py` holds every
name below against what a run logs.
"""

import argparse
import sys
from typing import Any

from medusa_exp.errors import UserError
from medusa_exp.runs.metric_table import AXES, PARTS_OF_TIME, metric_of

NAME = "Medusa heads"
VIEW = "medusaheads"
"""The workspace's name in its URL, as ?nw=..., by which it is found again."""

SPEEDUP = "eval/speedup"
TOKENS_PER_STEP = "eval/tokens_per_step"
ACCEPT_LENGTH = "val/accept_length"
SWEPT = (
    "head.kind",
    "head.num_heads",
    "head.num_layers",
    "train.learning_rate",
    "train.loss",
    "tree.kind",
    "tree.num_nodes",
    "dtype.backbone",
)
"""Keys of the config that `conf/sweep/` and the README vary, in the order of the parallel
coordinates."""


def build(entity: str, project: str) -> Any:
    """Return the workspace, a `wandb_workspaces.workspaces.Workspace`; asks no server."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section("Overview", _overview(wr), is_open=True, pinned=True),
        ws.Section("Training", _training(wr), is_open=True),
        ws.Section("Acceptance by head and depth", _acceptance(wr), is_open=True),
        ws.Section("Speed-up against tree size", _tree_size(wr), is_open=True),
        ws.Section("Sweep comparison", _sweep(wr), is_open=True),
        ws.Section("Kernels", _kernels(wr)),
    ]
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def create_or_update(entity: str, project: str) -> str:
    """Create the workspace or bring it up to date; return its URL.

    Raises:
        UserError: there is no such project, or nobody is logged in.
    """
    import wandb
    import wandb_workspaces.workspaces as ws

    workspace = build(entity, project)
    try:
        view = ws.internal.View.from_name(entity, project, _internal_name())  # private: wandb 0.31
        workspace._internal_id = view.id  # private: wandb 0.31
    except ValueError as error:
        if not str(error).startswith("Workspace"):  # the other error is about the project
            raise UserError(f"{error} Log a run there first, or look at `wandb login`.") from error
    except (wandb.errors.UsageError, wandb.errors.CommError) as error:
        raise UserError(f"W&B: {error} Is there a network, and did you `wandb login`?") from error
    workspace._internal_name = _internal_name()  # private: wandb 0.31
    workspace.save()
    return str(workspace.url)


def spec(entity: str, project: str) -> str:
    """Return the workspace's specification as JSON, as it would be sent."""
    model = build(entity, project)._to_model()  # private: wandb 0.31
    return str(model.spec.model_dump_json(by_alias=True, exclude_none=True, indent=1))


def _internal_name() -> str:
    from wandb_workspaces.workspaces import internal

    return str(internal._url_query_str_to_internal_name(VIEW))  # private: wandb 0.31


def _overview(wr: Any) -> list[Any]:
    return [
        wr.ScalarChart(title="Best speed-up", metric=SPEEDUP, groupby_aggfunc="max"),
        wr.ScalarChart(title="Most tokens per step", metric=TOKENS_PER_STEP, groupby_aggfunc="max"),
        wr.ScalarChart(
            title="Least share of identical answers",
            metric="eval/identical_fraction",
            groupby_aggfunc="min",
        ),
        wr.BarPlot(
            title="Speed-up over plain decoding (95 % interval)",
            metrics=["eval/speedup_low", SPEEDUP, "eval/speedup_high"],
        ),
        wr.BarPlot(
            title="Predicted by calibration, and found",
            metrics=["calibrate/predicted_speedup", SPEEDUP],
        ),
        wr.WeavePanelSummaryTable(table_name="eval/samples"),
        wr.RunComparer(diff_only="split"),
    ]


def _training(wr: Any) -> list[Any]:
    return [
        _curve(wr, "train/loss"),
        _curve(wr, ACCEPT_LENGTH),
        _curve(wr, "val/accept_length_chain"),
        _curves(wr, "Loss of each head", "train/loss_head"),
        _curves(wr, "Held-out loss of each head", "val/loss_head"),
        _curves(wr, "Held-out top-1 of each head", "val/top1_head"),
        _curve(wr, "pretrain/loss"),
        wr.WeavePanelSummaryTable(table_name="data/dropped"),
    ]


def _acceptance(wr: Any) -> list[Any]:
    return [
        _curve(wr, "by_head/top1", "Top-1 by head"),
        _curve(wr, "by_head/top5", "Top-5 by head"),
        _curve(wr, "by_depth/accepted", "Steps that accept a draft token, by depth"),
        wr.LinePlot(title="Tokens that a step gave", y=["eval/accept_lengths"]),
        wr.WeavePanelSummaryTable(table_name="calibrate/rank_share"),
        wr.MediaBrowser(title="The tree", media_keys=["images/tree"]),
    ]


def _tree_size(wr: Any) -> list[Any]:
    return [
        _curve(wr, "by_nodes/speedup", "Expected speed-up"),
        _curve(wr, "by_nodes/tokens_per_step", "Tokens per step"),
        _curve(wr, "by_nodes/step_over_plain", "Step over plain step"),
        wr.ScatterPlot(
            title="Speed-up found, by nodes of the tree",
            x=wr.SummaryMetric("eval/num_nodes"),  # of the tree used, calibrated or not
            y=wr.SummaryMetric(SPEEDUP),
        ),
        wr.MediaBrowser(title="Calibration", media_keys=["images/calibration"]),
    ]


def _sweep(wr: Any) -> list[Any]:
    column = wr.ParallelCoordinatesPlotColumn
    results = [wr.SummaryMetric(name) for name in (ACCEPT_LENGTH, TOKENS_PER_STEP, SPEEDUP)]
    return [
        wr.ParallelCoordinatesPlot(
            title="Settings and what they gave",
            columns=[column(metric) for metric in (*map(wr.Config, SWEPT), *results)],
        ),
        wr.ParameterImportancePlot(with_respect_to=SPEEDUP),
        wr.ParameterImportancePlot(with_respect_to=ACCEPT_LENGTH),
        wr.ScatterPlot(
            title="Speed-up by validation's accept length",
            x=wr.SummaryMetric(ACCEPT_LENGTH),
            y=wr.SummaryMetric(SPEEDUP),
        ),
        wr.BarPlot(title="Speed-up by sweep", metrics=[SPEEDUP], groupby="Group"),
    ]


def _kernels(wr: Any) -> list[Any]:
    verifier = wr.Config("decode.verifier")
    return [
        wr.BarPlot(
            title="Share of a step outside the backbone, by verifier",
            metrics=["eval/outside_backbone_fraction"],
            groupby=verifier,
        ),
        wr.BarPlot(
            title="Tokens per second, by verifier",
            metrics=["eval/tokens_per_second"],
            groupby=verifier,
        ),
        wr.BarPlot(
            title="Where the time of decoding goes",
            metrics=[f"eval/time/{part}" for part in PARTS_OF_TIME],
        ),
        _curve(wr, "by_batch/speedup", "Speed-up by batch size"),
        _curve(wr, "by_batch/tokens_per_second", "Tokens per second by batch size"),
    ]


def _curve(wr: Any, metric: str, title: str = "") -> Any:
    """Return a plot of a metric, which has a row in METRICS where no title is given."""
    if row := metric_of(metric):
        title = title or row.title[0].upper() + row.title[1:]
    return wr.LinePlot(title=title, x=AXES[metric.partition("/")[0]], y=[metric])


def _curves(wr: Any, title: str, prefix: str) -> Any:
    """Return a plot of the metrics of all heads, however many there are."""
    return wr.LinePlot(title=title, x="train/step", metric_regex=f"{prefix}[0-9]+")


def main(arguments: list[str]) -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(prog="python scripts/wandb_dashboard.py")
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--print", action="store_true", dest="is_dry", help="send nothing")
    options = parser.parse_args(arguments)
    entity, _, project = options.project.partition("/")
    if not (entity and project):
        parser.error(f"{options.project} is not of the form ENTITY/PROJECT")
    try:
        print(spec(entity, project) if options.is_dry else create_or_update(entity, project))
    except UserError as error:
        sys.exit(str(error))
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: pip install 'medusa-exp[dashboard]'")


if __name__ == "__main__":
    main(sys.argv[1:])
