"""How fast chats are read, masked, found in the cache, and how full packed batches are.

    python benchmarks/data.py [--only read,mask,cache,packing] [--tokenizer DIR] [--out FILE]

Data is generated, 68,000 records in the size and shape of ShareGPT, and kept in a temporary folder
beside its tokenised form: about 0.8 GB. The first run takes some minutes, nearly all of them for
tokenising; --conversations 2000 is for trying. Set OMP_NUM_THREADS=1 on a machine that others use.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # figures are of one core; building has processes

from first_batch import MARK, open_examples, plan
from masks import mask_rows
from measuring import Row, best_seconds, machine, show, write
from rivals.references import read_with_tasks
from rivals.vicuna_like import train_tokenizer
from sharegpt_like import ODD, sharegpt_like, usable_conversations

from medusa_exp.data import read_conversations
from medusa_exp.data.tokenized import Tokenized

_REPEATS = 3
_LEARNT = 2000
"""Conversations that the default tokenizer is trained on."""


@dataclass
class Inputs:
    """What all measurements are made on."""

    data: Path
    tokenizer: Path
    work: Path
    max_length: int


def read_rows(inputs: Inputs) -> list[Row]:
    """Read the file to its end, every record checked."""
    size = inputs.data.stat().st_size / 1e6
    num_same = _check_reading(inputs.data)
    ours, kept_all, reference = best_seconds(
        _REPEATS,
        lambda: _walk(inputs.data),
        lambda: list(read_conversations(inputs.data)),
        lambda: read_with_tasks(inputs.data),
    )
    reading = read_conversations(inputs.data)
    kept = sum(1 for _ in reading)
    details = {
        "MB": size,
        "seconds": ours,
        "seconds if all are kept in memory, as the reference does": kept_all,
        "records": reading.num_records,
        "kept": kept,
        "dropped": dict(reading.dropped),
        "word for word as the reference has them": num_same,
    }
    speed, reference_speed, ratio = size / ours, size / reference, reference / ours
    return [
        Row("read", "MB/s", speed, ">= 4x", ratio >= 4, reference_speed, ratio, details),
        Row("read 400 MB", "s", 400 / speed, "about 1 s", 400 / speed < 1.3, 400 / reference_speed),
    ]


def _walk(path: Path) -> int:
    return sum(len(conversation.messages) for conversation in read_conversations(path))


def _check_reading(path: Path) -> int:
    """Compare all usable conversations of both readers, word by word."""
    number = 0
    theirs = ((name, chat) for name, chat in read_with_tasks(path) if not name.startswith(ODD))
    for ours, (name, chat) in zip(usable_conversations(path), theirs, strict=True):
        mine = [{"role": message.role, "content": message.content} for message in ours.messages]
        assert (ours.id, mine) == (name, chat), f"{name} is read differently"
        number += 1
    return number


def cache_rows(inputs: Inputs) -> list[Row]:
    """Start a second time, in fresh processes, on data that a first start has tokenised."""
    first = _build(inputs)
    rows = []
    for batching in ("padded", "packed"):
        starts = [_start(inputs, batching) for _ in range(_REPEATS)]
        if not all(start["was cached"] and start["key"] == first["key"] for start in starts):
            raise SystemExit("medusa_exp changed while it was measured: start again.")
        seconds = [start["seconds"] - start["seconds of imports"] for start in starts]
        details = {**first, **starts[0], "seconds of each": [round(taken, 3) for taken in seconds]}
        best = min(seconds)
        rows.append(Row(f"second start, {batching}", "s", best, "< 1 s", best < 1, details=details))
    return rows


def _build(inputs: Inputs) -> dict[str, Any]:
    start = time.perf_counter()
    documents = _documents(inputs)
    seconds = time.perf_counter() - start
    [outcomes] = documents.summary["sources"].values()
    return {
        "key": documents.summary["key"],
        "seconds of the first start": seconds if documents.is_new else "(cached before)",
        "documents": outcomes["documents"],
        "tokens": outcomes["tokens"],
    }


def _start(inputs: Inputs, batching: str) -> dict[str, Any]:
    script = Path(__file__).with_name("first_batch.py")
    call = [sys.executable, "-X", "importtime", script, *_places(inputs), str(inputs.max_length)]
    done = subprocess.run([*call, batching], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    _, timed, _ = done.stderr.split(MARK)
    lines = (line.split(":")[1].split("|") for line in timed.splitlines() if "import time:" in line)
    microseconds = sum(int(own) for own, *_ in lines)
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds of imports": microseconds / 1e6}


def packing_rows(inputs: Inputs) -> list[Row]:
    """Walk through one pass of training batches and count padding."""
    documents = _documents(inputs)
    packed, padded = _pass(documents, "packed"), _pass(documents, "padded")
    lengths = documents.split("train").lengths
    assert packed["tokens"] == padded["tokens"] == int(lengths.sum())
    share = 100 * packed.pop("padding share")
    unsorted = 100 * (1 - lengths.mean() / documents.max_length)
    details = {
        **packed,
        "length limit": documents.max_length,
        "documents": len(lengths),
        "padding with batching=padded, %": 100 * padded["padding share"],
        "the reference": "each document a row of the length limit",
    }
    ratio = unsorted / share
    return [Row("packing, padding", "%", share, "<= 3 %", share <= 3, unsorted, ratio, details)]


def _pass(documents: Tokenized, batching: str) -> dict[str, Any]:
    tokens = places = batches = 0
    start = time.perf_counter()
    for batch in plan(documents, batching).train_dataloader():
        tokens += int((batch.example_BT > 0).sum())
        places += batch.example_BT.numel()
        batches += 1
    seconds = time.perf_counter() - start
    return {
        "tokens": tokens,
        "padding share": 1 - tokens / places,
        "batches": batches,
        "seconds": seconds,
    }


def _documents(inputs: Inputs) -> Tokenized:
    return open_examples(*_places(inputs), inputs.max_length)


def _places(inputs: Inputs) -> list[str]:
    return [str(inputs.data), str(inputs.tokenizer), str(inputs.work / "cache")]


def _default_tokenizer(data: Path) -> Path:
    """Return the directory of a tokenizer trained on the data, and train it if need be."""
    directory = data.with_suffix(".tokenizer")
    if not (directory / "tokenizer.json").is_file():
        train_tokenizer(islice(usable_conversations(data), _LEARNT)).save_pretrained(directory)
    return directory


_MEASUREMENTS: dict[str, Callable[[Inputs], list[Row]]] = {
    "read": read_rows,
    "mask": lambda inputs: mask_rows(inputs.data, inputs.tokenizer, _REPEATS),
    "cache": cache_rows,
    "packing": packing_rows,
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How fast is the data side?")
    parser.add_argument("--conversations", type=int, default=68_000, help="records to generate")
    parser.add_argument("--tokenizer", type=Path, help="directory; default: one trained here")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of a document")
    parser.add_argument("--only", default=",".join(_MEASUREMENTS), help="what to measure")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    place = Path(tempfile.gettempdir()) / "medusa-exp-benchmarks"
    parser.add_argument("--work", type=Path, default=place, help="folder for data and cache")
    arguments = parser.parse_args()
    arguments.only = arguments.only.split(",")
    if unknown := set(arguments.only) - set(_MEASUREMENTS):
        parser.error(f"--only {','.join(unknown)}: choose from {','.join(_MEASUREMENTS)}")
    return arguments


def main() -> None:
    """Measure, show, and write what was asked for."""
    arguments = _arguments()
    data = sharegpt_like(arguments.work, arguments.conversations)
    tokenizer = arguments.tokenizer or _default_tokenizer(data)
    inputs = Inputs(data, tokenizer, arguments.work, arguments.max_length)
    found = machine()
    rows = [row for name in arguments.only for row in _MEASUREMENTS[name](inputs)]
    show(rows, found)
    if arguments.out:
        write(arguments.out, rows, found)


if __name__ == "__main__":
    main()
