"""Stage regenerate: the backbone's own responses to the prompts of the training documents.

Heads are to predict what the backbone says. Where a text takes turns that the backbone would not
take, they learn from states that decoding never visits; in regenerated responses there are none.

A document is answered turn by turn. What stands between two of the assistant's turns stays as it
is, token for token: nothing is rendered or tokenized again. Responses lie in the cache, under a key
of all that decides them (`train/regenerated.py`).
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.examples import SCHEMA, Example, Examples
from medusa_exp.data.tokenized import Tokenized
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits, Response, decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.heads import stack_heads
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import drop_torn_line, read_json, read_jsonl, write_json
from medusa_exp.runs.progress import ProgressBar
from medusa_exp.stages.session import Session, limits_of, rule_of
from medusa_exp.train.failures import explain_memory
from medusa_exp.train.launch import map_on_ray
from medusa_exp.train.regenerated import (
    DOCUMENTS,
    KIND,
    SUMMARY,
    has_responses,
    regenerated_key,
    regeneration_rule,
)
from medusa_exp.train.trainer import AUTOCAST, pick_precision
from medusa_exp.tree import Tree

log = logging.getLogger(__name__)

RECORD = "regenerated.json"
"""File of a run directory: what its stage regenerate has made or found."""
Decode = Callable[[list[list[int]], Limits, AcceptanceRule], list[Response]]


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Answer the prompts of the training documents, unless that has been done before."""
    session = session or Session(config, out)
    backbone, tokenizer = session.backbone(is_adapted=False), session.tokenizer()
    if config.regenerate.use_heads:
        check_tree_attention(backbone)  # before anything long
    limit = min(config.dataset.max_length, backbone.max_length)
    documents = session.tokenized(tokenizer, limit)
    documents.log()
    key = key_of_responses(config, documents, backbone, tokenizer)
    session.notes.add_inputs(regenerated=key)
    advice = (
        f"lower regenerate.batch_size (now {config.regenerate.batch_size}) or "
        "regenerate.max_new_tokens; the same command goes on where it stopped"
    )
    found = entry(config.cache_dir, KIND, key, has_responses)
    with explain_memory(advice), found as (path, partial_path):
        if partial_path is None:
            log.info("the regenerated responses are in the cache: %s", path)
        else:
            answered_path = path.with_name(f".{key}.answers.jsonl")
            _write(partial_path, _regenerated(session, answered_path, documents), documents.all())
    if partial_path is not None:
        answered_path.unlink()
    summary = read_json(path / SUMMARY)
    write_json(out / RECORD, {"key": key, **summary})
    log.info(
        "%d documents, %d responses of %d tokens; not finished within %d tokens: %d; no room: %d",
        *(summary[name] for name in ("documents", "answers", "tokens")),
        config.regenerate.max_new_tokens,
        *(len(summary[name]) for name in ("unfinished", "no_room")),
    )
    return {f"regenerate/{name}": summary[name] for name in ("documents", "answers", "tokens")}


