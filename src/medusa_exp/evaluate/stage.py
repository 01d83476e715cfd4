"""Stage evaluate: heads, tree and held-out prompts in; records.jsonl and samples.jsonl out."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.prompts import Prompt, prompts_of
from medusa_exp.data.sources import load_split
from medusa_exp.data.tokenised import load_tokenised
from medusa_exp.decode.check import check_trees
from medusa_exp.decode.settings import limits_of, rule_of
from medusa_exp.evaluate.methods import (
    LOOKUP_TOKENS,
    Answer,
    Method,
    at_batch_size,
    build_methods,
    timed,
)
from medusa_exp.evaluate.metrics import Record, summarise
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.files import write_jsonl
from medusa_exp.model.agreement import measure_agreement
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.tokenizer import load_tokenizer
from medusa_exp.tree.choice import choose_tree

log = logging.getLogger(__name__)

_MAX_SAMPLES = 12


def run(config: Config, out: Path) -> dict[str, float]:
    """Answer the prompts with every method, in turn, and compare."""
    backbone = load_backbone(config)
    tokenizer = load_tokenizer(config)
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    tree = choose_tree(config, out, heads.num_heads)
    tree.save(out / "tree.json")
    conversations = load_split(config, "test")
    prompts = prompts_of(
        conversations,
        tokenizer,
        config,
        # Prompt lookup guesses beyond the end of an answer, without regard to the last position.
        max_positions=backbone.max_length - LOOKUP_TOKENS,
        num_prompts=config.evaluate.num_prompts,
    )
    methods = build_methods(
        backbone,
        heads,
        tree,
        limits_of(config, backbone, tokenizer),
        rule_of(config),
        baselines=config.evaluate.baselines,
        num_heads=heads.num_heads,
    )
    check_trees(backbone)
    for method in methods.values():
        for prompt in prompts[: config.evaluate.warmup_prompts]:
            method([prompt.input_ids])
    records: list[Record] = []
    samples: list[dict[str, Any]] = []
    for batch_size in config.evaluate.batch_sizes:
        chosen = at_batch_size(methods, batch_size)
        batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        what = f"answering test prompts, {batch_size} at a time"
        for number, batch in enumerate(track(batches, what)):
            answers = _answer(chosen, batch, number, config.evaluate.repeats, backbone.device)
            records += _records(batch, answers, batch_size, config, backbone, len(tree))
            if len(samples) < _MAX_SAMPLES:
                samples.append(_sample(batch[0], answers["tree"][0][0], tokenizer))
    write_jsonl(out / "records.jsonl", records)
    write_jsonl(out / "samples.jsonl", samples)
    metrics = summarise(records)
    metrics["eval/is_lossless"] = float(config.decode.rule != "typical")
    limit = min(config.dataset.max_length, backbone.max_length)
    heldout = load_tokenised(config, tokenizer, limit).split("test")
    examples = heldout[: config.evaluate.num_prompts]
    agreement = measure_agreement(backbone, examples, "held-out loss")
    metrics["eval/backbone_nats_per_token"] = agreement.nats_per_token
    metrics["eval/backbone_top1"] = agreement.top1
    return metrics


Timed = tuple[list[Answer], float]
"""Answers to a batch, and the seconds they took together."""


def _answer(
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


def _records(
    batch: list[Prompt],
    answers: dict[str, Timed],
    batch_size: int,
    config: Config,
    backbone: Backbone,
    num_nodes: int,
) -> list[Record]:
    """Return a record a prompt and method; a batch's seconds are shared out among its prompts."""
    plain, plain_seconds = answers["plain"]
    is_random = config.decode.rule == "sampling"
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
            if name == "tree" and record["identical"] is False and config.decode.rule == "greedy":
                difference = find_difference(
                    backbone, prompt.input_ids, expected.tokens, answer.tokens, num_nodes
                )
                record["difference"] = asdict(difference) if difference else None
            records.append(record)
    return records


def _sample(prompt: Prompt, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
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
