"""Stage evaluate: heads, tree and held-out prompts in; records.jsonl and samples.jsonl out.

A batch of prompts and several methods in; what each said, and how long it took, out.

Config in; the prompts that the evaluation answers out.

Held-out prompts of the data set, or those of a file: chats, questions of MT-bench's or Spec-Bench's
form, or plain text.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data import DataError, Message, read_conversations
from medusa_exp.data.prompts import Prompt, Question, is_question_file, prompts_of, read_questions
from medusa_exp.data.template import ChatTemplate
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.loop import Limits, decode_plain
from medusa_exp.decode.settings import limits_of, rule_of
from medusa_exp.errors import UserError
from medusa_exp.evaluate.methods import LOOKUP_TOKENS, Method, MethodResponse, build_methods, timed
from medusa_exp.evaluate.metrics import Record, summarize
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.evaluate.step_profile import BACKBONES, shares_of_time
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.model.scoring import measure_agreement
from medusa_exp.runs.files import write_jsonl
from medusa_exp.runs.progress import track
from medusa_exp.stages.session import Session
from medusa_exp.tree import Tree
from medusa_exp.tree.calibration import choose_tree

Timed = tuple[list[MethodResponse], float]
"""Answers to a batch, and the seconds they took together."""


def answer_in_turn(
    methods: dict[str, Method],
    batch: list[Prompt],
    number: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Timed]:
    """Let every method answer; who begins changes from batch to batch."""
    names = list(methods)
    first = number % len(names)
    prompts = [prompt.input_ids for prompt in batch]
    answers: dict[str, Timed] = {}
    for _ in range(repeats):
        for name in names[first:] + names[:first]:
            found, seconds = timed(methods[name], prompts, device)
            if name not in answers or seconds < answers[name][1]:
                answers[name] = (found, seconds)
    return answers


def records_of(
    batch: list[Prompt],
    answers: dict[str, Timed],
    batch_size: int,
    rule: str,
    backbone: Backbone,
    num_nodes: int,
) -> list[Record]:
    """Return a record a prompt and method; a batch's seconds are shared out among its prompts.

    Args:
        batch: the prompts.
        answers: of each method, plain among them, in the order of the prompts.
        batch_size: that was asked for; the last batch may be smaller.
        rule: one of `verification.RULES`; draws of sampling are not compared.
        backbone: tells whether a first difference is a near-tie, where the rule is greedy.
        num_nodes: tokens that the tree has run at a time.
    """
    plain, plain_seconds = answers["plain"]
    is_random = rule == "sampling"
    records = []
    for name, (found, seconds) in answers.items():
        for prompt, answer, expected in zip(batch, found, plain, strict=True):
            record = {
                "prompt_id": prompt.prompt_id,
                "category": prompt.category,
                "method": name,
                "batch_size": batch_size,
                "new_tokens": len(answer.tokens),
                "steps": answer.num_steps,
                "accept_lengths": answer.accept_lengths,
                "seconds": seconds / len(batch),
                "baseline_seconds": plain_seconds / len(batch),
                "baseline_new_tokens": len(expected.tokens),
                "identical": None if is_random else answer.tokens == expected.tokens,
            }
            if name == "tree" and record["identical"] is False and rule == "greedy":
                difference = find_difference(
                    backbone, prompt.input_ids, expected.tokens, answer.tokens, num_nodes
                )
                record["difference"] = asdict(difference) if difference else None
            records.append(record)
    return records


def sample_of(
    prompt: Prompt, answer: MethodResponse, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return the answer's text cut into steps and these into tokens."""
    pieces = []
    text = ""
    for end in range(1, len(answer.tokens) + 1):
        # A token's text depends on its neighbours: it is what the whole gains by it.
        longer = tokenizer.decode(answer.tokens[:end], skip_special_tokens=False)
        if longer.endswith("\ufffd"):  # half of a character: it comes with the next token
            pieces.append("")
            continue
        pieces.append(longer[len(text) :])
        text = longer
    steps, start = [], 0
    for length in answer.accept_lengths or ():
        steps.append(pieces[start : start + length])
        start += length
    return {
        "prompt_id": prompt.prompt_id,
        "category": prompt.category,
        "prompt": prompt.text,
        "steps": steps,
    }


log = logging.getLogger(__name__)

Respond = Callable[[list[int]], list[int]]
"""From a prompt's tokens to those of its answer."""


def load_prompts(
    session: Session, tokenizer: PreTrainedTokenizerBase, max_positions: int, respond: Respond
) -> list[Prompt]:
    """Return `evaluate.num_prompts` prompts, or as many as there are.

    Args:
        session: whose `evaluate.path` names a file; None stands for the test split.
        tokenizer: whose chat template makes prompts.
        max_positions: of a prompt and its answer.
        respond: plain decoding: a question's later turns follow its answers to the earlier ones.

    Raises:
        UserError: there is no such file, or no prompt leaves room for an answer.
        DataError: the file cannot be read.
    """
    config, count = session.config, session.config.evaluate.num_prompts
    max_tokens = session.prompt_tokens(max_positions)
    if config.evaluate.path is None:
        return prompts_of(
            session.split("test"), tokenizer, max_tokens=max_tokens, num_prompts=count
        )
    path = Path(config.evaluate.path)
    if not path.exists():
        raise UserError(f"evaluate.path={path} does not exist.")
    if path.is_file() and is_question_file(path):
        questions = _spread(read_questions(path), count)
        room = max_positions - config.decode.max_new_tokens
        return _of_questions(questions, tokenizer, room, respond)
    reading = read_conversations(path)
    try:
        return prompts_of(reading, tokenizer, max_tokens=max_tokens, num_prompts=count)
    finally:  # where no prompt is left, that is why
        for reason, number in reading.dropped.items():
            log.warning("evaluate.path: dropped: %s: %d", reason, number)


