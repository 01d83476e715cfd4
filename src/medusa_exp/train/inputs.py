"""Config in; all that heads are trained on out: backbone, documents, hidden states, answers."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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
from medusa_exp.data.tokenized import load_tokenised
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loading import load_backbone, load_ends
from medusa_exp.model.source import files_identity
from medusa_exp.model.tokenizer import load_tokenizer
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.record import annotate
from medusa_exp.train.acceptance import Continuation, continuations, held_out_prompts
from medusa_exp.train.precompute import known_identities, note_identities, open_features
from medusa_exp.train.regenerated import open_answers

log = logging.getLogger(__name__)


@dataclass
class Inputs:
    """What a training starts from."""

    backbone: Backbone
    """Without its layers where no step needs them."""
    tokenizer: PreTrainedTokenizerBase
    documents: dict[str, Examples]
    """Of `train`, and of `val` if there is a validation."""
    data_key: str
    """Names all documents: those of the data, or the backbone's own answers to them."""
    row_tokens: int
    """The length limit of documents."""
    features: dict[str, Features]
    """Their hidden states, with train.features=cache."""
    prompts: list[Prompt]
    """Held-out ones, for `acceptance`."""
    answers: list[Continuation]
    """The backbone's to them."""

    def token_counts(self) -> Tensor:
        """Count the trained tokens [V] of the training documents."""
        counts_V = np.zeros(self.backbone.vocab_size, np.int64)
        for example in self.documents["train"]:
            ids = example.input_ids[example.is_trained]
            counts_V += np.bincount(ids, minlength=len(counts_V))
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
        )


class _Backbones:
    """The backbone with as little of it as there is need for."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._files = files_identity(config)

    @cached_property
    def ends(self) -> Backbone:
        """Without its layers, if it is known from before and hidden states are cached."""
        known = known_identities(self.config, self._files)
        if self.config.train.features == "cache" and known is not None:
            return load_ends(self.config, *known)
        return self.body()

    @cached_property
    def _whole(self) -> Backbone:
        backbone = load_backbone(self.config, is_adapted=False)
        note_identities(self.config, self._files, backbone)
        return backbone

    def body(self) -> Backbone:
        """With them."""
        return self._whole


def open_inputs(config: Config, out: Path) -> Inputs:
    """Load, or make and keep, all that heads are trained on."""
    backbones = _Backbones(config)
    backbone = backbones.ends
    tokenizer = load_tokenizer(config)
    row_tokens = min(config.dataset.max_length, backbone.max_length)
    tokenised = load_tokenised(config, tokenizer, row_tokens)
    tokenised.log()
    if rank_zero_only.rank == 0:
        known = read_json(out / "data.json", {})  # with what stage inspect has found, if it has
        same = known if known.get("key") == tokenised.summary["key"] else {}
        write_json(out / "data.json", {**same, **tokenised.summary})
    documents: dict[str, Examples] = {}
    if config.train.text == "own":
        data_key, *both = open_answers(config, tokenised, backbone, tokenizer)
        documents = {name: one for name, one in zip(("train", "val"), both, strict=True) if one}
    else:
        data_key, documents["train"] = tokenised.summary["key"], tokenised.split("train")
        if config.dataset.val_fraction:
            documents["val"] = tokenised.split("val")
    features: dict[str, Features] = {}
    if config.train.features == "cache":
        features = open_features(config, documents, data_key, backbone, backbones.body)
        annotate(features={split: found.path.name for split, found in features.items()})
    elif config.train.batching == "packed":
        backbone.check_packing()
    if config.train.loss != "ce":
        backbone.check_next_logits()
    prompts = held_out_prompts(config, tokenizer, backbone)
    answers = continuations(config, tokenizer, prompts, backbone, backbones.body)
    return Inputs(backbone, tokenizer, documents, data_key, row_tokens, features, prompts, answers)
