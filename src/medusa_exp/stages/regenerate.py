"""Stage regenerate: the backbone's own responses to the prompts of the training documents.

Heads are to predict what the backbone says. Where a text takes turns that the backbone would not
take, they learn from states that decoding never visits; in regenerated responses there are none.

A document is answered turn by turn. What stands between two of the assistant's turns stays as it
is, token for token: nothing is rendered or tokenized again. Responses lie in the cache, under a key
of all that decides them (`train/regenerated.py`).
"""

import logging
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.examples import Example, Examples, Row, Table, Writer
from medusa_exp.data.tokenized import Tokenized
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.slot_steps import bucket
from medusa_exp.decode.slots import OneByOne, Request, Slots
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import (
    Appender,
    content_key,
    drop_torn_line,
    read_json,
    read_jsonl,
    write_json,
)
from medusa_exp.runs.progress import ProgressBar
from medusa_exp.runs.schemas import RegeneratedSummary
from medusa_exp.stages.early_checks import check_training
from medusa_exp.stages.how_long import say_of_quickstart
from medusa_exp.stages.session import (
    Session,
    decoder_of,
    limits_of,
    rule_of,
)
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
from medusa_exp.tree import Tree, chain

log = logging.getLogger(__name__)

RECORD = "regenerated.json"
"""File of a run directory: what its stage regenerate has made or found."""
_CHECK = "check"
"""Key of the checksum of a line in the file of what has been answered so far."""
_ROUNDS = 4
"""How many times the documents that a worker answers at a time it is given."""
_SOME = 64
"""Documents from which the prompts are taken by which engines are known."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Answer the prompts of the training documents, unless that has been done before."""
    session = session or Session(config, out)
    backbone, tokenizer = session.backbone(is_adapted=False), session.tokenizer()
    if config.regenerate.use_heads:
        check_tree_attention(backbone)
    check_training(config, out, session.spec, backbone)
    limit = min(config.dataset.max_length, backbone.max_length)
    documents = session.tokenized(tokenizer, limit)
    documents.log()
    key = key_in_cache(config, documents, backbone, tokenizer)
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
            say_of_quickstart(session)
            answered_path = path.with_name(f".{key}.answers.jsonl")
            _write(partial_path, _regenerated(session, answered_path, documents), documents.all())
    if partial_path is not None:
        answered_path.unlink()
    summary = read_json(path / SUMMARY, kind=RegeneratedSummary)
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