def _spread(questions: list[Question], num_prompts: int) -> list[Question]:
    """Return evenly spread questions of so many turns in all: such files are sorted by category."""
    turns = np.mean([len(question.turns) for question in questions])
    count = min(len(questions), max(1, round(num_prompts / turns)))
    return [questions[i] for i in np.linspace(0, len(questions) - 1, count).round().astype(int)]


def _of_questions(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, room: int, respond: Respond
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
                left_out["refused by the chat template"] += len(question.turns) - turn
                break
            ids = tokenizer(prompt_text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) > room:
                left_out[f"more than {room} tokens"] += len(question.turns) - turn
                break
            prompt_id = f"{question.question_id}#{turn}"
            prompts.append(Prompt(prompt_id, question.category, prompt_text, ids))
            if turn + 1 < len(question.turns):
                said = tokenizer.decode(respond(ids), skip_special_tokens=True)
                messages.append(Message("assistant", said))
    for reason, number in left_out.items():
        log.warning("evaluate.path: prompts left out: %s: %d", reason, number)
    if not prompts:
        raise UserError(f"evaluate.path: no question leaves room for an answer ({dict(left_out)}).")
    return prompts


_MAX_SAMPLES = 12
_TIMED_PROMPTS = 8
"""Prompts on which it is measured where time goes."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Answer the prompts with every method, in turn, and compare."""
    session = session or Session(config, out)
    backbone = session.backbone()
    tokenizer = session.tokenizer()
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    check_tree_attention(backbone)
    limits = limits_of(config, backbone, tokenizer)
    prompts = load_prompts(
        session,
        tokenizer,
        # Prompt lookup guesses beyond the end of an answer, without regard to the last position.
        backbone.max_length - LOOKUP_TOKENS,
        lambda ids: decode_plain(backbone, [ids], limits)[0].tokens,
    )
    records: list[Record] = []
    samples: list[dict[str, Any]] = []
    shares: dict[str, float] = {}
    num_nodes = 0
    for batch_size in sorted(config.evaluate.batch_sizes):
        tree = choose_tree(config, out, heads.num_heads, batch_size)
        methods = _methods(config, backbone, heads, tree, limits, batch_size)
        _warm_up(methods, prompts, config.evaluate.warmup_prompts, batch_size)
        if not shares:
            tree.save(out / "tree.json")
            num_nodes = tree.num_checked
            timed_prompts = [prompt.input_ids for prompt in prompts[:_TIMED_PROMPTS]]
            shares = shares_of_time(backbone, methods["tree"], timed_prompts)
        for batch, answers in _responses(config, methods, prompts, batch_size, backbone):
            records += records_of(
                batch, answers, batch_size, config.decode.rule, backbone, tree.num_checked
            )
            if len(samples) < _MAX_SAMPLES:
                samples.append(sample_of(batch[0], answers["tree"][0][0], tokenizer))
    write_jsonl(out / "records.jsonl", records)
    write_jsonl(out / "samples.jsonl", samples)
    return {
        **summarize(records),
        "eval/num_nodes": float(num_nodes),
        **{f"eval/time/{part}": share for part, share in shares.items()},
        "eval/outside_backbone_fraction": 1 - sum(shares[part] for part in BACKBONES),
        "eval/is_lossless": float(config.decode.rule != "typical"),
        **_agreement(session, backbone, tokenizer),
    }


def _methods(
    config: Config, backbone: Backbone, heads: nn.Module, tree: Tree, limits: Limits, size: int
) -> dict[str, Method]:
    return build_methods(
        backbone,
        heads,
        tree,
        limits,
        rule_of(config),
        baselines=config.evaluate.baselines,
        batch_size=size,
    )


def _warm_up(
    methods: dict[str, Method], prompts: list[Prompt], num_prompts: int, batch_size: int
) -> None:
    """Answer some prompts in batches of the sizes that will be timed, the last one's too.

    On a GPU a step is captured anew for each number of rows.
    """
    asked = [prompt.input_ids for prompt in prompts]
    sizes = {min(batch_size, len(asked)), len(asked) % batch_size} - {0}
    for method in methods.values():
        for size in sizes:
            for start in range(0, num_prompts, size):
                method((asked[start:] + asked)[:size])


def _responses(
    config: Config,
    methods: dict[str, Method],
    prompts: list[Prompt],
    batch_size: int,
    backbone: Backbone,
) -> Iterator[tuple[list[Prompt], dict[str, Timed]]]:
    """Yield each batch of prompts with every method's answers."""
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    what = f"answering test prompts, {batch_size} at a time"
    for number, batch in enumerate(track(batches, what)):
        yield (
            batch,
            answer_in_turn(methods, batch, number, config.evaluate.repeats, backbone.device),
        )


def _agreement(
    session: Session, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Return how near the backbone is to the held-out text of the data set."""
    config = session.config
    limit = min(config.dataset.max_length, backbone.max_length)
    heldout = session.tokenized(tokenizer, limit).split("test")
    examples = heldout[: config.evaluate.num_prompts]
    agreement = measure_agreement(backbone, examples, "held-out loss")
    return {
        "eval/backbone_nats_per_token": agreement.nats_per_token,
        "eval/backbone_top1": agreement.top1,
    }
