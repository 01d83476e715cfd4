"""Why is the speed-up no larger, and from which batch size on is plain decoding faster?

Stage evaluate asks, when it has measured; here is gathered what `evaluate/waterfall.py`,
`evaluate/break_even.py` and `evaluate/advice.py` answer from. Written: why.json, which the report,
the terminal and stage export read; and the `why/...` metrics.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.sources import split_of, walk
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.rule import step_kernels
from medusa_exp.errors import UserError
from medusa_exp.evaluate.advice import Facts, Tried, advice
from medusa_exp.evaluate.break_even import BreakEven, break_even, prompts
from medusa_exp.evaluate.metrics import (
    Record,
    by_batch_size,
    most_tokens_per_step,
    of_method,
    speedup,
    speedup_interval,
    tokens_per_step,
)
from medusa_exp.evaluate.step_profile import Profile
from medusa_exp.evaluate.waterfall import (
    Way,
    metrics_of,
    waterfalls,
    way_of_profile,
    way_of_records,
)
from medusa_exp.export.settings import chain_rates, schedule
from medusa_exp.model.heads import MedusaHeads, StackedHeads, reads_whole_vocabulary
from medusa_exp.model.tokenizer import differences
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.stages.doctor import examine_text, sample_rows
from medusa_exp.stages.session import Session, has_other_weights, stop_ids_of
from medusa_exp.tree import Tree
from medusa_exp.tree.calibration import Calibration, load_calibration

WHY = "why.json"
_LARGE_GAP = 0.1
"""Share of validation's tokens per step, less in decoding, whose reasons are looked for."""
_EXAMINED = 50
"""Conversations that the doctor then looks at."""


@dataclass(frozen=True)
class Measured:
    """What stage evaluate has measured."""

    records: list[Record]
    tree: Tree
    """Of the smallest batch size."""
    over_tree: Profile
    plain: Profile


def explain(
    session: Session,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    measured: Measured,
) -> dict[str, float]:
    """Write why.json; return the `why/...` metrics."""
    by_size = by_batch_size(measured.records)
    smallest = of_method(by_size[min(by_size)], "tree")
    expected = expected_tokens_per_step(session, measured.tree)
    tree, plain = _ways(by_size, measured)
    when = _break_even("tree", by_size)
    found = waterfalls(
        tree,
        plain,
        tokens_per_step=tokens_per_step(smallest),
        speedups=when.speedups,
        expected=expected,
    )
    reasons = list(_reasons(session, decoder, tokenizer, smallest, expected)) if found else []
    facts = _facts(session, decoder, measured.tree, smallest, when, reasons)
    by_cause: dict[str, str] = {}  # for each cause once, from the smallest batch on
    for one in found:
        by_cause.setdefault(one.largest.name, advice(one, tree, plain, facts))
    write_json(
        session.out / WHY,
        {
            "waterfalls": [asdict(one) for one in found],
            "advice": list(dict.fromkeys(by_cause.values())),
            "validation": expected,
            "when": when.sentence(),
            "schedule": _schedule(session, facts.num_heads, by_size, when),
        },
    )
    metrics = metrics_of(found)
    if when.slower_from is not None:
        metrics["why/break_even_batch_size"] = float(when.slower_from)
    return metrics


def _break_even(method: str, by_size: dict[int, list[Record]]) -> BreakEven:
    """Return from which batch size on plain decoding is faster than a method, by its records."""
    records = {size: of_method(some, method) for size, some in by_size.items()}
    intervals = {
        size: interval
        for size, some in records.items()
        if (interval := speedup_interval(some)) is not None
    }
    speedups = {size: speedup(some) for size, some in records.items()}
    return break_even(method, speedups, intervals)


def _ways(by_size: dict[int, list[Record]], measured: Measured) -> tuple[Way, Way]:
    """Return what answering one prompt at a time took, over the tree and plainly."""
    ways = [
        way_of_records(of_method(by_size.get(1, []), method), profile)
        for method, profile in (("tree", measured.over_tree), ("plain", measured.plain))
    ]
    tree, plain = ways
    if tree is None or plain is None:
        return way_of_profile(measured.over_tree), way_of_profile(measured.plain)
    return tree, plain


def expected_tokens_per_step(session: Session, tree: Tree) -> float | None:
    """Return the tokens per step that validation found for a tree; None where it says nothing.

    Validation replays the chain, and the best tree of train.val_tree_nodes nodes. A calibrated tree
    of another size is taken to differ from that one as it does among those that calibration grew.
    Trees of other kinds, looked-up branches and typical acceptance have nothing there to be
    compared with; a tree of one node has no guess that could be accepted, here or there.
    """
    config, metrics = session.config, read_json(session.out / "metrics.json", {})
    if tree.num_lookup or tree.num_checked == 1 or config.decode.rule == "typical":
        return None
    if config.tree.kind == "chain":
        value = metrics.get("val/accept_length_chain")
        return None if value is None else float(value)
    value = metrics.get("val/accept_length")
    calibration = _calibration(session) if config.tree.kind == "calibrated" else None
    if value is None or calibration is None or calibration.draft != _validated(session):
        return None
    share = _relative(calibration, len(tree), config.train.val_tree_nodes)
    return None if share is None else 1 + (float(value) - 1) * share


def _validated(session: Session) -> str:
    """Return what validation drafted: decode.draft=auto is the heads' likeliest tokens there."""
    return "sampled" if session.config.decode.draft == "sampled" else "top"


