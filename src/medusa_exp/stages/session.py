"""What the stages of one command share: what they have loaded, and where they take notes.

Here the whole `Config` is taken apart; what loads data and models knows of its own settings alone.
"""

from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.conversations import Conversation
from medusa_exp.data.sources import Source, dataset_key, files_of, load_split, open_sources
from medusa_exp.data.tokenized import Tokenized, load_tokenized
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.source import ModelSpec, adapted_path, tiny_dir
from medusa_exp.model.tokenizer import load_tokenizer
from medusa_exp.runs.record import Notes
from medusa_exp.tracking.history import StepLogger


class Session:
    """A command's stages on one run directory; what one has loaded the next need not load again.

    Args:
        config: of the run.
        out: its directory.
        log_step: mirrors the steps of a training, which are written to history.jsonl anyhow.
    """

    def __init__(self, config: Config, out: Path, log_step: StepLogger | None = None) -> None:
        self.config, self.out, self.log_step = config, out, log_step
        self.notes = Notes()
        """Of the stage that is running."""
        self._backbone: tuple[Path | None, Backbone] | None = None

    def sources(self) -> list[Source]:
        """Open the data set, and note what it is made of."""
        dataset = self.config.dataset
        sources = open_sources(dataset, self.config.cache_dir)
        keys = {"dataset": dataset_key(dataset)} if dataset.kind == "synthetic" else {}
        self.notes.add_inputs(files_of(sources), **keys)
        return sources

    def split(self, name: str) -> list[Conversation]:
        """Read the conversations of train, val or test."""
        return load_split(self.sources(), self.config.dataset, name)

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """Open the tokenized data set, which is built first if it is not there."""
        config = self.config
        found = load_tokenized(
            self.sources(),
            config.dataset,
            tokenizer,
            max_length,
            cache_dir=config.cache_dir,
            run_dir=Path(config.run_dir) if config.run_dir else None,
        )
        self.notes.add_inputs(tokenised=found.summary["key"])
        return found

    def prompt_tokens(self, max_positions: int) -> int:
        """Return the tokens that decode.max_new_tokens leaves to a prompt of the data set."""
        config = self.config
        return min(config.dataset.max_length, max_positions) - config.decode.max_new_tokens

    @cached_property
    def tiny(self) -> Path:
        """Where the model of stage pretrain lies, or will lie."""
        config = self.config
        return tiny_dir(
            files_of(self.sources()),
            config.dataset,
            config.model.pretrain,
            vocab_size=config.tokenizer.vocab_size,
            seed=config.seed,
            cache_dir=config.cache_dir,
        )

    @property
    def spec(self) -> ModelSpec:
        """Which backbone and tokenizer this run has."""
        config = self.config
        tiny = self.tiny if config.model.kind == "tiny" else None
        return ModelSpec(config.model, config.tokenizer, config.dtype.backbone, config.device, tiny)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(self.spec)

    def backbone(self, *, is_adapted: bool = True) -> Backbone:
        """Load the backbone, or return the one that is loaded; see `model.loading.load_backbone`.

        Where this run has adapted it (train=medusa2), that is its own, unless `is_adapted` is
        false. One is kept at a time. Nobody may change it: who has to, calls `forget_backbone`.
        """
        config, spec = self.config, self.spec
        if spec.tiny is not None:
            self.notes.add_inputs(model=spec.tiny.name)
        is_joint = is_adapted and config.train.kind == "medusa2"
        place = adapted_path(config.run_dir) if is_joint else None
        if self._backbone is None or self._backbone[0] != place:
            self.forget_backbone()
            backbone = load_backbone(spec, place)
            backbone.decodes_statically = (
                backbone.device.type == "cuda"
                and config.decode.cuda_graph
                and not backbone.is_spread
            )
            self._backbone = place, backbone
        return self._backbone[1]

    def forget_backbone(self) -> None:
        """Keep the backbone no longer, and free its memory: a later stage loads one anew."""
        if self._backbone is not None:
            self._backbone = None
            torch.cuda.empty_cache()  # for other processes too
