"""What a training starts from: backbone, documents, hidden states, held-out responses.

All of it is made once and kept in the cache: `open_inputs` says in which order, and loads as little
of the backbone as there is need for.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.datamodule import Batches
from medusa_exp.data.examples import Examples
from medusa_exp.data.feature_cache import Features
from medusa_exp.data.prompts import Prompt
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loading import load_backbone, load_ends
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.stages.early_checks import check_drafts
from medusa_exp.stages.regenerate import key_in_cache
from medusa_exp.stages.session import Session, limits_of, rule_of
from medusa_exp.train.acceptance import HeldOutResponse, held_out_responses, responses_key
from medusa_exp.train.precompute import (
    FeatureSettings,
    fingerprint_note,
    known_fingerprints,
    note_fingerprints,
    open_features,
)
from medusa_exp.train.regenerated import open_regenerated
from medusa_exp.train.trainer import pick_precision, shard_layers

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What a training starts from."""

    backbone: Backbone
    """Without its layers where no step needs them."""
    tokenizer: PreTrainedTokenizerBase
    documents: dict[str, Examples]
    """Examples by split: `train`, and `val` if there is a validation."""
    data_key: str
    """Names all documents: those of the data, or with regenerated responses in them."""
    row_tokens: int
    """The length limit of documents."""
    features: dict[str, Features]
    """Their hidden states, with train.features=cache."""
    prompts: list[Prompt]
    """Held-out ones, for `acceptance`."""
    responses: list[HeldOutResponse]
    """The backbone's to them."""

    def token_counts(self) -> Tensor:
        """Count the trained tokens [V] of the training documents."""
        counts_V = np.zeros(self.backbone.vocab_size, np.int64)
        for example in self.documents["train"]:
            np.add.at(counts_V, example.input_ids[example.is_trained], 1)
        return torch.from_numpy(counts_V)

    def batches(self, config: Config) -> Batches:
        """Return the batches of training and validation."""
        settings = config.train
        return Batches(
            self.documents["train"],
            self.documents.get("val"),
            batching=settings.batching,
            batch_tokens=settings.batch_tokens,
            row_tokens=self.row_tokens,
            seed=config.seed,
            val_batches=settings.val_batches,
            accumulate=settings.accumulate,
            num_heads=config.head.num_heads,
            features=self.features,
            boundary=self.backbone.rotary_boundary,
        )


def open_inputs(session: Session, opener: "BackboneOpener | None" = None) -> Inputs:
    """Load, or make and keep, all that heads are trained on.

    Args:
        session: of the command.
        opener: of its backbone, where it has been opened before.

    Raises:
        UserError: the backbone cannot be decoded with trees, or something is not there.
    """
    config, opener = session.config, opener or BackboneOpener(session)
    backbone, tokenizer = opener.ends, session.tokenizer()
    row_tokens = min(config.dataset.max_length, backbone.max_length)
    data_key, documents = _open_documents(session, backbone, tokenizer, row_tokens)
    features: dict[str, Features] = {}
    if config.train.features == "cache":
        features = _open_features(session, documents, data_key, opener)
    elif config.train.batching == "packed":
        backbone.check_packing()
    reads_text_alone = config.train.loss == "ce" and config.train.labels == "data"
    if config.train.kind == "medusa2" or not reads_text_alone:
        backbone.check_next_logits()
    prompts = _held_out_prompts(session, tokenizer, backbone)
    limits = limits_of(config, backbone, tokenizer)
    rule = validation_rule(config)
    key = responses_key(prompts, limits, backbone, session.spec.attention, rule)
    responses = held_out_responses(
        config.cache_dir, key, prompts, limits, backbone, lambda: opener.whole, rule
    )
    if config.train.kind == "medusa2" or config.train.strategy == "fsdp" or not backbone.has_body:
        session.forget_backbone()
    # With cached states one process may have come late enough to need no layer, and not another.
    if config.train.strategy == "fsdp" and config.train.features == "online":
        session.notes.add(backbone_bytes=shard_layers(backbone))
    return Inputs(
        backbone, tokenizer, documents, data_key, row_tokens, features, prompts, responses
    )


