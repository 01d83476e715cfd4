"""The data set: its named sources, their conversations, and the split that each belongs to."""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from medusa_exp.config import DatasetConfig
from medusa_exp.data import synthetic
from medusa_exp.data.chat_files import find_files
from medusa_exp.data.conversations import HUB, Reading, ReadOptions, read_conversations
from medusa_exp.data.faults import DataError, of_reading
from medusa_exp.data.messages import Conversation
from medusa_exp.data.record_faults import absent_columns
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import content_key, settings_in_key, sha256_file

log = logging.getLogger(__name__)

T = TypeVar("T")
_IN_KEY = (
    "hub_split",
    "role_map",
    "strict",
    "deduplicate",
    "min_turns",
    "max_turns",
    "min_chars",
    "max_chars",
    "sample_fraction",
    "seed",
)
"""Options that always count in the key of a cache; those that came later do where they are set."""


@dataclass(frozen=True)
class Source:
    """A named part of the data set."""

    name: str
    reading: Reading

    def identity(self) -> list[Any]:
        """Return what names its content, for the key of a cache."""
        files = []
        for path in self.reading.paths:
            with of_reading(path):
                files.append(sha256_file(path))
        options = settings_in_key(self.reading.options, _IN_KEY)
        return [self.name, files, self.reading.fingerprints(), options]


def open_sources(dataset: DatasetConfig, cache_dir: str | Path) -> list[Source]:
    """Open the data set's sources; a generated one is written into the cache first if it is absent.

    Raises:
        DataError: dataset.path or a source's path is not set or leads nowhere.
    """
    if dataset.kind == "synthetic":
        name = f"{dataset_key(dataset)}.json"
        with entry(cache_dir, "synthetic", name) as (generated, unwritten):
            if unwritten:
                synthetic.write_dataset(unwritten, dataset.num_conversations, dataset.seed)
        return [Source("synthetic", read_conversations(generated))]
    if dataset.sources and dataset.path:
        raise DataError("dataset.path and dataset.sources are both set: use one of them.")
    paths = {name: source.path for name, source in dataset.sources.items()}
    if not paths:
        if not dataset.path:
            raise DataError(
                "dataset.path is not set: name a file, a folder or a glob of chats, or set "
                "dataset.sources."
            )
        paths = {dataset.kind: dataset.path}
    if dataset.kind == "hub":
        paths = {name: f"hub:{path}" for name, path in paths.items()}
    options = {option.name: getattr(dataset, option.name) for option in fields(ReadOptions)}
    return [Source(name, read_conversations(path, **options)) for name, path in paths.items()]


def check_files(dataset: DatasetConfig) -> None:
    """Look whether the files that a data set names are there; none is opened.

    Raises:
        DataError: one is not.
    """
    places = [dataset.path, *(source.path for source in dataset.sources.values())]
    for place in places if dataset.kind == "sharegpt" else ():
        if place and not (place.startswith(HUB) or Path(place).expanduser().exists()):
            find_files(place)


def reading_options(dataset: DatasetConfig) -> dict[str, Any]:
    """Return how records are read and which are taken, for files beside the data set's own.

    Neither a sample is taken of those, nor are they looked through for copies.
    """
    chosen = ("form", "columns", "role_map", "strict", "min_turns", "max_turns", "min_chars")
    return {name: getattr(dataset, name) for name in (*chosen, "max_chars", "max_record_bytes")}


def files_of(sources: list[Source]) -> list[Path]:
    """Return the files of a data set; one of the hub's has none."""
    return [path for source in sources for path in source.reading.paths]


def dataset_key(dataset: DatasetConfig) -> str:
    """Name the generated data set's content: its options, and the format of what is generated."""
    return content_key(synthetic.FORMAT, dataset.num_conversations, dataset.seed)


