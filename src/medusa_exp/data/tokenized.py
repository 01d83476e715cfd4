"""The data set as token ids: a cache entry, opened, or made by several processes.

An entry is a directory of `documents`, the examples of all splits (a conversation each, or one of
its turns), and `summary.json`, which counts what became of every raw chat. Rendering and tokenizing
run in several processes where there is enough to do; the order of the examples is that of the
conversations, whatever the number of processes.
"""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import DatasetConfig
from medusa_exp.data.examples import Examples, Row, Table, Writer, open_examples
from medusa_exp.data.faults import DataError
from medusa_exp.data.masking import NO_REASONING, NO_TOOLS
from medusa_exp.data.messages import Conversation
from medusa_exp.data.rendering import Renderer
from medusa_exp.data.sources import Source, counts, empty_split, files_of, split_of, walk
from medusa_exp.data.template import REFUSED, describe
from medusa_exp.errors import UserError
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import content_key, read_json, sha256_file, write_json
from medusa_exp.runs.machine import usable_cores
from medusa_exp.runs.progress import ProgressBar
from medusa_exp.runs.schemas import DataSummary

log = logging.getLogger(__name__)

FORMAT = 7
"""Raise it when the same chats, tokenizer and template give other examples, or other files of them:
caches are then built anew. (tests/golden/renderings.json tells of most such changes.)"""
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "msgspec")
"""Whose versions may change what is read, rendered or tokenized."""
_EXAMPLES, _SUMMARY = "documents", "summary.json"
_CHUNK = 256
"""Conversations that are rendered, tokenized and written together."""
_SERIAL_CHUNKS = 12
"""With fewer chunks than these, starting processes takes longer than the work."""

# Names of outcomes, as summary.json and messages have them.
KEPT = "kept records"
UNTRAINED = "no assistant token left"
TOO_SHORT = "cut before the first reply"
"""Of those without an assistant's token: what the others lack has another cause."""
CUT = "cut to the length limit"
LOST_ROWS = "assistant turns beyond the length limit"
"""Counted where a template makes an example of every assistant turn."""
LOST_TOKENS = "trained tokens beyond the length limit"
"""Counted in the examples that are kept; of texts far longer than the limit, up to a place behind
it: all that lies beyond is not looked at."""
LEFT_OUT = (NO_REASONING, NO_TOOLS)
"""Records that are kept without them."""

Sourced = tuple[str, Conversation]
"""A conversation and the name of its source."""
Result = tuple[int, Table, "Tally"]
"""What a process returns of a chunk: number of conversations, their examples, their fates."""
Work = Callable[[list[Sourced]], Result]


@dataclass
class Tally:
    """What became of conversations, by source and by name of the outcome."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(source, outcome) -> number."""
    examples: dict[str, str] = field(default_factory=dict)
    """Outcome -> the first conversation's error."""
    notes: set[str] = field(default_factory=set)
    """What was found out about the template."""
    too_short: dict[str, list[int]] = field(default_factory=dict)
    """Source -> number of conversations that were cut before their first reply, and the fewest
    tokens that one of them needs."""

    def add_too_short(self, source: str, number: int, needed: int) -> None:
        """Count conversations that were cut before their first reply."""
        counted, fewest = self.too_short.get(source, (0, needed))
        self.too_short[source] = [counted + number, min(fewest, needed)]

    def add(self, other: "Tally") -> None:
        """Add the numbers of a later part."""
        self.counts += other.counts
        self.examples = {**other.examples, **self.examples}
        self.notes |= other.notes
        for source, (number, needed) in other.too_short.items():
            self.add_too_short(source, number, needed)


