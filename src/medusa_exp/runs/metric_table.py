"""METRICS: every number that a stage measures, declared once, one row for each.

Whatever shows, ranks or compares metrics reads this table: the terminal, the reports of runs and
sweeps, W&B and its dashboard, and docs/reference/metrics.md. A new metric is returned from its
stage's `run` and gets its row here, the more important ones first.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from typing import Literal

from medusa_exp.errors import UserError

_STAGES = {
    "val": "train",
    "eval": "evaluate",
    "why": "evaluate",
    "data": "inspect",
    "doctor": "inspect",
}
"""First word of a name -> the stage that measures it, where it is not that stage's own name."""
_FIELDS = {
    "head": r"\d+",
    "depth": r"\d+",
    "method": r"\w+",
    "batch_size": r"\d+",
    "concurrency": r"\d+",
    "position": r"\d+",
    "category": ".+",
}
"""What may stand in braces in a name -> what it stands for, as a regular expression."""


@dataclass(frozen=True)
class Metric:
    """A metric, or all those whose names differ in a number or a word alone."""

    name: str
    """As in metrics.json; what stands in braces is one of `_FIELDS`."""
    title: str
    better: Literal["larger", "smaller"] | None = None
    """The end that is better, None where neither is."""
    is_timed: bool = False
    """Does it depend on a clock, so that two equal runs differ in it? What is chosen by timing, as
    a calibrated tree is, counts."""
    unit: Literal["", "x", "share"] = ""
    """x: a ratio; share: 0 to 1, shown as a percentage."""
    digits: int = 2
    """After the point, as it is shown."""
    is_headline: bool = False
    """Is it printed at the end of a run?"""
    stat: str = ""
    """Label in the headline of a run's report; `{NAME}` in it is the value of metric NAME."""
    column: str = ""
    """Title of its column in a sweep's report."""
    has_best: bool = False
    """Is it of each validation? Then W&B has its best value so far too."""

    @property
    def stage(self) -> str:
        """The stage that measures it, which the first word of its name tells."""
        first = self.name.partition("/")[0]
        return _STAGES.get(first, first)

    def text(self, value: float) -> str:
        """Return a value as a terminal shows it: `1.62x`, `71.3%`, `842`."""
        if self.unit == "share":
            return f"{value:.{self.digits}%}"
        return f"{self.bare(value)}{self.unit}"

    def bare(self, value: float) -> str:
        """Return the number alone: of a share, as 0 to 1."""
        is_rate = self.name.endswith("tokens_per_second")
        return rate_text(value) if is_rate else self.form % value

    @property
    def form(self) -> str:
        """The printf format of the bare number: of a share, as 0 to 1."""
        return f"%.{self.digits + 2 * (self.unit == 'share')}f"