def load_split(sources: list[Source], dataset: DatasetConfig, split: str) -> list[Conversation]:
    """Read the conversations of one split: train, val or test.

    Raises:
        DataError: naming the file and why nothing of it can be used.
    """
    chosen = [chat for _, chat in walk(sources) if split_of(chat.id, dataset) == split]
    if not chosen:
        ids = {chat.id for _, chat in walk(sources)}
        found = {source.name: counts(source) for source in sources}
        raise empty_split(split, found, ids, dataset)
    return chosen


def walk(sources: list[Source]) -> Iterator[tuple[str, Conversation]]:
    """Yield every conversation with the name of its source.

    A reading drops its own duplicates; what several sources have in common is dropped here.

    Raises:
        DataError: behind the last: dataset.columns names what no record of any source has.
    """
    seen: set[bytes] = set()
    for source in sources:
        is_checked = len(sources) > 1 and source.reading.options.deduplicate
        for conversation in source.reading:
            if is_checked:
                digest = conversation.digest()
                if digest in seen:
                    source.reading.dropped["duplicate"] += 1
                    continue
                seen.add(digest)
            yield source.name, conversation
    readings = [source.reading for source in sources]
    if absent := set.intersection(*(reading.absent for reading in readings)):
        raise absent_columns(sorted(absent), readings[0].keys)


def evenly_spread(things: Sequence[T], number: int) -> list[T]:
    """Return so many of them, or as many as there are, from the first to the last.

    From all over a data set: its sources stand one after the other, and files may be sorted.
    """
    places = np.linspace(0, len(things) - 1, min(number, len(things))).round().astype(int)
    return [things[place] for place in places.tolist()]


def counts(source: Source) -> dict[str, Any]:
    """Return what the newest walk found in a source: raw chats, and those dropped by reason."""
    reading = source.reading
    return {"records": reading.num_records, "dropped": dict(reading.dropped)}


def empty_split(
    split: str, found: dict[str, dict[str, Any]], ids: set[str], dataset: DatasetConfig
) -> DataError:
    """Return the error that says why a split has no conversation.

    Args:
        split: train, val or test.
        found: `counts` of each source.
        ids: those of all conversations.
        dataset: says how they are split.
    """
    whys = []
    number = 0
    for name, outcome in found.items():
        reasons = "; ".join(f"{reason}: {n}" for reason, n in outcome["dropped"].items())
        whys.append(f"{name}: {outcome['records']} records ({reasons or 'none dropped'})")
        number += outcome["records"] - sum(outcome["dropped"].values())
    return DataError(
        f"the data set has no conversation for split {split}: {', '.join(whys)}. "
        f"{_advice(split, number, ids, dataset)}"
    )


def _advice(split: str, number: int, ids: set[str], dataset: DatasetConfig) -> str:
    """Say how the split gets a conversation; `number` is how many there are in all."""
    if number > 1 and len(ids) == 1:
        return (
            f"All {number} conversations have the id {ids.pop()!r:.60}, and the id decides the "
            "split: give each an id of its own, or leave the ids out."
        )
    if split == "train":
        more = "lower dataset.val_fraction and dataset.test_fraction"
        share = 1 - dataset.val_fraction - dataset.test_fraction
    else:
        more = f"raise dataset.{split}_fraction"
        share = getattr(dataset, f"{split}_fraction")
    needed = math.ceil(1 / share) if share > 0 else 0
    if not ids or len(ids) >= needed:
        return f"Check the file, or {more}."
    if len(ids) == 1:
        return (
            "One conversation cannot be in two splits: add others. For one to be expected in "
            f"{split}, about {needed} are needed."
        )
    return (
        f"By chance none of {len(ids)} conversations is in it, where one is to be expected of "
        f"about {needed}: add others, or {more}."
    )


def split_of(conversation_id: str, dataset: DatasetConfig) -> str:
    """Return train, val or test, by a hash of the id alone: the same in every run."""
    digest = hashlib.sha256(conversation_id.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < dataset.test_fraction:
        return "test"
    return "val" if place < dataset.test_fraction + dataset.val_fraction else "train"