@dataclass(frozen=True)
class Tokenized:
    """Examples of all splits, and what became of every raw chat."""

    dataset: DatasetConfig
    table: Table
    summary: dict[str, Any]
    """`key`, `sources` {name: {outcome: number}}, `examples` {outcome: the first such error} and
    `notes` on the template."""
    max_length: int
    is_new: bool
    """Was it built by this call?"""

    def all(self) -> Examples:
        """Return the examples of all splits."""
        return Examples(self.table)

    def split(self, name: str) -> Examples:
        """Return the examples of train, val or test; those of train with their sources' weights.

        Raises:
            DataError: there is none.
        """
        if not len(rows := self.rows(name)):
            ids = {*self.table.strings("conversation_id")}
            raise empty_split(name, self.summary["sources"], ids, self.dataset)
        return select(self.table, rows, self.dataset, name)

    def rows(self, name: str) -> np.ndarray:
        """Return the numbers of the examples of train, val or test."""
        return rows_of_split(self.table, self.dataset, name)

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
                log.warning(
                    "data: %s: %d chats were longer than %d tokens (dataset.max_length, or the "
                    "model's limit), and were cut",
                    name,
                    outcomes[CUT],
                    self.max_length,
                )
            for what in (LOST_ROWS, LOST_TOKENS):
                if outcomes[what]:
                    log.warning("data: %s: %s: %d", name, what, outcomes[what])
        for outcome, example in self.summary["examples"].items():
            log.warning("data: for example, %s: %s", outcome, example)
        for note in [] if self.is_new else self.summary["notes"]:  # building has logged them
            log.warning("data: %s", note)


def rows_of_split(table: Table, dataset: DatasetConfig, name: str) -> np.ndarray:
    """Return the numbers of a table's examples that belong to train, val or test."""
    ids = table.strings("conversation_id")
    return np.flatnonzero([split_of(i, dataset) == name for i in ids])


def select(table: Table, rows: np.ndarray, dataset: DatasetConfig, split: str) -> Examples:
    """Return examples of a table; those of train with the weights of their sources."""
    if split != "train" or not dataset.sources:
        return Examples(table, rows)
    names = table.strings("source", rows)
    return Examples(table, rows, np.array([dataset.sources[name].weight for name in names]))


def load_tokenized(
    sources: list[Source],
    dataset: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    cache_dir: str | Path,
    run_dir: Path | None = None,
    known_data: Collection[str] = (),
) -> Tokenized:
    """Open the data set's cache entry, which is built first if it is not there.

    Examples are cut to `max_length` whole tokens, on the tokenizer's truncation side. `dataset`
    says how they are split, weighed and worked through; the run in `run_dir` may have begun with
    the same examples under an older key, if `known_data`, the hashes of the files that it has read
    so far, has those of all sources.

    Raises:
        DataError: naming the file, or why not one token of the data set can be trained on.
        UserError: the entry cannot be written.
    """
    key = _key(sources, tokenizer, max_length)
    try:
        with entry(cache_dir, "tokenised", key, _is_whole) as (path, unwritten):
            if unwritten:
                unwritten.mkdir()
                summary = _build(unwritten, sources, dataset, tokenizer, max_length)
                write_json(unwritten / _SUMMARY, {"key": key, "format": FORMAT, **summary})
    except OSError as error:
        raise UserError(
            f"the tokenised data could not be written under cache_dir={cache_dir}: "
            f"{error.strerror or error}."
        ) from error
    summary = read_json(path / _SUMMARY, kind=DataSummary)
    if (older := _key_before(run_dir, known_data, sources, summary)) is not None:
        summary["key"] = older
        del summary["format"]
    return Tokenized(dataset, open_examples(path / _EXAMPLES), summary, max_length, bool(unwritten))


def _key_before(
    run_dir: Path | None,
    known_data: Collection[str],
    sources: list[Source],
    summary: dict[str, Any],
) -> str | None:
    """Return the key that this run knows the same examples by, if it began with an older FORMAT.

    Its checkpoint, hidden states and regenerated responses are named by it. The oldest have none;
    keys then had a hash of our code.
    """
    if run_dir is None:
        return None
    noted = read_json(run_dir / "data.json", {})
    if "key" not in noted or noted.get("format") == FORMAT:
        return None
    if _comparable(noted["sources"]) != _comparable(summary["sources"]):
        return None
    found = {sha256_file(path) for path in files_of(sources)}
    return noted["key"] if found <= set(known_data) else None


