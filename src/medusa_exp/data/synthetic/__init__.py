"""Generator of the synthetic chat data set, in ShareGPT's form.

It stands in for a user's transcripts where there are none: many small tasks with right answers,
worded in many ways. As in real assistants' text, much of an answer follows from how it began (code,
tables, worked steps) and some of it does not (names, numbers, which phrase comes next). A record
depends on the seed and its own number alone, so a larger data set starts with the smaller one.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medusa_exp.data.synthetic import calculation, language, layout, programs
from medusa_exp.data.synthetic.wording import pick

FORMAT = 1
"""Raise it when the same seed gives other records: cached data sets are then made again."""

Record = dict[str, Any]
Turn = tuple[str, str]
"""What the user asks, and the right answer."""

FAMILIES: dict[str, Callable[[random.Random], Turn]] = {
    "arithmetic": calculation.arithmetic,
    "sequence": calculation.sequence,
    "units": calculation.units,
    "dates": calculation.dates,
    "program": programs.program,
    "query": programs.query,
    "table": layout.table,
    "record": layout.record,
    "steps": layout.steps,
    "rewording": language.rewording,
    "letters": language.letters,
    "facts": language.facts,
}
CATEGORIES = tuple(FAMILIES)

_SYSTEM_TURNS = (
    "You are a helpful assistant.",
    "You are a patient teacher. Show your work.",
    "You answer clearly and in order.",
    "You are a careful assistant who checks every step.",
)


def generate_conversations(num_conversations: int, seed: int) -> Iterator[Record]:
    """Yield ShareGPT records of one to four exchanges, with a system turn in one of six.

    The id starts with the family of the first exchange: `arithmetic-000123`.
    """
    for number in range(num_conversations):
        yield _conversation(number, random.Random(f"{seed}/{number}"))


def write_dataset(path: Path, num_conversations: int, seed: int) -> None:
    """Write the records as a JSON list, one a line."""
    records = generate_conversations(num_conversations, seed)
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    path.write_bytes(("[\n" + ",\n".join(lines) + "\n]\n").encode())


def _conversation(number: int, rng: random.Random) -> Record:
    first = rng.choice(CATEGORIES)
    turns = []
    if rng.random() < 1 / 6:
        turns.append({"from": "system", "value": rng.choice(_SYSTEM_TURNS)})
    family = first
    for exchange in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        question, answer = FAMILIES[family](rng)
        if exchange:
            question = (
                pick(rng, "", "Thanks! ", "Great. ", "One more: ", "Next question. ") + question
            )
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        family = family if rng.random() < 0.5 else rng.choice(CATEGORIES)
    return {"id": f"{first}-{number:06d}", "conversations": turns}
