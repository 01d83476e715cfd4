"""Config and tokenizer in; the tokenised data set out, from the cache where it is there.

A cache entry is a directory of `documents.arrow` and `summary.json`, which counts what became of
every record. It appears under its name only when it is whole; of several processes that want the
same entry, one builds it and the others wait. Its name is a hash of all that decides its content.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config, DatasetConfig
from medusa_exp.data.build import (
    CUT,
    KEPT,
    LOST_ROWS,
    LOST_TOKENS,
    REFUSED,
    UNTRAINED,
    Tally,
    write_documents,
)
from medusa_exp.data.conversations import DataError
from medusa_exp.data.examples import Examples, open_documents
from medusa_exp.data.sources import Source, counts, empty_split, open_sources, split_of, walk
from medusa_exp.data.template import describe
from medusa_exp.errors import UserError
from medusa_exp.runs.files import content_key, publish, read_json, sha256_file, write_json

log = logging.getLogger(__name__)

_DOCUMENTS, _SUMMARY = "documents.arrow", "summary.json"
FORMAT = 1
"""Raise it when the same chats, tokenizer and template give other documents: caches are then built
anew. (tests/golden/renderings.json tells of most such changes.)"""
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "msgspec", "pyarrow")
"""Whose versions may change what is read, rendered or tokenised."""


@dataclass(frozen=True)
class Tokenised:
    """Documents of all splits, and what became of every record."""

    config: Config
    table: pa.Table
    summary: dict[str, Any]
    """`key`, `sources` {name: {outcome: number}}, `examples` {outcome: the first such error} and
    `notes` on the template."""
    max_length: int
    is_new: bool
    """Was it built by this call?"""

    def all(self) -> Examples:
        """Return the documents of all splits."""
        return Examples(self.table)

    def split(self, name: str) -> Examples:
        """Return the documents of train, val or test; those of train with their sources' weights.

        Raises:
            DataError: there is none.
        """
        if not len(rows := self.rows(name)):
            raise empty_split(name, self.summary["sources"])
        return select(self.table, rows, self.config.dataset, name)

    def rows(self, name: str) -> np.ndarray:
        """Return the numbers of the documents of train, val or test."""
        return rows_of_split(self.table, self.config.dataset, name)

    def log(self) -> None:
        """Say what was kept, what was not, and why."""
        for name, outcomes in self.summary["sources"].items():
            log.info(
                "data: %s: %d of %d records kept: %d documents, %d tokens, %.1f %% of them trained",
                name,
                outcomes[KEPT],
                outcomes["records"],
                outcomes["documents"],
                outcomes["tokens"],
                100 * outcomes["trained tokens"] / max(1, outcomes["tokens"]),
            )
            for reason, count in sorted(outcomes["dropped"].items()):
                log.warning("data: %s: dropped: %s: %d", name, reason, count)
            if outcomes[CUT]:
                log.warning("data: %s: cut to %d tokens: %d", name, self.max_length, outcomes[CUT])
            for what in (LOST_ROWS, LOST_TOKENS):
                if outcomes[what]:
                    log.warning("data: %s: %s: %d", name, what, outcomes[what])
        for outcome, example in self.summary["examples"].items():
            log.warning("data: for example, %s: %s", outcome, example)
        for note in [] if self.is_new else self.summary["notes"]:  # building has logged them
            log.warning("data: %s", note)


def rows_of_split(table: pa.Table, dataset: DatasetConfig, name: str) -> np.ndarray:
    """Return the numbers of a table's documents that belong to train, val or test."""
    ids = table["conversation_id"].to_pylist()
    return np.flatnonzero([split_of(i, dataset) == name for i in ids])


def select(table: pa.Table, rows: np.ndarray, dataset: DatasetConfig, split: str) -> Examples:
    """Return documents of a table; those of train with the weights of their sources."""
    if split != "train" or not dataset.sources:
        return Examples(table, rows)
    names = table["source"].take(pa.array(rows)).to_pylist()
    return Examples(table, rows, np.array([dataset.sources[name].weight for name in names]))


