"""Stage evaluate: decode held-out prompts by every method in turn, and compare.

Prompts are those of the test split, or of a file: chats, questions of MT-bench's or Spec-Bench's
form, or plain text. Written: records.jsonl, a record for each prompt and method; samples.jsonl,
some responses cut into steps; and the metrics made of both.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data import DataError, Message, read_conversations
from medusa_exp.data.prompts import (
    NO_ROOM,
    HasRoom,
    Prompt,
    Question,
    is_question_file,
    prompts_of,
    read_questions,
)
from medusa_exp.data.sources import evenly_spread, reading_options
from medusa_exp.data.template import REFUSED, ChatTemplate
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.detokenizer import IncrementalDetokenizer
from medusa_exp.decode.rule import GREEDY
from medusa_exp.errors import UserError
from medusa_exp.evaluate.methods import LOOKUP_TOKENS, Method, MethodResponse, build_methods, timed
from medusa_exp.evaluate.metrics import Record, summarize
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.evaluate.step_profile import BACKBONES, Profile, profile
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, StackedHeads, advice_on_cost
from medusa_exp.model.scoring import measure_agreement
from medusa_exp.runs.files import write_jsonl
from medusa_exp.runs.progress import track
from medusa_exp.stages.early_checks import prompt_file
from medusa_exp.stages.session import Session
from medusa_exp.stages.why import Measured, explain
from medusa_exp.tree import Tree

log = logging.getLogger(__name__)

_MAX_SAMPLES = 12
_TIMED_PROMPTS, _TIMED_SECONDS = 8, 10.0
"""Prompts on which it is measured where time goes, and after how long no further one is taken."""

Timed = tuple[list[MethodResponse], float]
"""Responses to a batch, and the seconds they took together."""
Respond = Callable[[list[int]], list[int]]
"""From a prompt's tokens to those of its response."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Decode the prompts with every method, in turn, and compare."""
    session = session or Session(config, out)
    decoder = session.decoder(is_tree_known=False, is_measured=True)
    backbone, tokenizer = decoder.backbone, session.tokenizer()
    prompts = load_prompts(
        session,
        tokenizer,
        # Prompt lookup drafts beyond the end of a response, without regard to the last position.
        backbone.max_length - LOOKUP_TOKENS,
        lambda ids: decoder.decode_plain([ids], rule=GREEDY)[0].tokens,
        session.has_room(backbone, LOOKUP_TOKENS),
    )
    if config.evaluate.server is not None:
        from medusa_exp.stages.engines import check_servers  # an HTTP client, which few need

        check_servers(session, decoder, prompts)
    records: list[Record] = []
    samples: list[dict[str, Any]] = []
    first: tuple[Tree, Profile, Profile] | None = None
    plain: list[list[int]] = []
    for batch_size in sorted(config.evaluate.batch_sizes):
        methods, tree = _methods_at(session, decoder, prompts, batch_size)
        if first is None:
            tree.save(out / "tree.json")
            timed_prompts = [prompt.input_ids for prompt in evenly_spread(prompts, _TIMED_PROMPTS)]
            first = tree, *profile(decoder, timed_prompts, seconds=_TIMED_SECONDS)
        for batch, responses in _responses(config, methods, prompts, batch_size, backbone):
            records += records_of(
                batch, responses, batch_size, config.decode.rule, backbone, tree.num_checked
            )
            if len(plain) < len(prompts):  # of the first batch size
                plain += [response.tokens for response in responses["plain"][0]]
            shown = range(0, len(batch), batch_size)[: _MAX_SAMPLES - len(samples)]
            samples += [sample_of(batch[i], responses["tree"][0][i], tokenizer) for i in shown]
    write_jsonl(out / "records.jsonl", records)
    write_jsonl(out / "samples.jsonl", samples)
    assert first is not None  # there is a batch size
    measured = Measured(records, *first)
    shares = measured.over_tree.shares()
    _advise(decoder, shares)
    served: dict[str, float] = {}
    if config.evaluate.server is not None:
        from medusa_exp.stages.engines import measure_servers

        served = measure_servers(session, decoder, prompts, plain)
    return {
        **summarize(records),
        **served,
        "eval/num_nodes": float(measured.tree.num_checked),
        **{f"eval/time/{part}": share for part, share in shares.items()},
        "eval/outside_backbone_fraction": 1 - sum(shares[part] for part in BACKBONES),
        "eval/is_lossless": float(config.decode.rule != "typical"),
        **_agreement(session, backbone, tokenizer),
        **explain(session, decoder, tokenizer, measured),
    }


