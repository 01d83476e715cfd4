"""What an engine takes of measurements: how far to draft, and what it should accept of that.

vLLM drafts one token of every head in a row, a chain. From the run's records and calibration come
the two settings that it takes of measurements: how many tokens to draft at which batch size
(`num_speculative_tokens_per_batch_size`), and which share of drafts it should accept at each
position (`synthetic_acceptance_rates`, by which its counters can be compared, or load be tried).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medusa_exp.errors import UserError
from medusa_exp.tree.calibration import CALIBRATION, Calibration, Curve

Record = dict[str, Any]
"""A line of records.jsonl: stage evaluate's."""
SETTINGS = "speculative_config.json"
SCHEDULE = "num_speculative_tokens_per_batch_size"
METHODS = {"vllm": "mtp", "vllm_medusa": "medusa"}
"""Format -> vLLM's word for how such heads draft."""


def chain_rates(
    records: Sequence[Record], calibration: Calibration | None, num_heads: int
) -> tuple[list[float], str] | None:
    """Return the share of drafts accepted up to each position of a chain, and where it is from.

    Measured by method `chain` of stage evaluate where that ran; else from the calibration, whose
    tree need not hold the whole chain: what it lacks is estimated by the heads' own shares.
    """
    chains = [record for record in records if record["method"] == "chain"]
    smallest = min((record["batch_size"] for record in chains), default=1)
    lengths = [
        length
        for record in chains
        if record["batch_size"] == smallest
        for length in record["accept_lengths"][1:]
    ]
    if lengths:
        counts = [sum(length > k for length in lengths) for k in range(1, num_heads + 1)]
        return [count / len(lengths) for count in counts], "measured over a chain"
    if calibration is None:
        return None
    if len(calibration.rank_share) < num_heads or not all(calibration.rank_share):
        raise UserError(
            f"{CALIBRATION} has the shares of {len(calibration.rank_share)} heads, and there are "
            f"{num_heads}: run stage calibrate again."
        )
    by_path = dict(zip(calibration.tree.paths, calibration.node_probability, strict=True))
    rates, last = [], 1.0
    for k in range(num_heads):
        last = min(last, by_path.get((0,) * (k + 1), last * calibration.rank_share[k][0]))
        rates.append(last)
    return rates, "estimated from the calibration"


def schedule(calibration: Calibration, rates: Sequence[float]) -> list[list[int]]:
    """Return [first batch size, last, tokens to draft] for all sizes that were calibrated.

    What drafts most tokens a second by the steps' times of this project's own decoding on the
    machine of the calibration; a chain of n tokens takes as long as a tree of n + 1 nodes. An
    engine keeps the last entry for larger batches.
    """
    curves = sorted(calibration.batch_sizes, key=lambda curve: curve.batch_size)
    firsts = [1, *(curve.batch_size for curve in curves[1:])]
    lasts = [*(first - 1 for first in firsts[1:]), curves[-1].batch_size]
    return [
        [first, max(first, last), _fastest(curve, rates)]
        for first, last, curve in zip(firsts, lasts, curves, strict=True)
    ]


def _fastest(curve: Curve, rates: Sequence[float]) -> int:
    seconds = {point.num_nodes: point.step_seconds for point in curve.curve if point.num_nodes > 1}
    seconds[1] = curve.plain_step_seconds
    nodes = sorted(seconds)
    longest = min(len(rates), nodes[-1] - 1)  # beyond the largest tree nothing was timed
    tokens = 1 + np.concatenate([[0], np.cumsum(rates)])[: longest + 1]
    took = np.interp(np.arange(1, longest + 2), nodes, [seconds[number] for number in nodes])
    return int(np.argmax(tokens / took))


def settings(
    format_: str,
    num_heads: int,
    records: Sequence[Record],
    calibration: Calibration | None,
    measured: list[list[int]] | None = None,
) -> dict[str, Any] | None:
    """Return vLLM's speculative settings without the model, and beside them what was measured.

    `measured` is stage evaluate's schedule, where it measured more than one batch size: it ends
    where whole responses were no faster. Else the schedule is of the calibration's step times.
    """
    if format_ not in METHODS:
        return None
    found: dict[str, Any] = {
        "speculative_config": {"method": METHODS[format_], "num_speculative_tokens": num_heads}
    }
    if (of_chain := chain_rates(records, calibration, num_heads)) is not None:
        rates, source = of_chain
        found["synthetic_acceptance_rates"] = [round(rate, 4) for rate in rates]
        found["synthetic_acceptance_rates_are"] = source
        if calibration is not None:
            found[SCHEDULE] = schedule(calibration, rates)
            found[f"{SCHEDULE}_is"] = "estimated from the calibration"
    if measured is not None:
        found |= {SCHEDULE: measured, f"{SCHEDULE}_is": "measured over whole responses"}
    return found