def validation_rule(config: Config) -> AcceptanceRule:
    """Return the rule that val/accept_length is of: that of decoding, or greedy for a lossy one.

    decode.draft=auto counts the likeliest tokens, whose replay costs less.
    """
    return GREEDY if config.decode.rule == "typical" else rule_of(config)


class BackboneOpener:
    """Opens as little of the backbone as is needed."""

    def __init__(self, session: Session) -> None:
        """Check first that the model can verify what is to be drafted.

        Raises:
            UserError: as `check_drafts`.
        """
        check_drafts(session.config, session.out, session.spec)
        config, files = session.config, session.spec.files_fingerprint()
        self.session, self.config = session, config
        self.note = fingerprint_note(
            config.cache_dir, files, config.tokenizer, config.model.quantization
        )

    @cached_property
    def ends(self) -> Backbone:
        """Without its layers, if it is known from before and hidden states are cached."""
        known = known_fingerprints(self.note, self.session.spec.attention)
        if self.config.train.features == "cache" and known is not None:
            return load_ends(self.session.spec, *known)
        return self.whole

    @cached_property
    def whole(self) -> Backbone:
        """With its layers, and checked before anything long begins."""
        backbone = self.session.backbone(is_adapted=False)
        check_tree_attention(backbone)
        note_fingerprints(self.note, backbone, self.session.spec.attention)
        return backbone


def _open_documents(
    session: Session, backbone: Backbone, tokenizer: PreTrainedTokenizerBase, row_tokens: int
) -> tuple[str, dict[str, Examples]]:
    """Return the tokenized documents of train and val, or with regenerated responses; their key."""
    config, out = session.config, session.out
    tokenized = session.tokenized(tokenizer, row_tokens)
    tokenized.log()
    if rank_zero_only.rank == 0:
        known = read_json(out / "data.json", {})  # with what stage inspect has found, if it has
        same = known if known.get("key") == tokenized.summary["key"] else {}
        write_json(out / "data.json", {**same, **tokenized.summary})
    if config.train.text == "regenerated":
        key = key_in_cache(config, tokenized, backbone, tokenizer)
        session.notes.add_inputs(regenerated=key)
        return key, open_regenerated(config.cache_dir, key, config.dataset)
    splits = ("train", "val") if config.dataset.val_fraction else ("train",)
    return tokenized.summary["key"], {split: tokenized.split(split) for split in splits}


def _open_features(
    session: Session, documents: dict[str, Examples], data_key: str, opener: BackboneOpener
) -> dict[str, Features]:
    config, backbone = session.config, opener.ends
    settings = FeatureSettings(
        pick_precision(config.dtype.precision, backbone.device),
        session.spec.attention,
        config.head.prefix_attention,
        config.train.batch_tokens,
        config.train.feature_workers,
    )
    load: Callable[[], Backbone] = lambda: opener.whole  # noqa: E731
    if settings.num_workers:
        load = partial(load_backbone, session.spec)
    features: dict[str, Features] = {}
    for split, examples in documents.items():
        features[split] = open_features(
            config.cache_dir, split, examples, config.dataset, data_key, settings, backbone, load
        )
        # At once: the next split may take hours, and runs.clean removes what nobody has noted.
        session.notes.add(features={name: found.path.name for name, found in features.items()})
    return features


def _held_out_prompts(
    session: Session, tokenizer: PreTrainedTokenizerBase, backbone: Backbone
) -> list[Prompt]:
    """Return `train.val_prompts` prompts; none, and a warning, where there is none to answer.

    Asks on the way whether there will be one for calibrate and evaluate, which would say so after
    the training.

    Raises:
        UserError: there is none, and a stage that answers some is to follow.
    """
    config = session.config
    wanted, stages = config.train.val_prompts, {*config.stages}
    if "evaluate" in stages and config.evaluate.path is None:
        session.prompts("test", backbone, tokenizer, 1)
    if not (wanted or "calibrate" in stages) or not config.dataset.val_fraction:
        return []
    try:
        found = session.prompts("val", backbone, tokenizer, max(1, wanted))
        return found[:wanted]
    except UserError as error:
        if "calibrate" in stages:
            raise
        log.warning("no val/accept_length: %s", error)
        return []
