"""Stage inspect: a data set, a tokenizer and, if given, a model in; what is trained on out.

Writes `data.json` (all counts), `data_samples.jsonl` (rows cut into trained and other text) and
prints both; W&B gets the samples as a table.
"""

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from medusa_exp.config import Config
from medusa_exp.data.build import CUT, KEPT, REFUSED, UNTRAINED
from medusa_exp.data.conversations import Conversation
from medusa_exp.data.examples import Example, Examples
from medusa_exp.data.sources import Source, open_sources, walk
from medusa_exp.data.tokenized import Tokenised, load_tokenised
from medusa_exp.inspection import show
from medusa_exp.inspection.rows import Row, count_roles, count_runs, sample_rows
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.source import has_model
from medusa_exp.model.tokenizer import load_tokenizer
from medusa_exp.runs.files import write_json, write_jsonl
from medusa_exp.stages.doctor import examine


def run(config: Config, out: Path) -> dict[str, float]:
    """Count, sample, examine; print and write it."""
    tokenizer = load_tokenizer(config)
    backbone = load_backbone(config) if has_model(config) else None
    limit = min(config.dataset.max_length, backbone.max_length if backbone else 2**30)
    documents = load_tokenised(config, tokenizer, limit)
    sampled = _sampled(open_sources(config), documents, config.inspect.num_conversations)
    rows = sample_rows(sampled, tokenizer, documents.summary["notes"])
    found: dict[str, Any] = {
        **documents.summary,
        "max_length": limit,
        "lengths": _lengths(documents),
        "roles": count_roles(rows),
        "num_sampled": len(sampled),
        "checks": count_runs(rows),
    }
    if backbone:
        findings, agreement = examine(
            config,
            backbone,
            tokenizer,
            [conversation for _, conversation in sampled],
            rows,
            _spread(documents.split("train"), config.inspect.num_documents),
            documents.summary["notes"],
        )
        found["doctor"] = [asdict(finding) for finding in findings]
        found["agreement"] = asdict(agreement)
    samples = [_sample(row) for row in rows[: config.inspect.num_samples]]
    write_json(out / "data.json", found)
    write_jsonl(out / "data_samples.jsonl", samples)
    show.print_all(found, samples)
    return _metrics(found)


def _sampled(
    sources: list[Source], documents: Tokenised, number: int
) -> list[tuple[str, Conversation]]:
    """Return so many conversations, evenly spread over the data set."""
    outcomes = documents.summary["sources"].values()
    reasons = (REFUSED, UNTRAINED)
    read = sum(o[KEPT] + sum(o["dropped"].get(r, 0) for r in reasons) for o in outcomes)
    places = set(np.linspace(0, read - 1, min(number, read)).round().astype(int).tolist())
    return [sourced for place, sourced in enumerate(walk(sources)) if place in places]


def _lengths(documents: Tokenised) -> dict[str, dict[str, float]]:
    """Return the spread of documents' lengths and of their trained tokens."""
    table = documents.all()
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


def _spread(documents: Examples, count: int) -> list[Example]:
    """Return documents from all over a data set: its sources stand one after the other."""
    places = np.linspace(0, len(documents) - 1, min(count, len(documents))).astype(int)
    return [documents[int(place)] for place in places]
