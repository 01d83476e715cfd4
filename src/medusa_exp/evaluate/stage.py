"""Stage evaluate: heads, tree and held-out prompts in; records.jsonl and samples.jsonl out."""

import logging
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.prompts import Prompt, prompts_of
from medusa_exp.data.sources import load_split
from medusa_exp.data.tokenised import load_tokenised
from medusa_exp.decode.stop import stop_ids
from medusa_exp.evaluate.methods import LOOKUP_TOKENS, Answer, Method, build_methods, timed
from medusa_exp.evaluate.metrics import Record, summarise
from medusa_exp.files import write_jsonl
from medusa_exp.model.agreement import measure_agreement
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
        max_new_tokens=config.decode.max_new_tokens,
        stop_ids=stop_ids(config, backbone, tokenizer),
        baselines=config.evaluate.baselines,
        rule=config.decode.rule,
    )
    for prompt in prompts[: config.evaluate.warmup_prompts]:
        for method in methods.values():
            method(prompt.input_ids)
    records: list[Record] = []
    samples: list[dict[str, Any]] = []
    for number, prompt in enumerate(track(prompts, "answering test prompts")):
        answers = _answer(methods, prompt, number, config.evaluate.repeats, backbone.device)
        records += _records(prompt, answers)
        if len(samples) < _MAX_SAMPLES:
            samples.append(_sample(prompt, answers["tree"][0], tokenizer))
    write_jsonl(out / "records.jsonl", records)
    write_jsonl(out / "samples.jsonl", samples)
    metrics = summarise(records)
    limit = min(config.dataset.max_length, backbone.max_length)
    heldout = load_tokenised(config, tokenizer, limit).split("test")
    examples = heldout[: config.evaluate.num_prompts]
    agreement = measure_agreement(backbone, examples, "held-out loss")
    metrics["eval/backbone_nats_per_token"] = agreement.nats_per_token
    metrics["eval/backbone_top1"] = agreement.top1
    return metrics


def _answer(
    methods: dict[str, Method], prompt: Prompt, number: int, repeats: int, device: torch.device
) -> dict[str, tuple[Answer, float]]:
    """Let every method answer; who begins changes from prompt to prompt."""
    names = list(methods)
    first = number % len(names)
    answers: dict[str, tuple[Answer, float]] = {}
    for _ in range(repeats):
        for name in names[first:] + names[:first]:
            answer, seconds = timed(methods[name], prompt.input_ids, device)
            if name not in answers or seconds < answers[name][1]:
                answers[name] = (answer, seconds)
    return answers


def _records(prompt: Prompt, answers: dict[str, tuple[Answer, float]]) -> list[Record]:
    plain, plain_seconds = answers["plain"]
    return [
        {
            "prompt_id": prompt.prompt_id,
            "category": prompt.category,
            "method": name,
            "batch_size": 1,
            "new_tokens": len(answer.tokens),
            "steps": answer.num_steps,
            "accept_lengths": answer.accept_lengths,
            "seconds": seconds,
            "baseline_seconds": plain_seconds,
            "baseline_new_tokens": len(plain.tokens),
            "identical": answer.tokens == plain.tokens,
        }
        for name, (answer, seconds) in answers.items()
    ]


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