def _comparable(outcomes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the numbers of sources without the one that was once counted to the end of texts."""
    return {
        name: {what: number for what, number in found.items() if what != LOST_TOKENS}
        for name, found in outcomes.items()
    }


def _is_whole(path: Path) -> bool:
    """Is all there that is read, where a seal may be gone with it: folders outlive their files."""
    try:
        open_examples(path / _EXAMPLES)
        return read_json(path / _SUMMARY, kind=DataSummary) is not None
    except UserError:
        return False


def _key(sources: list[Source], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Name all that decides what the examples are: text, template, tokenizer, limits, format."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    data = [source.identity() for source in sources]
    return content_key(data, describe(tokenizer), max_length, versions, FORMAT)


def _build(
    directory: Path,
    sources: list[Source],
    dataset: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    """Write the examples and return the summary."""
    tally = _write_examples(
        directory / _EXAMPLES, sources, dataset, Renderer(tokenizer, max_length)
    )
    found = {source.name: _outcomes(source, tally) for source in sources}
    examples = dict(tally.examples)
    for source in sources:
        examples = {**source.reading.examples, **examples}
    if not any(outcomes["documents"] for outcomes in found.values()):
        raise _nothing_to_train_on(found, examples, tally.too_short, max_length)
    return {"sources": found, "examples": examples, "notes": sorted(tally.notes)}


def _outcomes(source: Source, tally: Tally) -> dict[str, Any]:
    """Return what became of a source's raw chats: kept and dropped add up to all of them."""
    outcomes = counts(source)
    number = {what: n for (name, what), n in tally.counts.items() if name == source.name}
    dropped = {reason: number[reason] for reason in (REFUSED, UNTRAINED) if number.get(reason)}
    outcomes["dropped"].update(dropped)
    outcomes.update({what: number[what] for what in LEFT_OUT if number.get(what)})
    for what in (KEPT, "documents", "tokens", "trained tokens", CUT, LOST_ROWS, LOST_TOKENS):
        outcomes[what] = number.get(what, 0)
    return outcomes


def _nothing_to_train_on(
    found: dict[str, dict[str, Any]],
    examples: dict[str, str],
    too_short: dict[str, list[int]],
    max_length: int,
) -> DataError:
    """Return the error of a data set without a trained token."""
    whys = []
    for name, outcomes in found.items():
        number, needed = too_short.get(name, (0, 0))
        dropped = {**outcomes["dropped"]}
        dropped[UNTRAINED] = dropped.get(UNTRAINED, 0) - number
        reasons = [f"{reason}: {n}" for reason, n in dropped.items() if n]
        if number:
            reasons.append(
                f"{number} of {outcomes['records']} were cut before the first reply, at "
                f"{max_length} tokens, and the shortest needs {needed}"
            )
        whys.append("; ".join([f"{name}: {outcomes['records']} records", *reasons]))
    example = "".join(f" For example, {what}: {error}." for what, error in examples.items())
    advice = ""
    if too_short:
        advice = " Raise dataset.max_length, or shorten what the chat template puts first."
    return DataError(
        f"no token of the data set is an assistant's ({', '.join(whys)}): nothing to train on."
        + advice
        + example
    )


def _write_examples(
    path: Path, sources: list[Source], dataset: DatasetConfig, renderer: Renderer
) -> Tally:
    """Render, tokenize, cut and write; what cannot be used is counted.

    Raises:
        DataError: with dataset.strict, the first conversation that the template refuses.
    """
    tally = Tally()
    total = sum(1 for _ in walk(sources))  # reading is far faster than what follows
    conversations = walk(sources)
    chunks = iter(lambda: list(islice(conversations, _CHUNK)), [])
    work = partial(_tokenize, renderer, dataset.strict)
    bar = ProgressBar("tokenizing conversations", total)
    workers = dataset.num_workers or usable_cores()
    with Writer(path) as file, bar:
        for num_conversations, examples, part in _in_order(work, chunks, workers):
            file.write(examples)
            tally.add(part)
            for note in part.notes:  # a worker's log is not seen
                renderer.template.note(note)
            bar.advance(num_conversations)
    return tally


def _tokenize(renderer: Renderer, strict: bool, chunk: list[Sourced]) -> Result:
    """Render and tokenize a chunk: the work of one process."""
    tally = Tally()
    kept: list[Row] = []
    results = renderer.render_many(conversation for _, conversation in chunk)
    for (source, conversation), rows in zip(chunk, results, strict=True):
        if isinstance(rows, DataError):
            if strict:
                raise rows
            tally.counts[source, REFUSED] += 1
            tally.examples.setdefault(REFUSED, str(rows))
            continue
        usable = [row for row in rows if any(row.is_trained)]
        for what in frozenset[str]().union(*(row.left_out for row in usable)):
            tally.counts[source, what] += 1
        tally.counts[source, KEPT if usable else UNTRAINED] += 1
        if usable:
            tally.counts[source, LOST_ROWS] += len(rows) - len(usable)
            tally.counts[source, LOST_TOKENS] += sum(row.num_cut_off for row in usable)
        else:
            what = conversation.described()
            if needed := max((row.num_needed for row in rows), default=0):
                tally.add_too_short(source, 1, needed)
                what += f" needs {needed} tokens"
            tally.examples.setdefault(TOO_SHORT if needed else UNTRAINED, what)
        tally.counts[source, CUT] += sum(row.is_cut for row in usable)
        tally.counts[source, "documents"] += len(usable)
        for row in usable:
            ids, mask = np.array(row.input_ids, np.int32), np.array(row.is_trained, bool)
            tally.counts[source, "tokens"] += len(ids)
            tally.counts[source, "trained tokens"] += int(mask.sum())
            kept.append((ids, mask, conversation.id, source))
    tally.notes |= renderer.template.notes
    return len(chunk), Table.of(kept), tally


def _in_order(work: Work, chunks: Iterator[list[Sourced]], num_workers: int) -> Iterator[Result]:
    """Yield the result of every chunk in order, while few chunks are held in memory."""
    first = list(islice(chunks, _SERIAL_CHUNKS))
    chunks = chain(first, chunks)
    if num_workers < 2 or len(first) < _SERIAL_CHUNKS:
        yield from map(work, chunks)
        return
    # spawn: a forked copy of a process with torch's and the tokenizer's threads may hang.
    context, start = get_context("spawn"), (work, os.getpid())
    try:
        with ProcessPoolExecutor(num_workers, context, _start_worker, start) as pool:
            running = deque(
                pool.submit(_run_worker, chunk) for chunk in islice(chunks, 2 * num_workers)
            )
            for chunk in chunks:
                yield running.popleft().result()
                running.append(pool.submit(_run_worker, chunk))
            while running:
                yield running.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenised conversations ended early: killed (for want of memory? "
            "lower dataset.num_workers) or could not start (a script needs `if __name__ == "
            "'__main__':`; dataset.num_workers=1 needs no processes)."
        ) from error


_work: Work | None = None
"""In a worker process: what it does. Sent once, for a tokenizer is large."""


def _start_worker(work: Work, parent: int) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    logging.disable()  # notes go back with the results; the parent logs them once
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _end_with(parent: int) -> None:
    """A killed parent cannot say that there is no more to do."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _run_worker(chunk: list[Sourced]) -> Result:
    assert _work is not None
    return _work(chunk)