def load_tokenised(
    config: Config, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Tokenised:
    """Open the data set's cache entry, which is built first if it is not there.

    Raises:
        DataError: naming the file, or why not one token of the data set can be trained on.
    """
    sources = open_sources(config)
    key = _key(sources, tokenizer, max_length)
    path = Path(config.cache_dir) / "tokenised" / key
    is_new = False
    try:
        if not _is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{key}.lock")):
                is_new = not _is_whole(path)
                if is_new:
                    _publish(path, key, sources, config, tokenizer, max_length)
    except OSError as error:
        raise UserError(
            f"the tokenised data could not be written under cache_dir={config.cache_dir}: "
            f"{error.strerror or error}."
        ) from error
    summary = read_json(path / _SUMMARY)
    if (older := _key_before_formats(config, sources, summary)) is not None:
        summary["key"] = older
        del summary["format"]
    return Tokenised(config, open_documents(path / _DOCUMENTS), summary, max_length, is_new)


def _key_before_formats(
    config: Config, sources: list[Source], summary: dict[str, Any]
) -> str | None:
    """Return the key that this run knows the same documents by, if it began before FORMAT did.

    Its checkpoint, hidden states and own answers are named by it. Keys then had a hash of our code.
    """
    out = Path(config.run_dir)
    noted = read_json(out / "data.json", {}) if config.run_dir else {}
    if "key" not in noted or "format" in noted or noted["sources"] != summary["sources"]:
        return None
    known = set(read_json(out / "run.json", {}).get("data", {}).values())
    files = [path for source in sources for path in source.reading.paths]
    return noted["key"] if {sha256_file(path) for path in files} == known else None


def _is_whole(path: Path) -> bool:
    if not (path / _SUMMARY).is_file():
        return False
    try:
        open_documents(path / _DOCUMENTS)
    except (OSError, pa.ArrowInvalid):  # damaged since: to be built again
        return False
    return True


def _publish(
    path: Path,
    key: str,
    sources: list[Source],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> None:
    for unfinished in path.parent.glob(f".{key}.partial-*"):  # left by a killed process
        shutil.rmtree(unfinished)
    with publish(path) as partial:
        partial.mkdir()
        summary = _build(partial, sources, config, tokenizer, max_length)
        write_json(partial / _SUMMARY, {"key": key, "format": FORMAT, **summary})


def _key(sources: list[Source], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Name all that decides what the documents are: text, template, tokenizer, limits, format."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    data = [source.identity() for source in sources]
    return content_key(data, describe(tokenizer), max_length, versions, FORMAT)


def _build(
    directory: Path,
    sources: list[Source],
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    """Write the documents and return the summary."""
    total = sum(1 for _ in walk(sources))  # reading is far faster than what follows
    workers = config.dataset.num_workers or _num_cores()
    tally = write_documents(
        directory / _DOCUMENTS,
        walk(sources),
        total,
        tokenizer,
        max_length=max_length,
        num_workers=workers,
        strict=config.dataset.strict,
    )
    found = {source.name: _outcomes(source, tally) for source in sources}
    if not any(outcomes["documents"] for outcomes in found.values()):
        raise nothing_to_train_on(found, tally.examples)
    return {"sources": found, "examples": tally.examples, "notes": sorted(tally.notes)}


def _num_cores() -> int:
    """Count the cores that this process may use: in a container, fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _outcomes(source: Source, tally: Tally) -> dict[str, Any]:
    """Return what became of a source's records: kept and dropped add up to all of them."""
    outcomes = counts(source)
    number = {what: n for (name, what), n in tally.counts.items() if name == source.name}
    dropped = {reason: number[reason] for reason in (REFUSED, UNTRAINED) if number.get(reason)}
    outcomes["dropped"].update(dropped)
    for what in (KEPT, "documents", "tokens", "trained tokens", CUT, LOST_ROWS, LOST_TOKENS):
        outcomes[what] = number.get(what, 0)
    return outcomes


def nothing_to_train_on(found: dict[str, dict[str, Any]], examples: dict[str, str]) -> DataError:
    """Return the error of a data set without a trained token."""
    whys = [
        f"{name}: {outcomes['records']} records; "
        + "; ".join(f"{reason}: {n}" for reason, n in outcomes["dropped"].items())
        for name, outcomes in found.items()
    ]
    example = "".join(f" For example, {what}: {error}." for what, error in examples.items())
    return DataError(
        f"no token of the data set is an assistant's ({', '.join(whys)}): nothing to train on."
        + example
    )
