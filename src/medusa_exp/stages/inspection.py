"""Stage inspect: count, sample and examine what heads would be trained on; print and write it.

Of a data set, a tokenizer and, if one is given, a model. Writes `data.json` (all counts) and
`data_samples.jsonl` (rows cut into trained and other text); W&B gets the samples as a table.
"""

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from medusa_exp.config import Config
from medusa_exp.data import Conversation
from medusa_exp.data.faults import printable
from medusa_exp.data.sources import Source, evenly_spread, walk
from medusa_exp.data.template import REFUSED
from medusa_exp.data.tokenized import CUT, KEPT, LEFT_OUT, LOST_ROWS, UNTRAINED, Tokenized
from medusa_exp.model.scoring import measure_agreement
from medusa_exp.runs.files import write_json, write_jsonl
from medusa_exp.stages.doctor import (
    Finding,
    Row,
    count_roles,
    count_runs,
    examine_text,
    own_words,
    sample_rows,
)
from medusa_exp.stages.session import Session, stop_ids_of

_SHOWN_CHARS = 1200
"""Characters of a sample that are printed; data_samples.jsonl has all of it."""
_SHOWN_TURNS = 8
_ALL = 2**62
_OPEN, _CLOSE = "\u27e6", "\u27e7"
"""Around trained text where there is no color."""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Count, sample, examine; print and write it."""
    session = session or Session(config, out)
    tokenizer = session.tokenizer()
    backbone = session.backbone() if session.spec.has_model else None
    limit = min(config.dataset.max_length, backbone.max_length if backbone else 2**30)
    tokenized = session.tokenized(tokenizer, limit)
    sources = session.sources()
    looked_at = [source.reading.look_at for source in sources]
    for source in sources:
        source.reading.look_at = _ALL
    sampled = _sampled(sources, tokenized, config.inspect.num_conversations)
    for source, number in zip(sources, looked_at, strict=True):  # for the stages that follow
        source.reading.look_at = number
    rows = sample_rows(sampled, tokenizer, tokenized.summary["notes"])
    found: dict[str, Any] = {
        **tokenized.summary,
        "forms": {source.name: dict(source.reading.forms) for source in sources},
        "unused_keys": {source.name: dict(source.reading.unused) for source in sources},
        "num_looked_at": {source.name: source.reading.num_looked_at for source in sources},
        "first_chat": _first_chat(sampled[0][1]),
        "max_length": limit,
        "lengths": _lengths(tokenized),
        "roles": count_roles(rows),
        "num_sampled": len(sampled),
        "checks": count_runs(rows),
    }
    if backbone:
        examples = evenly_spread(tokenized.split("train"), config.inspect.num_documents)
        agreement = measure_agreement(backbone, examples, "reading replies")
        chats = [conversation for _, conversation in sampled]
        findings = [
            *examine_text(
                backbone, tokenizer, stop_ids_of(config, backbone, tokenizer), chats, rows
            ),
            *(Finding("chat template", False, f"{note}.") for note in tokenized.summary["notes"]),
            own_words(agreement),
        ]
        found["doctor"] = [asdict(finding) for finding in findings]
        found["agreement"] = asdict(agreement)
    samples = [_sample(row) for row in rows[: config.inspect.num_samples]]
    write_json(out / "data.json", found)
    write_jsonl(out / "data_samples.jsonl", samples)
    print_all(_visible(found), _visible(samples))
    return _metrics(found)


def _sampled(
    sources: list[Source], tokenized: Tokenized, number: int
) -> list[tuple[str, Conversation]]:
    """Return so many conversations, evenly spread over the data set."""
    outcomes = tokenized.summary["sources"].values()
    reasons = (REFUSED, UNTRAINED)
    read = sum(o[KEPT] + sum(o["dropped"].get(r, 0) for r in reasons) for o in outcomes)
    places = {*evenly_spread(range(read), number)}
    return [sourced for place, sourced in enumerate(walk(sources)) if place in places]


def _first_chat(conversation: Conversation) -> dict[str, Any]:
    """Return a chat as it was understood, before any template."""
    turns = []
    if conversation.tools:
        turns.append(["(tools)", _shown(conversation.tools)])
    for message in conversation.messages[:_SHOWN_TURNS]:
        if message.reasoning:
            turns.append([f"{message.role} (reasoning)", _shown(message.reasoning)])
        role = message.role if message.is_trained else f"{message.role} (not to train)"
        turns.append([role, _shown(message.content + message.fields)])
    num_more = max(0, len(conversation.messages) - _SHOWN_TURNS)
    return {"name": conversation.described(), "turns": turns, "num_more": num_more}


def _shown(text: str) -> str:
    cut = text[:_SHOWN_CHARS] + (" ..." if len(text) > _SHOWN_CHARS else "")
    return cut.encode("utf-8", "replace").decode()


def _lengths(tokenized: Tokenized) -> dict[str, dict[str, float]]:
    """Return the spread of examples' lengths and of their trained tokens."""
    table = tokenized.all()
    spread = {}
    for name, numbers in (("tokens", table.lengths), ("trained tokens", table.num_trained())):
        marks = np.quantile(numbers, (0, 0.05, 0.5, 0.95, 1)).tolist()
        spread[name] = dict(zip(("min", "5 %", "median", "95 %", "max"), marks, strict=True))
    return spread


