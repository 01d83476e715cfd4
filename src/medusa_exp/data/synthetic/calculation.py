"""Tasks with numbers: stories, sequences, units and dates."""

import random
from itertools import pairwise

from medusa_exp.data.synthetic.wording import ITEMS, NAMES, closing, numbered, opening, pick, plural

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# (from, to, factor): one of the first is `factor` of the second.
_UNITS = (
    ("kilometer", "meter", 1000),
    ("meter", "centimeter", 100),
    ("kilogram", "gram", 1000),
    ("hour", "minute", 60),
    ("minute", "second", 60),
    ("day", "hour", 24),
    ("week", "day", 7),
    ("liter", "milliliter", 1000),
    ("year", "month", 12),
)


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """A story of gains and losses, solved line by line."""
    name, friend = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    count = start = rng.randint(5, 40)
    story, lines = [], [f"{name} starts with {plural(start, item)}."]
    for _ in range(rng.randint(1, 3)):
        change = rng.randint(2, 20)
        if count > change and rng.random() < 0.5:
            verb = pick(rng, f"gives {change} to {friend}", f"loses {change}", f"sells {change}")
            story.append(f"{name} {verb}.")
            lines.append(
                f"After that, {name} {verb}, so we subtract: {count} - {change} = {count - change}."
            )
            count -= change
        else:
            verb = pick(
                rng, f"buys {change} more", f"finds {change} more", f"gets {change} from {friend}"
            )
            story.append(f"{name} {verb}.")
            lines.append(
                f"After that, {name} {verb}, so we add: {count} + {change} = {count + change}."
            )
            count += change
    question = pick(
        rng, f"How many {item}s does {name} have now?", f"How many {item}s are there in the end?"
    )
    answer = pick(
        rng,
        f"So {name} has {plural(count, item)} in the end.",
        f"The answer is {plural(count, item)}.",
    )
    return (
        f"{name} has {plural(start, item)}. {' '.join(story)} {question}",
        f"{opening(rng)}\n\n{numbered(lines)}\n\n{answer}{closing(rng)}",
    )


def sequence(rng: random.Random) -> tuple[str, str]:
    """The next terms of a sequence that adds or doubles."""
    first = rng.randint(1, 12)
    if rng.random() < 0.7:
        step = rng.randint(2, 9)
        terms = [first + step * i for i in range(8)]
        rule = f"each number is {step} more than the one before it"
        checks = [f"{a} + {step} = {b}" for a, b in pairwise(terms[4:])]
    else:
        terms = [first * 2**i for i in range(8)]
        rule = "each number is twice the one before it"
        checks = [f"{a} x 2 = {b}" for a, b in pairwise(terms[4:])]
    known, next_terms = terms[:5], terms[5:]
    question = pick(
        rng,
        "What are the next three numbers?",
        "How does the sequence go on?",
        "Continue the sequence with three more numbers.",
    )
    return (
        f"{', '.join(map(str, known))}, ... {question}",
        f"Looking at the sequence, {rule}.\n\nSo the next three numbers are:\n\n"
        f"{numbered(checks)}\n\nThe sequence continues with "
        f"{next_terms[0]}, {next_terms[1]} and {next_terms[2]}.{closing(rng)}",
    )


def units(rng: random.Random) -> tuple[str, str]:
    """A conversion to the smaller unit."""
    big, small, factor = rng.choice(_UNITS)
    count = rng.randint(2, 30)
    question = pick(
        rng,
        f"How many {small}s are there in {plural(count, big)}?",
        f"Convert {plural(count, big)} to {small}s.",
        f"What is {plural(count, big)} in {small}s?",
    )
    return (
        question,
        f"To convert {big}s to {small}s, we multiply by {factor}, because there are {factor} "
        f"{small}s in one {big}.\n\n{count} x {factor} = {count * factor}\n\n"
        f"So {plural(count, big)} {pick(rng, 'equals', 'is the same as', 'makes')} "
        f"{plural(count * factor, small)}.{closing(rng)}",
    )


def dates(rng: random.Random) -> tuple[str, str]:
    """The weekday some days from a given one."""
    start, days = rng.randrange(7), rng.randint(2, 40)
    weeks, rest = divmod(days, 7)
    day, result = _DAYS[start], _DAYS[(start + days) % 7]
    question = pick(
        rng,
        f"If today is {day}, what day is it in {days} days?",
        f"What day of the week comes {days} days after a {day}?",
    )
    walk = ", ".join(_DAYS[(start + i) % 7] for i in range(1, rest + 1))
    counting = f"Counting on from {day}: {walk}." if rest else f"So it is {day} again."
    return (
        question,
        f"{opening(rng)}\n\n"
        + numbered(
            [
                "A week has 7 days, so every 7 days the weekday is the same.",
                f"{days} days are {plural(weeks, 'week')} and {plural(rest, 'day')}.",
                counting,
            ]
        )
        + f"\n\nSo the day is {pick(rng, 'a ', '')}{result}.{closing(rng)}",
    )
