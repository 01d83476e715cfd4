"""Config in; the files of the data set, its split and its tokenised sequences out."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config, DatasetConfig
from medusa_exp.data.conversations import Conversation, DataError, read_conversations
from medusa_exp.data.rendering import render
from medusa_exp.data.synthetic import write_dataset
from medusa_exp.files import content_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation, cut to the length limit, and which of them are trained."""

    input_ids: np.ndarray
    is_trained: np.ndarray


def dataset_key(dataset: DatasetConfig) -> str:
    """Name the generated data set's content: its options, and the generator's own source."""
    package = resources.files("medusa_exp.data.synthetic")
    source = sorted(file.read_text() for file in package.iterdir() if file.name.endswith(".py"))
    return content_key(source, dataset.num_conversations, dataset.seed)


def dataset_files(config: Config) -> list[Path]:
    """Return the ShareGPT files of the data set; a generated one is written first if absent.

    Raises:
        DataError: dataset.path is not set or leads nowhere.
    """
    dataset = config.dataset
    if dataset.kind == "synthetic":
        path = Path(config.cache_dir) / "synthetic" / f"{dataset_key(dataset)}.json"
        if not path.is_file():
            write_dataset(path, dataset.num_conversations, dataset.seed)
        return [path]
    if dataset.path is None:
        raise DataError("dataset.path is not set: name a ShareGPT file, a folder or a glob.")
    return read_conversations(dataset.path).paths


def load_split(config: Config, split: str) -> list[Conversation]:
    """Read the conversations of one split: train, val or test.

    The split hangs on the conversation's id alone, so that it is the same in every run.

    Raises:
        DataError: naming the file and why nothing of it can be used.
    """
    reading = read_conversations(dataset_files(config))
    chosen = [c for c in reading if split_of(c.id, config.dataset) == split]
    _report(reading.dropped, "records in all", reading.num_records)
    if not chosen:
        places = ", ".join(str(path) for path in reading.paths)
        why = "; ".join(f"{reason}: {n}" for reason, n in reading.dropped.items()) or "none dropped"
        raise DataError(
            f"{places}: no conversation for split {split} among {reading.num_records} records "
            f"({why}). Check the file, or raise dataset.{split}_fraction."
        )
    return chosen


def split_of(conversation_id: str, dataset: DatasetConfig) -> str:
    """Return train, val or test, by a hash of the id."""
    digest = hashlib.sha256(conversation_id.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < dataset.test_fraction:
        return "test"
    return "val" if place < dataset.test_fraction + dataset.val_fraction else "train"


def tokenise(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    """Render and tokenise; what cannot be used is counted and logged.

    Raises:
        DataError: nothing is left to train on; says why.
    """
    counts: Counter[str] = Counter()
    sequences = list(_sequences(conversations, tokenizer, max_length, counts))
    _report(counts, "rows that are kept", len(sequences))
    if not sequences:
        why = "; ".join(f"{reason}: {count}" for reason, count in counts.items())
        raise DataError(f"no token of the data set is an assistant's ({why}): nothing to train on.")
    return sequences


def _sequences(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: Counter[str],
) -> Iterator[Example]:
    for conversation in conversations:
        try:
            rows = render(conversation, tokenizer)
        except DataError as error:
            if not counts["refused by the chat template"]:
                log.warning("%s", error)
            counts["refused by the chat template"] += 1
            continue
        for row in rows:
            if len(row.input_ids) > max_length:
                counts[f"cut to {max_length} tokens"] += 1
            is_trained = np.array(row.is_trained[:max_length], dtype=bool)
            if not is_trained.any():
                counts["no assistant token left"] += 1
                continue
            yield Example(np.array(row.input_ids[:max_length], dtype=np.int32), is_trained)


def _report(counts: Counter[str], what: str, total: int) -> None:
    for reason, count in sorted(counts.items()):
        log.warning("data: %s: %d (beside %d %s)", reason, count, total, what)