def _sample(row: Row) -> dict[str, Any]:
    """Return a row as runs of text, with what is trained told apart from the rest."""
    tokens = zip(row.pieces, row.rendered.is_trained, strict=True)
    runs = groupby(tokens, key=lambda token: token[1])
    return {
        "conversation_id": row.conversation_id,
        "source": row.source,
        "num_tokens": len(row.pieces),
        "num_trained": sum(row.rendered.is_trained),
        "runs": [["".join(piece for piece, _ in run), is_trained] for is_trained, run in runs],
    }


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    sources = found["sources"].values()

    def total(what: str) -> int:
        return sum(outcomes[what] for outcomes in sources)

    metrics = {
        "data/records": total("records"),
        "data/kept_records": total(KEPT),
        "data/documents": total("documents"),
        "data/tokens": total("tokens"),
        "data/trained_fraction": total("trained tokens") / total("tokens"),
        "data/cut_documents": total(CUT),
    }
    if "agreement" in found:
        metrics["doctor/nats_per_token"] = found["agreement"]["nats_per_token"]
        metrics["doctor/top1"] = found["agreement"]["top1"]
        metrics["doctor/problems"] = sum(not finding["is_fine"] for finding in found["doctor"])
    return metrics


def _visible(value: Any) -> Any:
    """Return what is printed with an escape for each character that a terminal would obey."""
    if isinstance(value, dict):
        return {_visible(key): _visible(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_visible(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


def print_all(found: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Print samples first and tables last, where the eye is."""
    console = Console()
    name = found["first_chat"]["name"]
    console.print(f"the first chat as it was read: {name}", markup=False, soft_wrap=True)
    console.print(_chat_table(found["first_chat"]))
    for sample in samples:
        _print_sample(console, sample)
    console.print(_records_table(found))
    console.print(_lengths_table(found))
    console.print(_roles_table(found))
    checks = found["checks"]
    console.print(
        f"{checks['runs from edge to edge of a reply']} of {checks['runs']} trained runs begin and "
        f"end with a reply; {checks['runs that could not be checked']} more could not be checked."
    )
    for what, example in found["examples"].items():
        console.print(f"{what}, for example: {example}", markup=False)
    for note in found["notes"]:
        console.print(note, markup=False)
    if "doctor" in found:
        console.print(_doctor_table(found["doctor"]))


def _print_sample(console: Console, sample: dict[str, Any]) -> None:
    is_plain = console.color_system is None
    text = Text()
    for run, is_trained in sample["runs"]:
        shown = f"{_OPEN}{run}{_CLOSE}" if is_trained and is_plain else run
        text.append(shown, style="bold green" if is_trained else "dim")
    if len(text) > _SHOWN_CHARS:
        text = text[:_SHOWN_CHARS].append(" ...", style="dim")
    how = f"between {_OPEN} and {_CLOSE}" if is_plain else "green"
    numbers = f"{sample['num_trained']} of {sample['num_tokens']} tokens trained ({how})"
    console.rule(f"{escape(sample['conversation_id'])}: {numbers}")
    console.print(text, soft_wrap=True)


def _chat_table(chat: dict[str, Any]) -> Table:
    table = Table("role", "content")
    for role, content in chat["turns"]:
        table.add_row(role, escape(content))
    if chat["num_more"]:
        table.add_row("...", f"{chat['num_more']} more turns")
    return table


def _records_table(found: dict[str, Any]) -> Table:
    table = Table("source", "outcome", "number", title="records")
    for name, outcomes in found["sources"].items():
        table.add_row(name, "read", str(outcomes["records"]))
        for form, number in sorted(found["forms"][name].items()):
            table.add_row("", f"of the form {form}", str(number))
        for reason, number in sorted(outcomes["dropped"].items()):
            table.add_row("", f"dropped: {reason}", str(number))
        looked_at = found["num_looked_at"][name]
        for key, number in sorted(found["unused_keys"][name].items()):
            line = f"key `{key}` in {number} of {looked_at} records: not used"
            table.add_row("", escape(line), str(number))
        for what in LEFT_OUT:
            if what in outcomes:
                table.add_row("", what, str(outcomes[what]))
        table.add_row("", "kept", str(outcomes[KEPT]))
        table.add_row(
            "", f"documents of at most {found['max_length']} tokens", str(outcomes["documents"])
        )
        table.add_row("", CUT, str(outcomes[CUT]))
        if outcomes[LOST_ROWS]:
            table.add_row("", LOST_ROWS, str(outcomes[LOST_ROWS]))
        table.add_row("", "tokens", str(outcomes["tokens"]))
        share = outcomes["trained tokens"] / max(1, outcomes["tokens"])
        table.add_row("", "trained tokens", f"{outcomes['trained tokens']} ({share:.1%})")
    return table


def _lengths_table(found: dict[str, Any]) -> Table:
    marks = next(iter(found["lengths"].values()))
    table = Table("of a document", *marks, title="lengths")
    for name, spread in found["lengths"].items():
        table.add_row(name, *(f"{number:.0f}" for number in spread.values()))
    return table


def _roles_table(found: dict[str, Any]) -> Table:
    title = f"tokens by role, of {found['num_sampled']} conversations, before cutting"
    table = Table("source", "role", "tokens", "trained", "share", title=title)
    for source, roles in found["roles"].items():
        for role, numbers in roles.items():
            share = numbers["trained tokens"] / numbers["tokens"]
            table.add_row(
                source, role, str(numbers["tokens"]), str(numbers["trained tokens"]), f"{share:.1%}"
            )
    return table


def _doctor_table(findings: list[dict[str, Any]]) -> Table:
    table = Table("", "looked at", "found", title="doctor")
    for finding in findings:
        mark = "[green]ok" if finding["is_fine"] else "[bold red]look"
        table.add_row(mark, finding["name"], escape(finding["sentence"]))
    return table
