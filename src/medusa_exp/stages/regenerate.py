"""Stage regenerate: training documents and backbone in; the same prompts with its own answers out.

Heads are to guess what the backbone says. Where a text takes turns that the backbone would not
take, they learn from states that decoding never visits; in its own answers there are none.

What stands between two of the assistant's turns stays as it is, token for token: nothing is
rendered or tokenised again. Answers lie in the cache, under a hash of all that decides them.

Documents on their way: a batch of them in, answered turn by turn by the backbone, out.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config, from_dict, to_dict
from medusa_exp.data.examples import SCHEMA, Example
from medusa_exp.data.tokenized import Tokenized
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.loop import Limits, Response, decode_plain, decode_tree
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.settings import limits_of
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.model.loading import pick_device
from medusa_exp.runs.files import drop_torn_line, publish, read_json, read_jsonl, write_json
from medusa_exp.runs.progress import progress_bar
from medusa_exp.stages.session import Session
from medusa_exp.train.failures import explain_memory
from medusa_exp.train.launch import Work, map_on_ray
from medusa_exp.train.regenerated import (
    DOCUMENTS,
    SUMMARY,
    regenerated_key,
    regenerated_path,
    regeneration_rule,
)
from medusa_exp.train.trainer import AUTOCAST, pick_precision
from medusa_exp.tree import Tree

Decode = Callable[[list[list[int]], Limits, AcceptanceRule], list[Response]]


@dataclass
class Document:
    """A conversation on its way: the backbone's answers so far, between the data's other turns."""

    row: int
    """Number in the table of tokenised documents."""
    contexts: list[list[int]]
    """What stands before each assistant turn, from the end of the turn before."""
    tokens: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    """Where the answers begin and end in `tokens`."""
    outcome: str = "whole"
    """Or why later turns are missing: `unfinished` or `no room`."""


def document_of(row: int, example: Example) -> Document:
    """Take a document's turns apart: what is trained is to be answered anew, the rest stays."""
    edges = np.flatnonzero(np.diff(example.is_trained.astype(np.int8), prepend=0, append=0))
    starts, stops = edges[::2].tolist(), edges[1::2].tolist()
    ids = example.input_ids.tolist()
    return Document(row, [ids[a:b] for a, b in zip([0, *stops], starts, strict=False)])


def answer(
    batch: list[Document],
    decode: Decode,
    limits: Limits,
    rule: AcceptanceRule,
    max_length: int,
    backbone: Backbone,
) -> None:
    """Let the backbone answer each turn of some documents, one turn of all of them after another.

    A document ends early with an answer that finds no end within the limit, or before one that
    would not fit into `max_length` tokens.
    """
    for turn in range(max(len(document.contexts) for document in batch)):
        asked = list(_next_turn(batch, turn, limits.max_new_tokens, max_length, backbone))
        if not asked:
            break
        for document, decoded in zip(
            asked, decode([document.tokens for document in asked], limits, rule), strict=True
        ):
            start = len(document.tokens)
            document.tokens += decoded.tokens
            document.answers.append((start, len(document.tokens)))
            if len(decoded.tokens) == limits.max_new_tokens and (
                decoded.tokens[-1] not in limits.stop_ids
            ):
                document.outcome = "unfinished"


def _next_turn(
    batch: list[Document], turn: int, new_tokens: int, max_length: int, backbone: Backbone
) -> Iterator[Document]:
    """Yield the documents that have such a turn and room for it, their next context appended."""
    for document in batch:
        if document.outcome != "whole" or turn >= len(document.contexts):
            continue
        length = len(document.tokens) + len(document.contexts[turn])
        if length + new_tokens > min(max_length, backbone.max_length_from(length)):
            document.outcome = "no room"
            continue
        document.tokens += document.contexts[turn]
        yield document


log = logging.getLogger(__name__)