def _methods_at(
    session: Session, decoder: Decoder, prompts: list[Prompt], batch_size: int
) -> tuple[dict[str, Method], Tree]:
    """Return what answers so many prompts at a time, warmed up, and the tree it decodes over."""
    settings = session.config.evaluate
    decoder.tree = tree = session.tree(decoder, batch_size)
    decoder.rule = session.rule(batch_size)
    methods = build_methods(
        decoder,
        baselines=settings.baselines,
        batch_size=batch_size,
        longest=max(len(prompt.input_ids) for prompt in prompts),
    )
    _warm_up(methods, prompts, settings.warmup_prompts, batch_size)
    if settings.warmup_prompts and batch_size == 1 and decoder.uses_fixed_shapes:
        _warm_up(methods, of_each_size(prompts, decoder.limits.max_new_tokens), 9, 1)
    return methods, tree


def _advise(decoder: Decoder, shares: dict[str, float]) -> None:
    """Say so where heads with separate projections to a large vocabulary are a part of the time."""
    if isinstance(decoder.heads, MedusaHeads | StackedHeads) and "heads" in shares:
        advice = advice_on_cost(decoder.heads, shares["heads"])
        if advice is not None:
            log.info(advice)


def _warm_up(
    methods: dict[str, Method], prompts: list[Prompt], num_prompts: int, batch_size: int
) -> None:
    """Decode some prompts, in as large a batch as will be timed."""
    ids = [prompt.input_ids for prompt in prompts[: max(num_prompts, batch_size)]]
    for method in methods.values() if num_prompts else ():
        if batch_size == 1:
            for prompt in ids:
                method([prompt])
        else:
            method(ids)


def of_each_size(prompts: list[Prompt], new_tokens: int) -> list[Prompt]:
    """Return prompts for which steps of all sizes are captured, so that none is while it is timed.

    A captured step of so many tokens also serves prompts that need as few as half of them.
    """
    found: list[Prompt] = []
    least = math.inf
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt.input_ids)):
        length = len(prompt.input_ids) + new_tokens
        if 2 * length <= least:
            found.append(prompt)
            least = length
    return found


def _responses(
    config: Config,
    methods: dict[str, Method],
    prompts: list[Prompt],
    batch_size: int,
    backbone: Backbone,
) -> Iterator[tuple[list[Prompt], dict[str, Timed]]]:
    """Yield prompts with every method's responses: one by one, or all, answered side by side."""
    size = 1 if batch_size == 1 else len(prompts)
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    what = f"answering test prompts, {batch_size} at a time"
    for number, batch in enumerate(track(batches, what)):
        yield (
            batch,
            respond_in_turn(methods, batch, number, config.evaluate.repeats, backbone.device),
        )


def load_prompts(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int,
    respond: Respond,
    has_room: HasRoom = lambda _: True,
) -> list[Prompt]:
    """Return `evaluate.num_prompts` prompts, or as many as there are.

    Args:
        session: whose `evaluate.path` names a file; None stands for the test split.
        tokenizer: whose chat template makes prompts.
        max_positions: of a prompt and its response.
        respond: plain decoding: later turns of a question follow the responses to the earlier ones.
        has_room: as `Session.has_room`.

    Raises:
        UserError: there is no such file, or no prompt leaves room for a response.
        DataError: the file cannot be read.
    """
    config, count = session.config, session.config.evaluate.num_prompts
    choose = partial(
        prompts_of,
        tokenizer=tokenizer,
        max_tokens=session.prompt_tokens(max_positions),
        num_prompts=count,
        has_room=has_room,
    )
    if config.evaluate.path is None:
        return choose(session.split("test"))
    path = prompt_file(config)
    if path.is_file() and is_question_file(path):
        questions = _spread_questions(read_questions(path), count)
        room = max_positions - config.decode.max_new_tokens
        return _of_questions(questions, tokenizer, room, respond, has_room)
    reading = read_conversations(path, **reading_options(config.dataset))
    try:
        return choose(reading)
    except DataError:
        raise
    except UserError as error:
        if not reading.dropped:
            raise
        raise UserError(f"evaluate.path={path}: {error} {reading.told()}") from error
    finally:
        for reason, number in reading.dropped.items():
            log.warning("evaluate.path: dropped: %s: %d", reason, number)


def _spread_questions(questions: list[Question], num_prompts: int) -> list[Question]:
    """Return evenly spread questions of so many turns in all: such files are sorted by category."""
    turns = np.mean([len(question.turns) for question in questions])
    return evenly_spread(questions, max(1, round(num_prompts / turns)))