def key_of_responses(
    config: Config, documents: Tokenized, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return the key of the backbone's responses to these documents."""
    return regenerated_key(
        config.regenerate,
        config.dataset,
        documents_key=documents.summary["key"],
        backbone=backbone,
        rule=rule_of(config),
        limits=limits_of(config, backbone, tokenizer),
        precision=pick_precision(config.dtype.precision, backbone.device),
    )


def _regenerated(session: Session, path: Path, documents: Tokenized) -> list[dict[str, Any]]:
    """Answer documents and write each to the file at `path`, which an interrupted call left begun.

    Returns:
        The `Document`s as dicts, in the order of their rows.
    """
    config, settings = session.config, session.config.regenerate
    examples, rows = documents.all(), _chosen(config, documents)
    drop_torn_line(path)
    done = {line["row"] for line in read_jsonl(path)}
    # Of about the same length, that is, with responses of about the same length, so that few rows
    # of a batch wait for the others; the longest first, which need most memory.
    ordered = sorted(set(rows) - done, key=lambda row: (-examples.lengths[row], row))
    todo = [asdict(document_of(row, examples[row])) for row in ordered]
    if done:
        log.info("%d of %d documents have their responses already", len(done), len(rows))
    size = settings.batch_size
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    answered: Iterator[list[dict[str, Any]]]
    if settings.workers:
        make = partial(Regenerator.load, config, session.out.absolute(), documents.max_length)
        use_gpu = session.backbone(is_adapted=False).device.type == "cuda"
        answered = map_on_ray(make, batches, num_workers=settings.workers, use_gpu=use_gpu)
    else:
        answered = map(Regenerator(session, documents.max_length), batches)
    bar = ProgressBar("regenerating responses", len(rows), len(done))
    with path.open("a", encoding="utf-8") as file, bar:
        for batch in answered:
            file.write("".join(json.dumps(document) + "\n" for document in batch))
            file.flush()
            os.fsync(file.fileno())
            bar.advance(len(batch))
    return sorted(read_jsonl(path), key=lambda line: line["row"])


def _chosen(config: Config, documents: Tokenized) -> list[int]:
    """Return the numbers of the documents to answer."""
    wanted = {"train": config.regenerate.num_documents, "val": config.regenerate.num_val_documents}
    rng = np.random.default_rng(config.seed)
    chosen = [rng.permutation(documents.rows(split))[:n] for split, n in wanted.items()]
    return sorted(np.concatenate(chosen).tolist())


@dataclass
class Document:
    """A conversation on its way: the responses so far, between the data's other turns."""

    row: int
    """Number in the table of tokenized documents."""
    contexts: list[list[int]]
    """What stands before each assistant turn, from the end of the turn before."""
    tokens: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    """Where the responses begin and end in `tokens`."""
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

    A document ends early with a response that finds no end within the limit, or before one that
    would not fit into `max_length` tokens.
    """
    for turn in range(max(len(document.contexts) for document in batch)):
        asked = list(_next_turn(batch, turn, limits.max_new_tokens, max_length, backbone))
        if not asked:
            break
        for document, response in zip(
            asked, decode([document.tokens for document in asked], limits, rule), strict=True
        ):
            start = len(document.tokens)
            document.tokens += response.tokens
            document.answers.append((start, len(document.tokens)))
            is_cut = len(response.tokens) == limits.max_new_tokens
            if is_cut and response.tokens[-1] not in limits.stop_ids:
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


class Regenerator:
    """Answers batches of documents; each process that does has one, with a backbone of its own."""

    def __init__(self, session: Session, max_length: int) -> None:
        config, backbone = session.config, session.backbone(is_adapted=False)
        self.config, self.max_length = config, max_length
        self.backbone = _in_training_dtype(config, backbone)
        self.limits = replace(
            limits_of(config, backbone, session.tokenizer()),
            max_new_tokens=config.regenerate.max_new_tokens,
        )
        self.decode = _decoder(config, session.out, self.backbone)

    @classmethod
    def load(cls, config: Config, out: Path, max_length: int) -> "Regenerator":
        """Make one in a process that has no backbone yet."""
        return cls(Session(config, out), max_length)

    def __call__(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer each turn of each `Document`; they come and go as dicts, as in the file."""
        documents = [Document(**document) for document in batch]
        # A draw of its own for each batch, whatever was answered before.
        rule = regeneration_rule(rule_of(self.config))
        rule = replace(rule, seed=self.config.seed + documents[0].row)
        answer(documents, self.decode, self.limits, rule, self.max_length, self.backbone)
        return [asdict(document) for document in documents]


def _in_training_dtype(config: Config, backbone: Backbone) -> Backbone:
    """Return the backbone in the training's autocast dtype; tensors that have it are shared."""
    model = backbone.model
    dtype = AUTOCAST.get(pick_precision(config.dtype.precision, backbone.device))
    if dtype and config.model.quantization is None:
        memo: dict[int, Tensor] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            cast = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(cast, requires_grad=False) if is_parameter else cast
        model = deepcopy(model, memo)
    return Backbone(model)


def _decoder(config: Config, out: Path, backbone: Backbone) -> Decode:
    """Return plain decoding, or decoding with the heads and the tree that the run already has."""
    if not config.regenerate.use_heads:
        return lambda prompts, limits, rule: decode_plain(backbone, prompts, limits, rule)
    heads = stack_heads(load_heads(out / "heads", backbone), backbone)
    tree = Tree.load(out / "tree.json")
    # Steps of fixed shapes would not shrink as responses end.
    decoder = Decoder(backbone, heads, tree, cuda_graph=False)
    return lambda prompts, limits, rule: decoder.decode(prompts, limits, rule=rule)


def _write(directory: Path, lines: list[dict[str, Any]], examples: Examples) -> None:
    """Write the documents that have a response as an Arrow file, and what became of all."""
    directory.mkdir()
    ids, sources = examples.strings("conversation_id"), examples.strings("source")
    write_json(directory / SUMMARY, _summary(lines, ids))
    lines = [line for line in lines if line["answers"]]
    if not lines:
        raise UserError(
            "stage regenerate: no training document leaves room for a response: lower "
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
    with pa.ipc.new_file(str(directory / DOCUMENTS), SCHEMA) as file:
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
