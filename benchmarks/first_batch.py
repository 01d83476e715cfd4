"""In a fresh process: from the config to the first training batch, timed; JSON on stdout.

`python -X importtime benchmarks/first_batch.py DATA TOKENIZER CACHE MAX_LENGTH BATCHING`. What this
file imports is not counted. Libraries import more when they are first used: what Python says on
stderr between the two marks is how long that took.
"""

import json
import sys
import time
from types import SimpleNamespace

from transformers import AutoTokenizer

from medusa_exp.config import DatasetConfig, TrainConfig
from medusa_exp.data.datamodule import Batches
from medusa_exp.data.sources import open_sources
from medusa_exp.data.tokenized import Tokenized, load_tokenized

MARK = "-- timed from here to here --"


def open_examples(data: str, tokenizer: str, cache: str, max_length: int) -> Tokenized:
    """Tokenise the file, or open what an earlier start has left in the cache."""
    dataset = DatasetConfig(path=data, max_length=max_length)
    return load_tokenized(
        open_sources(dataset, cache),
        dataset,
        AutoTokenizer.from_pretrained(tokenizer),
        max_length,
        cache_dir=cache,
    )


def plan(documents: Tokenized, batching: str) -> Batches:
    """Set up one pass over the training documents, with the batches that training has."""
    batches = Batches(
        documents.split("train"),
        None,
        batching=batching,
        batch_tokens=max(TrainConfig().batch_tokens, documents.max_length),
        row_tokens=documents.max_length,
        seed=0,
    )
    batches.trainer = SimpleNamespace(
        global_step=0, max_steps=batches.batches_per_epoch(), global_rank=0, world_size=1
    )
    return batches


def _main(data: str, tokenizer: str, cache: str, max_length: str, batching: str) -> None:
    print(MARK, file=sys.stderr)
    start = time.perf_counter()
    documents = open_examples(data, tokenizer, cache, int(max_length))
    opened = time.perf_counter()
    batch = next(iter(plan(documents, batching).train_dataloader()))
    stop = time.perf_counter()
    print(MARK, file=sys.stderr)
    found = {
        "seconds": stop - start,
        "seconds to open": opened - start,
        "was cached": not documents.is_new,
        "batch": list(batch.input_ids_BT.shape),
        "key": documents.summary["key"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