def _of_questions(
    questions: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    respond: Respond,
    has_room: HasRoom,
) -> list[Prompt]:
    template = ChatTemplate(tokenizer)
    left_out: Counter[str] = Counter()
    prompts: list[Prompt] = []
    for question in track(questions, "asking first turns"):
        messages: list[Message] = []
        for turn, text in enumerate(question.turns):
            messages.append(Message("user", text))
            try:
                prompt_text = template.prompt(messages)
            except DataError:
                left_out[REFUSED] += len(question.turns) - turn
                break
            ids = tokenizer(prompt_text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) > room or not has_room(len(ids)):
                reason = f"more than {room} tokens" if len(ids) > room else NO_ROOM
                left_out[reason] += len(question.turns) - turn
                break
            prompt_id = f"{question.question_id}#{turn}"
            prompts.append(Prompt(prompt_id, question.category, prompt_text, ids))
            if turn + 1 < len(question.turns):
                response = tokenizer.decode(respond(ids), skip_special_tokens=True)
                messages.append(Message("assistant", response))
    for reason, number in left_out.items():
        log.warning("evaluate.path: prompts left out: %d (%s)", number, reason)
    if not prompts:
        raise UserError(f"evaluate.path: no question leaves room for an answer ({dict(left_out)}).")
    return prompts


def respond_in_turn(
    methods: dict[str, Method],
    batch: list[Prompt],
    number: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Timed]:
    """Let every method respond; which one begins changes from batch to batch, and repeat."""
    names = list(methods)
    prompts = [prompt.input_ids for prompt in batch]
    responses: dict[str, Timed] = {}
    for repeat in range(repeats):
        first = (number + repeat * (len(batch) > 1)) % len(names)
        for name in names[first:] + names[:first]:
            found, seconds = timed(methods[name], prompts, device)
            if name not in responses or seconds < responses[name][1]:
                responses[name] = (found, seconds)
    return responses


def records_of(
    batch: list[Prompt],
    responses: dict[str, Timed],
    batch_size: int,
    rule: str,
    backbone: Backbone,
    num_nodes: int,
) -> list[Record]:
    """Return a record for each prompt and method.

    The seconds of prompts that were answered side by side are shared among them as `MethodResponse`
    says, and add up to the wall time of all.

    Args:
        batch: the prompts.
        responses: of each method, plain among them, in the order of the prompts.
        batch_size: so many at a time.
        rule: one of `decode.verify.RULES`; draws of sampling are not compared.
        backbone: tells whether a first difference is a near-tie, where the rule is greedy.
        num_nodes: tokens that the tree has run at a time.
    """
    plain = responses["plain"][0]
    plain_shares = _shares(*responses["plain"])
    is_random = rule == "sampling"
    records = []
    for name, (found, seconds) in responses.items():
        for prompt, response, expected, share, plain_share in zip(
            batch, found, plain, _shares(found, seconds), plain_shares, strict=True
        ):
            record = {
                "prompt_id": prompt.prompt_id,
                "category": prompt.category,
                "method": name,
                "batch_size": batch_size,
                "new_tokens": len(response.tokens),
                "steps": response.num_steps,
                "accept_lengths": response.accept_lengths,
                "seconds": share,
                "prompt_seconds": response.prompt_seconds,
                "baseline_seconds": plain_share,
                "baseline_new_tokens": len(expected.tokens),
                "identical": None if is_random else response.tokens == expected.tokens,
            }
            if name == "tree" and record["identical"] is False and rule == "greedy":
                difference = find_difference(
                    backbone, prompt.input_ids, expected.tokens, response.tokens, num_nodes
                )
                record["difference"] = asdict(difference) if difference else None
            records.append(record)
    return records


def _shares(responses: list[MethodResponse], seconds: float) -> list[float]:
    """Return the seconds of each response, so that they add up to those of all."""
    parts = [response.seconds or 0.0 for response in responses]
    if not sum(parts):
        return [seconds / len(responses)] * len(responses)
    return [seconds * part / sum(parts) for part in parts]


def sample_of(
    prompt: Prompt, response: MethodResponse, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the response's text cut into steps and these into tokens."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pieces = [detokenizer.add([token]) for token in response.tokens]
    steps, start = [], 0
    for length in response.accept_lengths or ():
        steps.append(pieces[start : start + length])
        start += length
    return {
        "prompt_id": prompt.prompt_id,
        "category": prompt.category,
        "prompt": prompt.text,
        "steps": steps,
    }


def _agreement(
    session: Session, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Return how near the backbone is to the held-out text of the data set, if it has any.

    Prompts of a file need none.
    """
    config = session.config
    limit = min(config.dataset.max_length, backbone.max_length)
    tokenized = session.tokenized(tokenizer, limit)
    if config.evaluate.path is not None and not len(tokenized.rows("test")):
        log.info(
            "no held-out loss: the data set has no conversation for it (dataset.test_fraction)"
        )
        return {}
    examples = tokenized.split("test")[: config.evaluate.num_prompts]
    agreement = measure_agreement(backbone, examples, "held-out loss")
    return {
        "eval/backbone_nats_per_token": agreement.nats_per_token,
        "eval/backbone_top1": agreement.top1,
    }
