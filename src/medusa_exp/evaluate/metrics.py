"""Records in, numbers out."""

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


def summarise(records: list[Record]) -> dict[str, float]:
    """Return the run's `eval/...` metrics from the records of all prompts and methods.

    A ratio is of sums over the same prompts, so that long answers count for what they are.
    """
    plain = of_method(records, "plain")
    tree = of_method(records, "tree")
    metrics = {
        "eval/tokens_per_step": tokens_per_step(tree),
        "eval/speedup": speedup(tree),
        "eval/tokens_per_second": total(tree, "new_tokens") / total(tree, "seconds"),
        "eval/baseline_tokens_per_second": total(plain, "new_tokens") / total(plain, "seconds"),
        "eval/identical_fraction": identical_fraction(tree),
        "eval/num_prompts": float(len(tree)),
    }
    if generated := of_method(records, "hf_generate"):
        metrics["eval/baseline_vs_hf"] = 1 / speedup(generated)
        metrics["eval/hf_identical_fraction"] = identical_fraction(generated)
    if lookup := of_method(records, "prompt_lookup"):
        metrics["eval/prompt_lookup_tokens_per_step"] = tokens_per_step(lookup)
        metrics["eval/prompt_lookup_speedup"] = speedup(lookup)
    for category in sorted({record["category"] for record in tree}):
        chosen = [record for record in tree if record["category"] == category]
        metrics[f"eval/category/{category}/speedup"] = speedup(chosen)
        metrics[f"eval/category/{category}/tokens_per_step"] = tokens_per_step(chosen)
    return metrics


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

    Where answers are identical this is the ratio of wall times; an answer that ends sooner is not
    for that a faster one.
    """
    ours = total(records, "new_tokens") / total(records, "seconds")
    return ours / (total(records, "baseline_new_tokens") / total(records, "baseline_seconds"))


def identical_fraction(records: list[Record]) -> float:
    """Return the share of answers that are plain decoding's, token for token."""
    return sum(record["identical"] for record in records) / len(records)
