"""A batch of prompts and several methods in; what each said, and how long it took, out."""

from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.prompts import Prompt
from medusa_exp.evaluate.methods import Answer, Method, timed
from medusa_exp.evaluate.metrics import Record
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.model.backbone import Backbone

Timed = tuple[list[Answer], float]
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


def sample_of(prompt: Prompt, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
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
