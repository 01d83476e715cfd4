"""Stage evaluate: heads, tree and held-out prompts in; records.jsonl and samples.jsonl out."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.prompts import Prompt
from medusa_exp.data.tokenized import load_tokenised
from medusa_exp.decode.answers import Limits
from medusa_exp.decode.compatibility import check_trees
from medusa_exp.decode.loop import decode_plain
from medusa_exp.decode.settings import limits_of, rule_of
from medusa_exp.evaluate.methods import LOOKUP_TOKENS, Method, build_methods
from medusa_exp.evaluate.metrics import Record, summarise
from medusa_exp.evaluate.prompts import load_prompts
from medusa_exp.evaluate.records import Timed, answer_in_turn, records_of, sample_of
from medusa_exp.evaluate.step_profile import BACKBONES, shares_of_time
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.scoring import measure_agreement
from medusa_exp.model.tokenizer import load_tokenizer
from medusa_exp.runs.files import write_jsonl
from medusa_exp.runs.progress import track
from medusa_exp.tree import Tree
from medusa_exp.tree.choice import choose_tree

log = logging.getLogger(__name__)

_MAX_SAMPLES = 12
_TIMED_PROMPTS = 8
"""Prompts on which it is measured where time goes."""


def run(config: Config, out: Path) -> dict[str, float]:
    """Answer the prompts with every method, in turn, and compare."""
    backbone = load_backbone(config)
    tokenizer = load_tokenizer(config)
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    check_trees(backbone)
    limits = limits_of(config, backbone, tokenizer)
    prompts = load_prompts(
        config,
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
        for batch, answers in _answers(config, methods, prompts, batch_size, backbone):
            records += records_of(
                batch, answers, batch_size, config.decode.rule, backbone, tree.num_checked
            )
            if len(samples) < _MAX_SAMPLES:
                samples.append(sample_of(batch[0], answers["tree"][0][0], tokenizer))
    write_jsonl(out / "records.jsonl", records)
    write_jsonl(out / "samples.jsonl", samples)
    return {
        **summarise(records),
        "eval/num_nodes": float(num_nodes),
        **{f"eval/time/{part}": share for part, share in shares.items()},
        "eval/outside_backbone_fraction": 1 - sum(shares[part] for part in BACKBONES),
        "eval/is_lossless": float(config.decode.rule != "typical"),
        **_agreement(config, backbone, tokenizer),
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


def _answers(
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
    config: Config, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Return how near the backbone is to the held-out text of the data set."""
    limit = min(config.dataset.max_length, backbone.max_length)
    heldout = load_tokenised(config, tokenizer, limit).split("test")
    examples = heldout[: config.evaluate.num_prompts]
    agreement = measure_agreement(backbone, examples, "held-out loss")
    return {
        "eval/backbone_nats_per_token": agreement.nats_per_token,
        "eval/backbone_top1": agreement.top1,
    }
