"""What the stages of one command share: what they have loaded, and where they take notes."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.conversations import Conversation
from medusa_exp.data.sources import Source, dataset_key, load_split, open_sources
from medusa_exp.data.tokenized import Tokenized, load_tokenized
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.source import tiny_dir
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

    def sources(self) -> list[Source]:
        """Open the data set, and note what it is made of."""
        sources = open_sources(self.config)
        self._note_data(sources)
        return sources

    def split(self, name: str) -> list[Conversation]:
        """Read the conversations of train, val or test."""
        self.sources()
        return load_split(self.config, name)

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """Open the tokenized data set, which is built first if it is not there."""
        self.sources()
        found = load_tokenized(self.config, tokenizer, max_length)
        self.notes.add_inputs(tokenised=found.summary["key"])
        return found

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(self.config)

    def backbone(self, **options: Any) -> Backbone:
        """Load the backbone; see `model.loading.load_backbone`."""
        if self.config.model.kind == "tiny":
            self.sources()
            self.notes.add_inputs(model=tiny_dir(self.config).name)
        return load_backbone(self.config, **options)

    def _note_data(self, sources: list[Source]) -> None:
        keys = {}
        if self.config.dataset.kind == "synthetic":
            keys["dataset"] = dataset_key(self.config.dataset)
        self.notes.add_inputs([p for source in sources for p in source.reading.paths], **keys)
