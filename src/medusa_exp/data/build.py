"""Conversations in; the Arrow file of their documents, and counts of what became of them, out.

Rendering and tokenising run in several processes where there is enough to do; the order of the file
is the order of the conversations, whatever their number.
"""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.conversations import Conversation, DataError
from medusa_exp.data.examples import SCHEMA
from medusa_exp.data.masking import Renderer
from medusa_exp.runs.progress import progress_bar

_CHUNK = 256
"""Conversations that are rendered, tokenised and written together."""
_SERIAL_CHUNKS = 12
"""With fewer chunks than these, starting processes takes longer than the work."""

KEPT = "kept records"
REFUSED = "refused by the chat template"
UNTRAINED = "no assistant token left"
CUT = "cut to the length limit"
LOST_ROWS = "assistant turns beyond the length limit"
"""Of kept records in which every assistant turn is a row."""
LOST_TOKENS = "trained tokens beyond the length limit"
"""Of rows that are kept."""

Sourced = tuple[str, Conversation]
"""A conversation and the name of its source."""
Result = tuple[int, pa.RecordBatch, "Tally"]
"""Of a chunk: how many conversations it had, their documents, and what became of them."""
Document = tuple[np.ndarray, np.ndarray, str, str]
"""A row of the file: input_ids, is_trained, conversation_id, source."""


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

    def add(self, other: "Tally") -> None:
        """Add the numbers of a later part."""
        self.counts += other.counts
        self.examples = {**other.examples, **self.examples}
        self.notes |= other.notes


def write_documents(
    path: Path,
    conversations: Iterator[Sourced],
    total: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    num_workers: int,
    strict: bool = False,
) -> Tally:
    """Render, tokenise, cut and write; what cannot be used is counted.

    Documents are cut to `max_length` whole tokens, on the tokenizer's truncation side.

    Raises:
        DataError: with `strict`, the first conversation that the template refuses.
    """
    tally = Tally()
    renderer = Renderer(tokenizer, max_length)
    chunks = iter(lambda: list(islice(conversations, _CHUNK)), [])
    work = partial(_documents, renderer, strict)
    with pa.ipc.new_file(str(path), SCHEMA) as file, progress_bar() as bar:
        task = bar.add_task("tokenising conversations", total=total)
        for num_conversations, documents, part in _in_order(work, chunks, num_workers):
            file.write_batch(documents)
            tally.add(part)
            for note in part.notes:  # a worker's log is not seen
                renderer.template.note(note)
            bar.advance(task, num_conversations)
    return tally


def _documents(renderer: Renderer, strict: bool, chunk: list[Sourced]) -> Result:
    """Tokenise a chunk: the work of one process."""
    tally = Tally()
    kept: list[Document] = []
    results = renderer.render_many(conversation for _, conversation in chunk)
    for (source, conversation), rows in zip(chunk, results, strict=True):
        if isinstance(rows, DataError):
            if strict:
                raise rows
            tally.counts[source, REFUSED] += 1
            tally.examples.setdefault(REFUSED, str(rows))
            continue
        usable = [row for row in rows if any(row.is_trained)]
        tally.counts[source, KEPT if usable else UNTRAINED] += 1
        if usable:
            tally.counts[source, LOST_ROWS] += len(rows) - len(usable)
            tally.counts[source, LOST_TOKENS] += sum(row.num_cut_off for row in usable)
        else:
            tally.examples.setdefault(UNTRAINED, f"conversation {conversation.id}")
        tally.counts[source, CUT] += sum(row.is_cut for row in usable)
        tally.counts[source, "documents"] += len(usable)
        for row in usable:
            ids, mask = np.array(row.input_ids, np.int32), np.array(row.is_trained, np.uint8)
            tally.counts[source, "tokens"] += len(ids)
            tally.counts[source, "trained tokens"] += int(mask.sum())
            kept.append((ids, mask, conversation.id, source))
    tally.notes |= renderer.template.notes
    return len(chunk), _record_batch(kept), tally


def _record_batch(documents: list[Document]) -> pa.RecordBatch:
    ids, masks, conversation_ids, sources = zip(*documents, strict=True) if documents else [()] * 4
    columns = [
        _ragged(ids, pa.int32()),
        _ragged(masks, pa.uint8()),
        pa.array(conversation_ids, pa.string()),
        pa.array(sources, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _ragged(arrays: Sequence[np.ndarray], dtype: pa.DataType) -> pa.LargeListArray:
    offsets = np.cumsum([0, *map(len, arrays)])
    values = np.concatenate(arrays) if len(arrays) else np.zeros(0)
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, dtype))


def _in_order(work: Work, chunks: Iterator[list[Sourced]], num_workers: int) -> Iterator[Result]:
    """Yield the result of every chunk in order, while few chunks are held in memory."""
    first = list(islice(chunks, _SERIAL_CHUNKS))
    chunks = chain(first, chunks)
    if num_workers < 2 or len(first) < _SERIAL_CHUNKS:
        yield from map(work, chunks)
        return
    # spawn: a forked copy of a process with torch's and the tokenizer's threads may hang.
    context = get_context("spawn")
    start = (work, os.getpid())
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