def key_in_cache(
    config: Config, documents: Tokenized, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Return `key_of_responses`, or the one under which an earlier version has made them."""
    key, place = key_of_responses(config, documents, backbone, tokenizer), Path(config.cache_dir)
    if backbone.names.has_former and not has_responses(place / KIND / key):
        with backbone.names.former():
            former = key_of_responses(config, documents, backbone, tokenizer)
        if has_responses(place / KIND / former):
            return former
    return key


def _regenerated(session: Session, path: Path, documents: Tokenized) -> list[dict[str, Any]]:
    """Answer documents and write each to the file at `path`, which an interrupted call left begun.

    Returns:
        The `Document`s as dicts, in the order of their rows.
    """
    config, settings = session.config, session.config.regenerate
    examples, rows = documents.all(), _chosen(config, documents)
    drop_torn_line(path)
    done = {line["row"] for line in _undamaged(path)}
    new_tokens = settings.max_new_tokens
    rooms = {
        row: room_of(document_of(row, examples[row]), new_tokens, documents.max_length)
        for row in rows
        if row not in done
    }
    # The longest first, which need most memory. Beyond that, by the length of the data's own
    # responses: when no more come in, those that are left should not be the longest.
    ordered = sorted(rooms, key=lambda row: (-bucket(rooms[row]), -examples.lengths[row], row))
    if done:
        log.info("%d of %d documents have their responses already", len(done), len(rows))
    bar = ProgressBar("regenerating responses", len(rows), len(done))
    with Appender(path) as file, bar:
        for document in _answered(session, documents, ordered, rooms):
            file.append({**document, _CHECK: content_key(document)})
            bar.advance(tokens=sum(stop - start for start, stop in document["answers"]))
    return sorted(_undamaged(path), key=lambda line: line["row"])


def _undamaged(path: Path) -> list[dict[str, Any]]:
    """Read the lines that are as they were written; the documents of others are answered again."""
    lines = read_jsonl(path, kind=Document)
    return [line for line in lines if line.pop(_CHECK, None) in (None, content_key(line))]


def _answered(
    session: Session, documents: Tokenized, rows: list[int], rooms: dict[int, int]
) -> Iterator[dict[str, Any]]:
    """Yield documents, as dicts, as they are answered here, by workers or by engines."""
    settings, examples = session.config.regenerate, documents.all()
    todo = (document_of(row, examples[row]) for row in rows)
    if not rows:
        return
    if settings.server is not None:
        yield from map(asdict, _answered_by_engines(session, documents, rows, settings.server))
        return
    longest = max(rooms[row] for row in rows)
    if not settings.workers:
        regenerator = Regenerator(session, documents.max_length, longest, len(rows))
        yield from map(asdict, regenerator.answer(todo))
        return
    make = partial(
        Regenerator.load,
        session.config,
        session.out.absolute(),
        documents.max_length,
        longest,
        len(rows) // settings.workers,
    )
    size = settings.batch_size
    # Several times what is answered at a time: while the last of them end, slots stand idle.
    size = max(size, min(_ROUNDS * size, -(-len(rows) // (_ROUNDS * settings.workers))))
    items = [[asdict(document) for document in islice(todo, size)] for _ in rows[::size]]
    use_gpu = session.backbone(is_adapted=False).device.type == "cuda"
    for batch in map_on_ray(make, items, num_workers=settings.workers, use_gpu=use_gpu):
        yield from batch


def _limits_and_rule(session: Session, backbone: Backbone) -> tuple[Limits, AcceptanceRule]:
    """Return where regenerated responses end, and how their tokens are chosen."""
    limits = limits_of(session.config, backbone, session.tokenizer())
    limits = replace(limits, max_new_tokens=session.config.regenerate.max_new_tokens)
    return limits, regeneration_rule(rule_of(session.config))


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

    def prompt(self, limits: Limits, max_length: int, backbone: Backbone) -> list[int] | None:
        """Begin the next turn, and return what it is to follow; None where the document ends."""
        turn = len(self.answers)
        if self.outcome != "whole" or turn == len(self.contexts):
            return None
        length = len(self.tokens) + len(self.contexts[turn])
        if length + limits.max_new_tokens > min(max_length, backbone.max_length_from(length)):
            self.outcome = "no room"
            return None
        self.tokens += self.contexts[turn]
        return list(self.tokens)

    def take(self, tokens: list[int], limits: Limits) -> None:
        """Append a response; without an end within the limit it is the document's last."""
        start = len(self.tokens)
        self.tokens += tokens
        self.answers.append((start, len(self.tokens)))
        if len(tokens) == limits.max_new_tokens and tokens[-1] not in limits.stop_ids:
            self.outcome = "unfinished"


def document_of(row: int, example: Example) -> Document:
    """Take a document's turns apart: what is trained is to be answered anew, the rest stays."""
    edges = np.flatnonzero(np.diff(example.is_trained.astype(np.int8), prepend=0, append=0))
    starts, stops = edges[::2].tolist(), edges[1::2].tolist()
    ids = example.input_ids.tolist()
    return Document(row, [ids[a:b] for a, b in zip([0, *stops], starts, strict=False)])


def room_of(document: Document, new_tokens: int, max_length: int) -> int:
    """Return the most tokens that a document and its responses may come to."""
    turns = len(document.contexts)
    return min(max_length, sum(map(len, document.contexts)) + turns * new_tokens)


def answer(
    documents: Iterable[Document],
    slots: Slots | OneByOne,
    limits: Limits,
    max_length: int,
    seed: int,
) -> Iterator[Document]:
    """Let the backbone answer each turn of some documents; yield each when that is done.

    A document ends early with a response that finds no end within the limit, or before one that
    would not fit into `max_length` tokens. Each turn has draws of its own, whatever is answered
    beside it or was before.
    """
    backbone = slots.backbone
    without_room: list[Document] = []

    def next_request(document: Document) -> Request | None:
        prompt = document.prompt(limits, max_length, backbone)
        if prompt is None:
            return None
        limit = min(max_length, backbone.max_length_from(len(prompt)))
        room = room_of(document, limits.max_new_tokens, limit)
        draws = (seed, document.row, len(document.answers))
        return Request(prompt, limits, room, draws, document)

    def requests() -> Iterator[Request]:
        for document in documents:
            if request := next_request(document):
                yield request
            else:
                without_room.append(document)

    for finished in slots.decode(requests()):
        document: Document = finished.request.tag
        document.take(finished.response.tokens, limits)
        finished.next = next_request(document)
        if finished.next is None:
            yield document
    yield from without_room


def _answered_by_engines(
    session: Session, documents: Tokenized, rows: list[int], urls: str
) -> Iterator[Document]:
    """Yield documents as running engines answer them; each turn follows the answer before."""
    from medusa_exp.serving.client import answers  # HTTP, which few need
    from medusa_exp.stages.engines import open_engines

    config, examples, max_length = session.config, documents.all(), documents.max_length
    backbone = _in_training_dtype(config, session.backbone(is_adapted=False))
    limits, rule = _limits_and_rule(session, backbone)
    some = (document_of(row, examples[row]) for row in rows[-_SOME:])  # the shortest
    engines = open_engines(
        "regenerate.server",
        urls,
        config.serving,
        backbone,
        [document.contexts[0] for document in some if document.contexts],
        limits=limits,
        rule=rule,
        max_length=max_length,
    )

    async def answer_turns(document: Document) -> Document:
        while (prompt := document.prompt(limits, max_length, backbone)) is not None:
            draws = int(content_key(config.seed, document.row, len(document.answers)), 16)
            document.take(await engines.respond(prompt, draws % 2**31), limits)
        return document

    todo = (document_of(row, examples[row]) for row in rows)
    yield from answers(engines, answer_turns, todo, config.regenerate.server_concurrency)
    known = [[engine.url, engine.model, engine.fingerprint] for engine in engines.engines]
    session.notes.add(engines=known)


class Regenerator:
    """Answers documents; each process that does has one, with a backbone of its own."""

    def __init__(
        self, session: Session, max_length: int, num_columns: int, num_documents: int
    ) -> None:
        """Prepare for documents.

        Args:
            session: of the run.
            max_length: most tokens of a document.
            num_columns: most that those to come may have.
            num_documents: about how many will come.
        """
        config, backbone = session.config, session.backbone(is_adapted=False)
        self.config, self.max_length, self.num_columns = config, max_length, num_columns
        backbone = _in_training_dtype(config, backbone)
        self.limits, self.rule = _limits_and_rule(session, backbone)
        self.decoder = _decoder(config, session.out, backbone, num_documents)
        self.num_slots: int | None = None
        """Documents at a time: as many as there is memory for."""

    @classmethod
    def load(
        cls, config: Config, out: Path, max_length: int, num_columns: int, num_documents: int
    ) -> "Regenerator":
        """Make one in a process that has no backbone yet."""
        return cls(Session(config, out), max_length, num_columns, num_documents)

    def answer(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield documents when each of their turns is answered, those first that end first."""
        settings, decoder = self.config.regenerate, self.decoder
        drafter = decoder.drafter(rule=self.rule) if settings.use_heads else decoder.root_only()
        if self.num_slots is None:
            self.num_slots = decoder.slots_with_room(
                settings.batch_size, self.num_columns, drafter, self.rule
            )
        slots = decoder.slots(self.num_slots, self.num_columns, drafter, self.rule)
        yield from answer(documents, slots, self.limits, self.max_length, self.config.seed)
        log.info(
            "slots stood idle in %.1f %% of %d steps' rows",
            100 * slots.idle_share,
            slots.slot_steps,
        )

    def __call__(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer documents that come and go as dicts, as in the file."""
        return [asdict(found) for found in self.answer(Document(**given) for given in batch)]


def _in_training_dtype(config: Config, backbone: Backbone) -> Backbone:
    """Return the backbone in the training's autocast dtype; tensors that have it are shared."""
    model = backbone.model
    dtype = AUTOCAST.get(pick_precision(config.dtype.precision, backbone.device))
    if not dtype or config.model.quantization is not None:
        return backbone
    memo: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        cast = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(cast, requires_grad=False) if is_parameter else cast
    model = deepcopy(model, memo)
    return Backbone(model, uses_grouped_attention=backbone.uses_grouped_attention)


def _decoder(config: Config, out: Path, backbone: Backbone, num_documents: int) -> Decoder:
    """Return a decoder, with the heads and the tree of the run where they are to help."""
    settings = config.regenerate
    steps = num_documents * settings.max_new_tokens // settings.batch_size
    if not settings.use_heads:
        return decoder_of(config, backbone, None, steps)
    heads, saved = load_heads(out / "heads", backbone), out / "tree.json"
    # A chain needs no calibration: there is one before any stage has saved a tree.
    is_new = config.tree.kind == "chain" and not saved.is_file()
    tree = chain(heads.config.num_heads) if is_new else Tree.load(saved)
    return decoder_of(config, backbone, heads, steps, tree=tree)


def _write(directory: Path, lines: list[dict[str, Any]], examples: Examples) -> None:
    """Write the documents that have a response, and what became of all."""
    directory.mkdir()
    ids, sources = examples.strings("conversation_id"), examples.strings("source")
    write_json(directory / SUMMARY, _summary(lines, ids))
    lines = [line for line in lines if line["answers"]]
    if not lines:
        raise UserError(
            "stage regenerate: no training document leaves room for a response: lower "
            "regenerate.max_new_tokens or raise dataset.max_length."
        )
    with Writer(directory / DOCUMENTS) as file:
        file.write(Table.of(_row(line, ids, sources) for line in lines))


def _row(line: dict[str, Any], ids: list[str], sources: list[str]) -> Row:
    is_trained_T = np.zeros(len(line["tokens"]), bool)
    for start, stop in line["answers"]:
        is_trained_T[start:stop] = True
    return line["tokens"], is_trained_T, ids[line["row"]], sources[line["row"]]


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
