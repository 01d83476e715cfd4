"""Words and phrases that several kinds of tasks draw from."""

import random

NAMES = (
    "Ada Ben Clara Elena Farid Grace Hugo Jonas Maya Nora Omar Petra Rosa Samir Vera Zoe".split()
)

ITEMS = (
    "apple book candle pencil marble stamp cookie ticket bottle ribbon lemon coin ball cup".split()
)


def pick(rng: random.Random, *choices: str) -> str:
    """Return one of several ways to say a thing."""
    return rng.choice(choices)


def opening(rng: random.Random) -> str:
    """Return how a worked answer begins."""
    return pick(
        rng,
        "Let's work through this step by step.",
        "Let's take it one step at a time.",
        "Here is how to work it out.",
        "Sure! Here is the solution, step by step.",
        "We can solve this in a few short steps.",
    )


def closing(rng: random.Random) -> str:
    """Return how an answer ends: often not at all."""
    return pick(
        rng,
        "",
        "",
        "\n\nLet me know if you would like to see another example.",
        "\n\nI hope that helps!",
        "\n\nFeel free to ask if anything is unclear.",
    )


def plural(count: int, noun: str) -> str:
    """Return "1 apple" or "2 apples"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def with_article(noun: str) -> str:
    """Return "a dog" or "an owl"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def numbered(lines: list[str]) -> str:
    """Return a numbered list."""
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