def _relative(calibration: Calibration, nodes: int, others: int) -> float | None:
    """Return how many times as many guesses a step accepts over the best tree of `nodes` nodes as
    over that of `others`; None where the latter accepts none.

    Of the tokens of a step one is the backbone's own, whatever the tree: only the rest grows with
    its nodes.
    """
    points = sorted(calibration.curve, key=lambda point: point.num_nodes)
    sizes = [point.num_nodes for point in points]
    found = np.interp([nodes, others], sizes, [point.tokens_per_step - 1 for point in points])
    return float(found[0] / found[1]) if found[1] > 0 else None


def _calibration(session: Session) -> Calibration | None:
    try:
        return load_calibration(session.out)
    except UserError:
        return None


def _facts(
    session: Session,
    decoder: Decoder,
    tree: Tree,
    records: list[Record],
    when: BreakEven,
    reasons: list[str],
) -> Facts:
    """Return what advice depends on; `records` are of the tree, of the smallest batch size."""
    heads, config = decoder.heads, session.config
    assert isinstance(heads, MedusaHeads | StackedHeads)
    calibration = _calibration(session)
    is_calibrated = calibration is not None
    return Facts(
        num_heads=heads.num_heads,
        num_layers=heads.config.num_layers,
        has_projections=reads_whole_vocabulary(heads.config),
        vocab_size=decoder.backbone.vocab_size,
        tree_kind=config.tree.kind,
        num_nodes=tree.num_checked,
        device_type=decoder.backbone.device.type,
        is_captured=decoder.uses_fixed_shapes,
        uses_kernels=step_kernels(decoder.rule.verifier, decoder.backbone.device) is not None,
        is_regenerated=config.train.text == "regenerated",
        tokens_per_step=tokens_per_step(records),
        max_new_tokens=config.decode.max_new_tokens,
        when=when,
        reasons=reasons,
        run_dir=str(session.out),
        is_calibrated=is_calibrated,
        can_calibrate=is_calibrated or _has_held_out(session),
        is_tree_set=config.tree.kind == "custom" or config.tree.num_nodes is not None,
        tried=_tried(calibration, records[0]["batch_size"]),
    )


def _tried(calibration: Calibration | None, batch_size: int) -> Tried | None:
    """Return the fastest tree with guesses that calibration tried; None if it tried none."""
    if calibration is None:
        return None
    curve = calibration.of_batch_size(batch_size)
    points = [point for point in curve.fastest() if point.num_nodes > 1]
    if not points:
        return None
    best = next((point for point in points if point.is_rehearsed), points[0])
    speedup = curve.plain_expected_seconds / best.expected_seconds
    shares = calibration.rank_share
    top1 = shares[0][0] if shares and shares[0] else None
    return Tried(best.num_nodes, best.tokens_per_step, speedup, top1)


def _has_held_out(session: Session) -> bool:
    """Has the data set conversations that a calibration may ask?"""
    dataset = session.config.dataset
    try:
        return any(split_of(chat.id, dataset) == "val" for _, chat in walk(session.sources()))
    except UserError:
        return False


def _reasons(
    session: Session,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    expected: float | None,
) -> Iterator[str]:
    """Yield why decoding accepts less than validation, if it is much: the doctor's findings too.

    Raises nothing: data that can no longer be read costs the findings.

    Args:
        records: of the tree.
        expected: tokens per step by validation.
    """
    if expected is None or tokens_per_step(records) > (1 - _LARGE_GAP) * expected:
        return
    config, heads = session.config, decoder.heads
    assert isinstance(heads, MedusaHeads | StackedHeads)
    for what in differences(tokenizer, session.out / "heads"):
        verb = "differ" if what == "tokens" else "differs"
        yield f"the {what} {verb} from what the heads were trained with, see stages=[inspect]"
    if has_other_weights(heads.config, decoder.backbone):
        yield "the heads were trained for other weights than the model's"
    if config.evaluate.path is not None:
        yield "the prompts are those of evaluate.path, and not of the training's data"
    if config.decode.rule == "sampling":
        yield (
            "validation replays given answers, and decoding draws its own "
            f"(decode.rule=sampling, decode.temperature={config.decode.temperature:g})"
        )
    if most_tokens_per_step(records) >= expected:
        yield f"by chance {prompts(len(records))} may differ as much, raise evaluate.num_prompts"
    try:
        some = list(islice(walk(session.sources()), _EXAMINED))
    except UserError:
        return
    rows = sample_rows(some, tokenizer)
    chats = [conversation for _, conversation in some]
    stop_ids = stop_ids_of(config, decoder.backbone, tokenizer)
    for finding in examine_text(decoder.backbone, tokenizer, stop_ids, chats, rows):
        if not finding.is_fine:
            yield f"the doctor on {finding.name}: {finding.sentence.rstrip('.')}"


def _schedule(
    session: Session, num_heads: int, by_size: dict[int, list[Record]], when: BreakEven
) -> list[list[int]] | None:
    """Return how many tokens an engine should draft at which batch size; None of one size alone.

    Engines draft a chain: by method `chain`, where that was measured, they should stop. Up to there
    they draft as many tokens as calibration's step times say, or all.
    """
    if len(by_size) < 2:
        return None
    if all(of_method(some, "chain") for some in by_size.values()):
        when = _break_even("chain", by_size)
    calibration = _calibration(session)
    rates = chain_rates([r for some in by_size.values() for r in some], calibration, num_heads)
    if calibration is None or rates is None:
        return when.schedule(num_heads)
    return when.schedule(schedule(calibration, rates[0]))
