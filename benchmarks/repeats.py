"""Write forty prompts that ask to repeat or edit their own text, for `tree.lookup`.

    python benchmarks/repeats.py FILE
    python -m medusa_exp run_dir=RUN stages=[evaluate] evaluate.path=FILE tree.lookup=0
    python -m medusa_exp run_dir=RUN stages=[evaluate] evaluate.path=FILE tree.lookup=6

Each call measures its own plain decoding: compare the speed-ups, and tokens per step by category.
"""

import json
import sys
from pathlib import Path

PASSAGES = (
    "The ferry leaves the north pier at seven in the morning and returns at nine in the "
    "evening. Bicycles travel free of charge, dogs need a ticket, and cars must be "
    "booked a day ahead at the harbor office.",
    "To plant a pear tree, dig a hole twice as wide as the roots, set the tree so that "
    "the graft stands above the soil, fill the hole with the earth you took out, and "
    "water it slowly with two buckets of water.",
    "Our library lends books for four weeks, films for one week and tools for three "
    "days. A loan can be renewed twice unless another reader waits for it. Late returns "
    "cost ten cents a day, and never more than five euros.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total = total + "
    "value\n    return total / len(values)",
    "The old observatory on the hill was built of granite in 1871. Its dome weighs nine "
    "tons and turns on twelve iron wheels. The telescope was sold during the war, and a "
    "museum of clocks has been in its rooms ever since.",
    "Dear Ms. Alvarez, thank you for your order of three walnut chairs. They will be "
    "ready on Friday, and our driver will call you an hour before he arrives. Please "
    "have someone at home who can sign for them. Kind regards, Tom Becker",
    '{\n  "name": "sensor-12",\n  "room": "cellar",\n  "unit": "celsius",\n  "interval": '
    '60,\n  "alarm": false\n}',
    "Boil the lentils for twenty minutes with a bay leaf. Fry an onion, two carrots and "
    "a stick of celery in oil until they are soft. Add the lentils, a spoon of vinegar "
    "and salt, and let everything stand for ten minutes before serving.",
    "class Counter:\n    def __init__(self):\n        self.count = 0\n\n    def add(self, "
    "number):\n        self.count = self.count + number\n        return self.count",
    "The committee met on Tuesday and agreed on three things: the roof will be mended "
    "before the winter, the choir may use the hall on Thursdays, and the rent of the "
    "parking places will rise by two percent from January on.",
)
ASKED = {
    "repeat": "Repeat the following text word for word.\n\n{}",
    "edit": 'Write the following text again, with every "the" in capital letters.\n\n{}',
    "quote": "Quote what matters most in the following text, and then all of it.\n\n{}",
    "extend": "Copy the following, and then add one more line of the same kind.\n\n{}",
}


def prompts() -> list[dict[str, object]]:
    """Return the prompts as records of question.jsonl."""
    return [
        {"question_id": f"{name}-{number}", "category": name, "turns": [text.format(passage)]}
        for number, passage in enumerate(PASSAGES)
        for name, text in ASKED.items()
    ]


if __name__ == "__main__":
    lines = [json.dumps(prompt) + "\n" for prompt in prompts()]
    Path(sys.argv[1]).write_text("".join(lines), encoding="utf-8")