RECORD = "regenerated.json"
"""Of a run directory: what its stage regenerate has made or found."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Answer the prompts of the training documents, unless that has been done before."""
    session = session or Session(config, out)
    backbone = session.backbone(is_adapted=False)
    if config.regenerate.use_heads:
        check_tree_attention(backbone)
    tokenizer = session.tokenizer()
    documents = session.tokenized(tokenizer, min(config.dataset.max_length, backbone.max_length))
    documents.log()
    key = regenerated_key(config, documents, backbone, tokenizer)
    path = regenerated_path(config, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    advice = (
        f"lower regenerate.batch_size (now {config.regenerate.batch_size}) or "
        "regenerate.max_new_tokens; the same command goes on where it stopped"
    )
    with FileLock(path.with_name(f".{key}.lock")), explain_memory(advice):
        if not (path / SUMMARY).is_file():
            _regenerate(config, out, path, documents, backbone, tokenizer)
        else:
            log.info("the backbone's own answers are in the cache: %s", path)
    summary = read_json(path / SUMMARY)
    write_json(out / RECORD, {"key": key, **summary})
    log.info(
        "%d documents, %d answers of %d tokens; not finished within %d tokens: %d; no room: %d",
        *(summary[name] for name in ("documents", "answers", "tokens")),
        config.regenerate.max_new_tokens,
        *(len(summary[name]) for name in ("unfinished", "no_room")),
    )
    return {f"regenerate/{name}": summary[name] for name in ("documents", "answers", "tokens")}


def _regenerate(
    config: Config,
    out: Path,
    path: Path,
    documents: Tokenized,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the documents with the backbone's own answers at `path`; go on where it was stopped."""
    examples, rows = documents.all(), _chosen(config, documents)
    log_path = path.with_name(f".{path.name}.answers.jsonl")
    drop_torn_line(log_path)
    done = {line["row"] for line in read_jsonl(log_path)}
    # Of about the same length, that is, with answers of about the same length, so that few rows of
    # a batch wait for the others; the longest first, which need most memory.
    ordered = sorted(set(rows) - done, key=lambda row: (-examples.lengths[row], row))
    todo = [document_of(row, examples[row]) for row in ordered]
    if done:
        log.info("%d of %d documents have their answers already", len(done), len(rows))
    size = config.regenerate.batch_size
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    if config.regenerate.workers:
        answered = _answered_on_ray(config, out, documents.max_length, batches)
    else:
        regenerator = Regenerator(config, out, documents.max_length, backbone, tokenizer)
        answered = map(regenerator, batches)
    with log_path.open("a", encoding="utf-8") as file, progress_bar() as bar:
        task = bar.add_task("regenerating answers", total=len(rows), completed=len(done))
        for batch in answered:
            file.write("".join(json.dumps(asdict(document)) + "\n" for document in batch))
            file.flush()
            os.fsync(file.fileno())
            bar.advance(task, len(batch))
    lines = sorted(read_jsonl(log_path), key=lambda line: line["row"])
    with publish(path) as partial:
        partial.mkdir()
        ids, sources = examples.strings("conversation_id"), examples.strings("source")
        _write(partial / DOCUMENTS, lines, ids, sources)
        write_json(partial / SUMMARY, _summary(lines, ids))
    log_path.unlink()


class Regenerator:
    """Answers batches of documents; each process that does has one, with a backbone of its own."""

    def __init__(
        self,
        config: Config,
        out: Path,
        max_length: int,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.config, self.max_length, self.backbone = config, max_length, backbone
        self.limits = replace(
            limits_of(config, backbone, tokenizer), max_new_tokens=config.regenerate.max_new_tokens
        )
        self.decode = _decoder(config, out, backbone)

    def __call__(self, batch: list[Document]) -> list[Document]:
        """Answer each turn of each document, and return them."""
        # A draw of its own for each batch, whatever was answered before.
        rule = replace(regeneration_rule(self.config), seed=self.config.seed + batch[0].row)
        answer(batch, self.decode, self.limits, rule, self.max_length, self.backbone)
        return batch


def _answered_on_ray(
    config: Config, out: Path, max_length: int, batches: list[list[Document]]
) -> Iterator[list[Document]]:
    """Yield the batches that workers of a Ray cluster have answered."""
    arguments = {"config": to_dict(config), "out": out.absolute(), "max_length": max_length}
    for line in map_on_ray(
        _regenerator_of_a_worker,
        arguments,
        [json.dumps([asdict(document) for document in batch]) for batch in batches],
        num_workers=config.regenerate.workers,
        use_gpu=pick_device(config.device).type == "cuda",
    ):
        yield [Document(**document) for document in json.loads(line)]


def _regenerator_of_a_worker(config: dict[str, Any], out: Path, max_length: int) -> Work:
    session = Session(from_dict(config), out)
    backbone, tokenizer = session.backbone(is_adapted=False), session.tokenizer()
    regenerator = Regenerator(session.config, out, max_length, backbone, tokenizer)

    def work(batch: str) -> str:
        documents = regenerator([Document(**document) for document in json.loads(batch)])
        return json.dumps([asdict(document) for document in documents])

    return work


def _chosen(config: Config, documents: Tokenized) -> list[int]:
    """Return the numbers of the documents to answer."""
    wanted = {
        "train": config.regenerate.num_documents,
        "val": config.regenerate.num_val_documents,
    }
    rng = np.random.default_rng(config.seed)
    chosen = [rng.permutation(documents.rows(split))[:n] for split, n in wanted.items()]
    return sorted(np.concatenate(chosen).tolist())


def _decoder(config: Config, out: Path, backbone: Backbone) -> Decode:
    """Return plain decoding, or decoding with the heads and the tree that the run already has."""
    backbone.decodes_statically = False  # its steps would not shrink as answers end
    dtype = AUTOCAST.get(pick_precision(config, backbone.device))
    if dtype and config.model.quantization is None:
        backbone.model.to(dtype)
    if not config.regenerate.use_heads:
        return lambda prompts, limits, rule: decode_plain(backbone, prompts, limits, rule)
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    tree = Tree.load(out / "tree.json")
    return lambda prompts, limits, rule: decode_tree(backbone, heads, tree, prompts, limits, rule)


def _write(path: Path, lines: list[dict[str, Any]], ids: list[str], sources: list[str]) -> None:
    """Write the documents that have an answer as an Arrow file."""
    lines = [line for line in lines if line["answers"]]
    if not lines:
        raise UserError(
            "stage regenerate: no training document leaves room for an answer: lower "
            "regenerate.max_new_tokens or raise dataset.max_length."
        )
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for line in lines:
        is_trained_T = np.zeros(len(line["tokens"]), np.uint8)
        for start, stop in line["answers"]:
            is_trained_T[start:stop] = 1
        columns["input_ids"].append(line["tokens"])
        columns["is_trained"].append(is_trained_T)
        columns["conversation_id"].append(ids[line["row"]])
        columns["source"].append(sources[line["row"]])
    with pa.ipc.new_file(str(path), SCHEMA) as file:
        file.write_table(pa.table(columns, schema=SCHEMA))


def _summary(lines: list[dict[str, Any]], ids: list[str]) -> dict[str, Any]:
    def ended(outcome: str) -> list[str]:
        return [ids[line["row"]] for line in lines if line["outcome"] == outcome]

    return {
        "documents": sum(bool(line["answers"]) for line in lines),
        "answers": sum(len(line["answers"]) for line in lines),
        "tokens": sum(stop - start for line in lines for start, stop in line["answers"]),
        "unfinished": ended("unfinished"),
        "no_room": ended("no room"),
    }