def rate_text(value: float) -> str:
    """Return tokens per second: few with a decimal, since 5 beside 6 contradicts 1.3x."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


PARTS_OF_TIME = {
    "prompt": "backbone, on the prompts",
    "backbone": "backbone, on trees",
    "heads": "heads and drafting",
    "mask": "masks of the trees",
    "verification": "verification",
    "cache": "keeping what is accepted",
    "rest": "all else",
}
"""NAME of each `eval/time/NAME`, which `evaluate/step_profile.py` measures, and what it is called;
in the order in which they come up. The rest is Python between them."""
PARTS_OF_LOSS = {
    "acceptance": "acceptance, from validation to decoding",
    "prompt": "prompts, which are not sped up",
    "heads": "heads and drafting",
    "width": "backbone over a tree instead of one token",
    "verification": "verification, and keeping what is accepted",
    "host": "host and launches between these",
    "unexplained": "not explained",
    "batch": "several prompts at a time",
}
"""NAME of each `why/NAME`, which `evaluate/waterfall.py` finds, and what it is called; in the order
in which the report goes down."""
_ratio = partial(Metric, better="larger", unit="x", is_timed=True)
_rate = partial(Metric, better="larger", digits=0, is_timed=True)
_share = partial(Metric, better="larger", unit="share", digits=1)
_tokens = partial(Metric, better="larger")
_loss = partial(Metric, better="smaller", digits=3)
_count = partial(Metric, digits=0)
_ms = partial(Metric, better="smaller", is_timed=True)

METRICS = (
    # stage evaluate
    _ratio("eval/speedup", "speed-up over plain decoding", is_headline=True, column="speed-up"),
    _ratio("eval/speedup_low", "speed-up, lower end of its 95 % interval"),
    _ratio("eval/speedup_high", "speed-up, upper end of its 95 % interval"),
    _tokens(
        "eval/tokens_per_step",
        "tokens per backbone step",
        is_headline=True,
        stat="tokens per step (plain decoding: 1.00)",
        column="tokens per step",
    ),
    _rate(
        "eval/tokens_per_second",
        "tokens per second",
        stat="tokens per second (plain decoding: {eval/baseline_tokens_per_second})",
    ),
    _rate("eval/baseline_tokens_per_second", "tokens per second of plain decoding"),
    _share(
        "eval/identical_fraction",
        "answers identical to plain decoding",
        is_headline=True,
        column="identical",
    ),
    _count("eval/is_lossless", "1 where acceptance cannot change answers", better="larger"),
    _count("eval/num_differences", "answers that differ from plain decoding", better="smaller"),
    _share("eval/near_tie_fraction", "those of them that rounding explains"),
    _tokens(
        "eval/prompt_lookup_tokens_per_step", "prompt lookup, tokens per step", is_headline=True
    ),
    _ratio(
        "eval/prompt_lookup_speedup",
        "prompt lookup, speed-up",
        is_headline=True,
        stat="prompt lookup, which needs no training "
        "({eval/prompt_lookup_tokens_per_step} tokens per step)",
    ),
    _ratio(
        "eval/baseline_vs_hf",
        "our plain decoding over model.generate",
        is_headline=True,
        stat="our plain decoding against model.generate (above 1: ours is the faster baseline)",
    ),
    _share("eval/hf_identical_fraction", "answers of model.generate identical to plain decoding"),
    _share(
        "eval/outside_backbone_fraction",
        "share of a step outside the backbone",
        better="smaller",
        is_timed=True,
        is_headline=True,
        stat="of a step's time is spent outside the backbone",
    ),
    *(
        _share(
            f"eval/time/{part}",
            f"share of decoding time: {what}",
            better=None if part in ("prompt", "backbone") else "smaller",
            is_timed=True,
        )
        for part, what in PARTS_OF_TIME.items()
    ),
    _tokens(
        "why/ideal",
        "speed-up if a step over the tree cost what a plain one costs: tokens per step",
        is_timed=True,
    ),
    _share("why/kept", "share of why/ideal that was measured as speed-up", is_timed=True),
    *(
        _share(f"why/{part}", f"share of why/ideal lost: {what}", better="smaller", is_timed=True)
        for part, what in PARTS_OF_LOSS.items()
    ),
    _ratio(
        "why/break_even_batch_size",
        "prompts at a time from which on plain decoding is faster",
        unit="",
        digits=0,
        is_headline=True,
    ),
    _share("why/b{batch_size}/kept", "the same at a batch size", is_timed=True),
    *(
        _share(
            f"why/b{{batch_size}}/{part}",
            f"the same at a batch size: {what}",
            better="smaller",
            is_timed=True,
        )
        for part, what in PARTS_OF_LOSS.items()
    ),
    _count("eval/num_nodes", "nodes of the tree", is_timed=True, is_headline=True, column="nodes"),
    _share("eval/accepted_depth{depth}", "steps that accept a draft token of this depth"),
    _ratio("eval/category/{category}/speedup", "speed-up in a category"),
    _tokens("eval/category/{category}/tokens_per_step", "tokens per step in a category"),
    _ratio("eval/{method}/b{batch_size}/speedup", "speed-up of a method"),
    _tokens("eval/{method}/b{batch_size}/tokens_per_step", "tokens per step of a method"),
    _rate("eval/{method}/b{batch_size}/tokens_per_second", "tokens per second of a method"),
    _share(
        "eval/{method}/b{batch_size}/identical_fraction",
        "answers of a method identical to plain decoding",
    ),
    _count("eval/num_prompts", "prompts that were answered"),
    _ratio(
        "eval/server/c{concurrency}/speedup",
        "speed-up of an engine with the heads, over the one without",
    ),
    _rate("eval/server/c{concurrency}/tokens_per_second", "tokens per second of the engine"),
    _ms("eval/server/c{concurrency}/ms_per_token", "milliseconds per token of the engine"),
    _share(
        "eval/server/c{concurrency}/identical_fraction",
        "answers of the engine identical to plain decoding here",
    ),
    _tokens(
        "eval/server/tokens_per_step",
        "tokens per step by the engine's own counters",
        is_headline=True,
        stat="tokens per step by the engine's own counters "
        "(predicted here: {eval/server/predicted_tokens_per_step})",
    ),
    _tokens("eval/server/predicted_tokens_per_step", "tokens per step predicted for the engine"),
    _share("eval/server/accepted_position{position}", "steps of the engine that accept a position"),
    _share("eval/server/predicted_accepted_position{position}", "the same, as it is predicted"),
    _rate("eval/server_plain/c{concurrency}/tokens_per_second", "that of the engine without heads"),
    _ms("eval/server_plain/c{concurrency}/ms_per_token", "that of the engine without heads"),
    _share(
        "eval/server_plain/c{concurrency}/identical_fraction", "that of the engine without heads"
    ),
    _loss(
        "eval/backbone_nats_per_token", "backbone's held-out loss, nats per token", is_headline=True
    ),
    _share("eval/backbone_top1", "held-out tokens that the backbone puts first"),
    # stage calibrate
    _ratio("calibrate/predicted_speedup", "speed-up that calibration predicted", is_headline=True),
    _tokens(
        "calibrate/predicted_tokens_per_step",
        "tokens per step that calibration predicted",
        is_timed=True,
    ),
    _count("calibrate/num_nodes", "nodes of the fastest tree", is_timed=True),
    _count(
        "calibrate/break_even_batch_size",
        "batch size at which no tree pays",
        better="larger",
        is_timed=True,
        is_headline=True,
    ),
    # stage train
    _tokens(
        "val/accept_length",
        "tokens per step, replayed on held-out answers",
        is_headline=True,
        column="val/accept_length",
        has_best=True,
    ),
    _tokens("val/accept_length_chain", "tokens per step with the chain alone", has_best=True),
    _share("val/top1_head{head}", "held-out top-1", has_best=True),
    _share("val/top5_head{head}", "held-out top-5", has_best=True),
    _loss("val/loss_head{head}", "held-out loss", has_best=True),
    _loss("train/loss", "training loss", is_headline=True),
    _loss("train/loss_head{head}", "training loss of a head"),
    _share(
        "train/accepted_head{head}",
        "share of positions at which drawn drafts of a head and all before it are accepted",
    ),
    _loss("train/loss_backbone", "training loss of the backbone, where it learns too"),
    _loss(
        "train/backbone_nats_before",
        "backbone's held-out loss before it learned",
        is_headline=True,
    ),
    _loss(
        "train/backbone_nats_after",
        "backbone's held-out loss after it learned",
        is_headline=True,
    ),
    _count("train/steps", "optimizer steps"),
    _rate("train/tokens_per_second", "tokens per second of training, without padding"),
    _share("train/mfu", "share of the device's matrix rate that training uses", is_timed=True),
    Metric("train/peak_memory_gb", "peak memory of training, GB", better="smaller", is_timed=True),
    _count("train/best_step", "step of the heads that were kept"),
    # the other stages
    _loss("pretrain/loss", "pretraining loss"),
    _count("regenerate/documents", "conversations that the backbone answered"),
    _count("regenerate/answers", "its answers"),
    _count("regenerate/tokens", "their tokens"),
    _count("data/records", "raw chats that were read"),
    _count("data/kept_records", "raw chats that were kept"),
    _count("data/documents", "training examples made of them"),
    _count("data/tokens", "tokens of the examples"),
    _share("data/trained_fraction", "share of the tokens that is trained on", better=None),
    _count("data/cut_documents", "examples that were cut, as they were too long"),
    _loss("doctor/nats_per_token", "backbone's loss on the data, nats per token"),
    _share("doctor/top1", "tokens of the data that the backbone puts first"),
    _count("doctor/problems", "problems that the doctor found", better="smaller"),
    _tokens("chat/tokens_per_step", "tokens per step over all answers"),
)
"""The rows; a name that two of them fit belongs to the first."""


AXES = {
    "pretrain": "pretrain/step",
    "train": "train/step",
    "val": "train/step",
    "by_head": "by_head/head",
    "by_depth": "by_depth/depth",
    "by_nodes": "by_nodes/num_nodes",
    "by_batch": "by_batch/batch_size",
}
"""First word of a name in W&B -> what its values are drawn against. Curves `by_...` are in W&B
alone: a row for each head, depth, size of tree and batch size."""


@cache
def metric_of(name: str) -> Metric | None:
    """Return the row of a metric, None where it is not declared."""
    return next((row for row in METRICS if fields(row.name, name) is not None), None)


@cache
def fields(pattern: str, name: str) -> dict[str, str] | None:
    """Return what stands in `name` where `pattern`, a name of METRICS, has braces.

    None where the pattern does not fit. Some fields may be filled in: `eval/tree/b{batch_size}/x`.
    """
    expression = re.sub(
        r"\\\{(\w+)\\\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", re.escape(pattern)
    )
    found = re.fullmatch(expression, name)
    return found and found.groupdict()


def as_objective(name: str) -> Metric:
    """Return the row of the metric that a sweep is to be judged by.

    Raises:
        UserError: it has none; names the nearest.
    """
    if (row := metric_of(name)) is not None:
        return row
    near = get_close_matches(name, [row.name for row in METRICS], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "docs/reference/metrics.md has all."
    raise UserError(f"objective={name} is no metric of any stage: {hint}")


def is_larger_better(name: str) -> bool:
    """Say whether a metric is to be maximized; one without a better end, or no row, is."""
    row = metric_of(name)
    return row is None or row.better != "smaller"


def is_timed(name: str) -> bool:
    """Say whether a metric may differ between two equal runs; one without a row may not."""
    row = metric_of(name)
    return row is not None and row.is_timed
