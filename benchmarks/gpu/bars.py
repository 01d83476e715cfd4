"""What is asked of a GPU, and the table that says what was reached.

`BEFORE` are figures of an H200 at commit 9ce118e, 2026-11-27; bars are for the same card.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]
"""Part of the benchmark -> what it has found."""


@dataclass(frozen=True)
class Bar:
    """A line of the table."""

    what: str
    unit: str
    before: str
    figure: Callable[[Figures], float]
    """Raises KeyError, TypeError or ZeroDivisionError where a part is missing."""
    bar: float
    is_most: bool = True
    """Is the bar the most that passes? Else the least."""

    def row(self, found: Figures) -> dict[str, Any]:
        """Return what, unit, before, now, bar and whether it is cleared; None is not measured."""
        try:
            now = float(self.figure(found))
        except (KeyError, TypeError, ZeroDivisionError, ValueError):
            now = None
        is_cleared = None
        if now is not None:
            is_cleared = now <= self.bar if self.is_most else now >= self.bar
        sign = "<=" if self.is_most else ">="
        return {
            "what": self.what,
            "unit": self.unit,
            "before": self.before,
            "now": now,
            "bar": f"{sign} {self.bar:g}",
            "is_cleared": is_cleared,
        }


def step(name: str, place: str) -> Callable[[Figures], float]:
    """Return a reader of the milliseconds of a step with decode.compile's layers."""
    return lambda found: found[f"steps_{name}"][f"{place}, compiled"]


def ratio(name: str, nodes: int) -> Callable[[Figures], float]:
    """Return a reader of a tree's step at B=1, in plain steps."""
    return lambda found: (
        step(name, f"B=1, {nodes} nodes")(found) / step(name, "B=1, 1 nodes")(found)
    )


def share(part: str, kind: str) -> Callable[[Figures], float]:
    """Return a reader of training's share of the matrix rate, in percent."""
    return lambda found: 100 * found[part][kind]["share_of_matrix_product"]


def rate(told: str) -> Callable[[Figures], float]:
    """Return a reader of regeneration's tokens a second."""
    return lambda found: found["regeneration"][told]["tokens_per_second"]


def speedup(found: Figures) -> float:
    """Return how many times faster a tree of 64 nodes is than plain decoding, both compiled."""
    of_tree, plain = (found["speedup"][f"{told}, compiled"] for told in ("64 nodes", "plain"))
    return of_tree["tokens_per_second"] / plain["tokens_per_second"]


def with_heads(found: Figures) -> float:
    """Return how many times faster regeneration is with heads, at the best of its trees."""
    best = max(rate(told)(found) for told in ("chain", "5 nodes"))
    return best / rate("plain")(found)


def kernel(rule: str) -> Callable[[Figures], float]:
    """Return a reader of a verification kernel's microseconds, B=1, V=128k, 64 nodes."""
    return lambda found: found["kernels"][f"{rule}, B=1, V=128256"]["microseconds"]


def faults(found: Figures) -> float:
    """Return how many checks of correctness found something; all three kinds have to be there.

    For some models, behind `left_out`, there may have been no time.
    """
    steps = {k: differ for k, differ in found["correctness"]["steps"].items() if k != "left_out"}
    if not steps:
        raise KeyError("steps")
    training, kernels = found["correctness"]["training"], found["correctness"]["kernels"]
    odd = sum(map(bool, steps.values()))
    odd += not training.get("equal", False)
    kernels_are_right = kernels.get("mismatches") == [] and kernels["mask_and_commit"] == "equal"
    return float(odd + (not kernels_are_right))


BARS = (
    Bar("correctness: checks that failed", "", "0", faults, 0),
    Bar("7B, B=1, plain", "ms", "6.96", step("7B", "B=1, 1 nodes"), 4.4),
    Bar("7B, B=1, 16 nodes", "x plain", "1.26", ratio("7B", 16), 1.15),
    Bar("7B, B=1, 64 nodes", "x plain", "1.32", ratio("7B", 64), 1.3),
    Bar("8B, B=1, plain", "ms", "7.95", step("8B", "B=1, 1 nodes"), 4.9),
    Bar("8B, B=1, 16 nodes, tied heads", "ms", "10.4", step("8B", "B=1, 16 nodes"), 5.8),
    Bar("8B, B=16, plain", "ms", "16.4", step("8B", "B=16, 1 nodes"), 6.5),
    Bar("8B, B=64, plain", "ms", "41.1", step("8B", "B=64, 1 nodes"), 10),
    Bar("8B, B=16, 16 nodes", "ms", "22.4", step("8B", "B=16, 16 nodes"), 9),
    Bar(
        "compilation, 7B",
        "s",
        "25 to 29 a shape",
        lambda found: found["steps_7B"]["compilation_seconds"],
        20,
    ),
    Bar("7B, 64 nodes, published hit rates", "x plain", "-", speedup, 1.8, is_most=False),
    Bar("regenerate, 8B, B=128, plain", "tokens/s", "941", rate("plain"), 10_000, is_most=False),
    Bar("the same with heads", "x plain", "-", with_heads, 1, is_most=False),
    Bar("training, 7B", "% of matrix", "31", share("training_7B", "medusa"), 60, is_most=False),
    Bar(
        *("training, 8B, own heads", "% of matrix", "26", share("training_8B", "medusa"), 50),
        is_most=False,
    ),
    Bar(
        "training, 8B, tied heads",
        "% of matrix",
        "about 40",
        share("training_8B", "medusa_tied"),
        62,
        is_most=False,
    ),
    Bar("sampling kernel, B=1, V=128k", "us", "18.5", kernel("sampling"), 12),
    Bar("typical kernel, B=1, V=128k", "us", "17.5", kernel("typical"), 11),
    Bar(
        "from_scratch, device=cuda, all stages",
        "s",
        "> 170",
        lambda found: found["from_scratch"]["seconds"],
        90,
    ),
    Bar(
        "from_scratch: measured over predicted",
        "off by, %",
        "11",
        lambda found: 100 * abs(found["from_scratch"]["measured_over_predicted"] - 1),
        10,
    ),
)


def table(found: Figures) -> list[dict[str, Any]]:
    """Return the rows of all bars."""
    return [bar.row(found) for bar in BARS]


def shown(rows: list[dict[str, Any]]) -> str:
    """Return the table as text: what, before, now, bar, and whether it is cleared."""
    words = {True: "passed", False: "NOT passed", None: "not measured"}
    lines = [("what", "unit", "9ce118e", "now", "bar", "")]
    for row in rows:
        now = "-" if row["now"] is None else f"{row['now']:.4g}"
        lines.append(
            (row["what"], row["unit"], row["before"], now, row["bar"], words[row["is_cleared"]])
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
