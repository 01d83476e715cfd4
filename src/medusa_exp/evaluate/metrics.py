"""Metrics of an evaluation, made from the records of its prompts and methods."""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np

Record = dict[str, Any]
_DRAWS = 2000
"""Draws of a bootstrap."""


def summarize(records: list[Record]) -> dict[str, float]:
    """Return the run's `eval/...` metrics from the records of all prompts and methods.

    A ratio is of sums over the same prompts, so that long responses count for what they are. The
    names without a method are of the tree at the smallest batch size.
    """
    by_size, metrics = by_batch_size(records), dict[str, float]()
    for size, of_size in by_size.items():
        for method in sorted({record["method"] for record in of_size}):
            for name, value in _figures(of_method(of_size, method)).items():
                metrics[f"eval/{method}/b{size}/{name}"] = value
    first = by_size[min(by_size)]
    tree, plain = of_method(first, "tree"), of_method(first, "plain")
    metrics |= {f"eval/{name}": value for name, value in _figures(tree).items()}
    if interval := speedup_interval(tree):
        metrics["eval/speedup_low"], metrics["eval/speedup_high"] = interval
    metrics["eval/baseline_tokens_per_second"] = tokens_per_second(plain)
    metrics["eval/num_prompts"] = float(len(tree))
    metrics |= accepted_by_depth(tree)
    differences = [record["difference"] for record in records if record.get("difference")]
    if differences:
        metrics["eval/num_differences"] = float(len(differences))
        metrics["eval/near_tie_fraction"] = sum(d["is_near_tie"] for d in differences) / len(
            differences
        )
    if generated := of_method(first, "hf_generate"):
        metrics["eval/baseline_vs_hf"] = 1 / speedup(generated)
        metrics["eval/hf_identical_fraction"] = identical_fraction(generated)
    if lookup := of_method(first, "prompt_lookup"):
        metrics["eval/prompt_lookup_tokens_per_step"] = tokens_per_step(lookup)
        metrics["eval/prompt_lookup_speedup"] = speedup(lookup)
    for category in sorted({record["category"] for record in tree}):
        chosen = [record for record in tree if record["category"] == category]
        metrics[f"eval/category/{category}/speedup"] = speedup(chosen)
        metrics[f"eval/category/{category}/tokens_per_step"] = tokens_per_step(chosen)
    return metrics


def _figures(records: list[Record]) -> dict[str, float]:
    """Return what is said of every method."""
    figures = {
        "tokens_per_step": tokens_per_step(records),
        "speedup": speedup(records),
        "tokens_per_second": tokens_per_second(records),
    }
    if all(record["identical"] is not None for record in records):
        figures["identical_fraction"] = identical_fraction(records)
    return figures


def speedup_interval(records: list[Record]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the speed-up: prompts are drawn anew, with repeats.

    Prompts that were answered side by side shared their steps: what slowed one slowed the others,
    so that each says less than if it had been alone. As many as there were at a time, in the order
    in which they began, ran at about the same time, and are drawn together. One such group alone
    says nothing of how others would do: None.

    Args:
        records: of one method and batch size, in the order of the prompts.
    """
    keys = ("new_tokens", "seconds", "baseline_new_tokens", "baseline_seconds")
    values = np.array([[float(record[key]) for key in keys] for record in records])
    values = np.add.reduceat(values, range(0, len(values), records[0]["batch_size"]))
    if len(values) < 2:
        return None
    ours, seconds, plain, plain_seconds = _drawn_sums(values)
    low, high = np.quantile((ours / seconds) / (plain / plain_seconds), (0.025, 0.975))
    return float(low), float(high)


def most_tokens_per_step(records: list[Record]) -> float:
    """Return the upper end of the 95 % bootstrap interval of tokens per step, over prompts.

    Of a single prompt it is infinite: it says nothing of how others would do.
    """
    if len(records) < 2:
        return math.inf
    values = np.array([[float(record["new_tokens"]), record["steps"]] for record in records])
    tokens, steps = _drawn_sums(values)
    return float(np.quantile(tokens / steps, 0.975))


def _drawn_sums(values: np.ndarray) -> np.ndarray:
    """Return [columns, draws]: each column's sum, for each draw of as many rows with repeats."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(values), (_DRAWS, len(values)))
    return np.asarray(values[picked].sum(1).T)


def accepted_by_depth(records: list[Record]) -> dict[str, float]:
    """Return, for each depth, the share of steps that accept a guess there.

    The prompt's step has no guesses. One more than the sum of them is the tokens a later step gives
    (less what the last step of a response has to spare).
    """
    lengths = [length for record in records for length in record["accept_lengths"][1:]]
    return {
        f"eval/accepted_depth{depth}": sum(length > depth for length in lengths) / len(lengths)
        for depth in range(1, max(lengths, default=1))
    }


def tokens_per_second(records: list[Record]) -> float:
    """Return tokens over wall time."""
    return total(records, "new_tokens") / total(records, "seconds")


def by_batch_size(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Return the records of each batch size, the smallest first."""
    ordered = sorted(records, key=lambda record: record["batch_size"])
    return {size: list(some) for size, some in groupby(ordered, lambda r: r["batch_size"])}


def of_method(records: Iterable[Record], method: str) -> list[Record]:
    """Return the records of one method."""
    return [record for record in records if record["method"] == method]


def total(records: Iterable[Record], key: str) -> float:
    """Return the sum of a field."""
    return float(sum(record[key] for record in records))


def tokens_per_step(records: list[Record]) -> float:
    """Return committed tokens per backbone step, the prompt's step included: plain is 1.00."""
    return total(records, "new_tokens") / total(records, "steps")


def speedup(records: list[Record]) -> float:
    """Return the tokens a second of these records over those of plain decoding.

    Where responses are identical this is the ratio of wall times. A response does not count as
    faster because it is shorter.
    """
    return tokens_per_second(records) / (
        total(records, "baseline_new_tokens") / total(records, "baseline_seconds")
    )


def identical_fraction(records: list[Record]) -> float:
    """Return the share of responses that are plain decoding's, token for token."""
    return sum(record["identical"] for record in records) / len(records)
