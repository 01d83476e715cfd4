"""Stage evaluate: heads, tree and held-out prompts in; records.jsonl and samples.jsonl out."""

import logging
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.batches import collate
from medusa_exp.data.conversations import Conversation
from medusa_exp.data.sources import load_split, tokenise
from medusa_exp.decode.loop import Decoded
from medusa_exp.evaluate.methods import Method, build_methods, timed
from medusa_exp.evaluate.metrics import Record, summarise
from medusa_exp.evaluate.prompts import Prompt, prompts_of, stop_ids
from medusa_exp.files import write_jsonl
from medusa_exp.model.backbone import Backbone, load_backbone, load_tokenizer
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.tree.choice import choose_tree

log = logging.getLogger(__name__)

_MAX_SAMPLES = 12


def run(config: Config, out: Path) -> dict[str, float]:
    """Answer the prompts with every method, in turn, and compare."""
    backbone = load_backbone(config)
    tokenizer = load_tokenizer(config)
    heads = load_heads(out / "heads", backbone)
    tree = choose_tree(config, out, heads.num_heads)
    tree.save(out / "tree.json")
    conversations = load_split(config, "test")
    prompts = prompts_of(conversations, tokenizer, config, backbone.max_length)
    prompts = prompts[: config.evaluate.num_prompts]
    methods = build_methods(
        backbone,
        heads,
        tree,
        max_new_tokens=config.decode.max_new_tokens,
        stop_ids=stop_ids(config, backbone, tokenizer),
        baselines=config.evaluate.baselines,
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
    metrics["eval/backbone_nats_per_token"] = heldout_loss(
        backbone, conversations, tokenizer, limit, config.train.batch_tokens
    )
    return metrics


def _answer(
    methods: dict[str, Method], prompt: Prompt, number: int, repeats: int, device: torch.device
) -> dict[str, tuple[Decoded, float]]:
    """Let every method answer; who begins changes from prompt to prompt."""
    names = list(methods)
    first = number % len(names)
    answers: dict[str, tuple[Decoded, float]] = {}
    for _ in range(repeats):
        for name in names[first:] + names[:first]:
            decoded, seconds = timed(methods[name], prompt.input_ids, device)
            if name not in answers or seconds < answers[name][1]:
                answers[name] = (decoded, seconds)
    return answers


def _records(prompt: Prompt, answers: dict[str, tuple[Decoded, float]]) -> list[Record]:
    plain, plain_seconds = answers["plain"]
    return [
        {
            "prompt_id": prompt.prompt_id,
            "category": prompt.category,
            "method": name,
            "batch_size": 1,
            "new_tokens": len(decoded.tokens),
            "steps": len(decoded.accept_lengths),
            "accept_lengths": decoded.accept_lengths,
            "seconds": seconds,
            "baseline_seconds": plain_seconds,
            "identical": decoded.tokens == plain.tokens,
        }
        for name, (decoded, seconds) in answers.items()
    ]


def _sample(prompt: Prompt, decoded: Decoded, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the answer's text cut into steps and these into tokens."""
    pieces = []
    text = ""
    for end in range(1, len(decoded.tokens) + 1):
        # A token's text depends on its neighbours: it is what the whole gains by it.
        longer = tokenizer.decode(decoded.tokens[:end], skip_special_tokens=False)
        if longer.endswith("\ufffd"):  # half of a character: it comes with the next token
            pieces.append("")
            continue
        pieces.append(longer[len(text) :])
        text = longer
    steps, start = [], 0
    for length in decoded.accept_lengths:
        steps.append(pieces[start : start + length])
        start += length
    return {
        "prompt_id": prompt.prompt_id,
        "category": prompt.category,
        "prompt": prompt.text,
        "steps": steps,
    }


@torch.inference_mode()
def heldout_loss(
    backbone: Backbone,
    conversations: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_tokens: int,
) -> float:
    """Return the backbone's mean loss on the assistant's held-out tokens, in nats per token."""
    loss_sum, num_tokens = 0.0, 0
    for sequence in tokenise(conversations, tokenizer, max_length):
        batch = collate([sequence])
        is_label_BT = batch.is_trained_BT[:, 1:].to(backbone.device)
        ids_BT = batch.input_ids_BT.to(backbone.device)
        hidden_RD = backbone.hidden_states(ids_BT)[:, :-1][is_label_BT]
        labels_R = ids_BT[:, 1:][is_label_BT]
        loss_sum += _loss_sum(backbone, hidden_RD, labels_R)
        num_tokens += len(labels_R)
    return loss_sum / max(1, num_tokens)


def _loss_sum(backbone: Backbone, hidden_RD: Tensor, labels_R: Tensor) -> float:
    logits_RV = backbone.lm_head(hidden_RD).float()
    return float(cross_entropy(logits_RV, labels_R, reduction="sum"))
