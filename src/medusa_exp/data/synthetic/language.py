"""Tasks with words: rewording, letters, and facts of a small world."""

import random

from medusa_exp.data.synthetic.wording import ITEMS, NAMES, closing, numbered, pick, with_article

# base form, past form: "They open the door" -> "The door was opened by them"
_VERBS = (
    ("open", "opened"),
    ("paint", "painted"),
    ("clean", "cleaned"),
    ("carry", "carried"),
    ("count", "counted"),
    ("collect", "collected"),
    ("wash", "washed"),
    ("move", "moved"),
)

_WORDS = (
    "garden window orange planet bridge silver market summer yellow forest castle rabbit pepper "
    "winter mirror dragon island jacket kitten letter"
).split()

# animal: legs, what it is, where it lives
_ANIMALS = {
    "dog": (4, "mammal", "with people"),
    "sparrow": (2, "bird", "in towns and fields"),
    "frog": (4, "amphibian", "near ponds"),
    "ant": (6, "insect", "in large colonies"),
    "spider": (8, "arachnid", "in webs and burrows"),
    "horse": (4, "mammal", "on grassland"),
    "penguin": (2, "bird", "on southern coasts"),
    "lizard": (4, "reptile", "in warm and dry places"),
    "bee": (6, "insect", "in hives"),
    "owl": (2, "bird", "in forests and barns"),
}


def rewording(rng: random.Random) -> tuple[str, str]:
    """A sentence in the past, in the passive, or politely."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    base, past = rng.choice(_VERBS)
    kind = rng.choice(("past", "passive", "polite"))
    if kind == "past":
        before = f"Every day I {base} the {item}s with {name}."
        after = f"Every day I {past} the {item}s with {name}."
        task, reason = "in the past tense", f'The verb "{base}" becomes "{past}" in the past tense.'
    elif kind == "passive":
        before = f"{name} {past} the {item}s."
        after = f"The {item}s were {past} by {name}."
        task = "in the passive voice"
        reason = f'The object moves to the front, and the verb becomes "were {past}".'
    else:
        before = f"{name}, {base} the {item}s."
        after = f"{name}, could you please {base} the {item}s?"
        task = "politely"
        reason = 'Asking a question with "could you please" is more polite than a command.'
    question = pick(
        rng,
        f"Rewrite this {task}: {before}",
        f"Say this {task}: {before}",
        f'How would you say "{before}" {task}?',
    )
    lead = pick(rng, "Here is the sentence", "You could say it like this", "This is the sentence")
    return question, f"{lead} {task}:\n\n> {after}\n\n{reason}{closing(rng)}"


def letters(rng: random.Random) -> tuple[str, str]:
    """Words in alphabetical order, or spelled out and counted."""
    if rng.random() < 0.5:
        words = rng.sample(_WORDS, 4)
        ordered = sorted(words)
        question = pick(
            rng, "Sort these words alphabetically: ", "Put these words in alphabetical order: "
        )
        return (
            f"{question}{', '.join(words)}.",
            f"Here are the words in alphabetical order:\n\n{numbered(ordered)}\n\n"
            f'The first word is "{ordered[0]}" and the last word is "{ordered[-1]}".{closing(rng)}',
        )
    word = rng.choice(_WORDS)
    spelled = "-".join(word.upper())
    question = pick(
        rng,
        f'How many letters does the word "{word}" have?',
        f'Spell the word "{word}" and count its letters.',
    )
    return (
        question,
        f'The word "{word}" is spelled {spelled}.\n\nCounting them one by one, it has '
        f"{len(word)} letters.{closing(rng)}",
    )


def facts(rng: random.Random) -> tuple[str, str]:
    """Two animals compared."""
    first, second = rng.sample(sorted(_ANIMALS), 2)
    question = pick(
        rng,
        f"What is the difference between {with_article(first)} and {with_article(second)}?",
        f"Compare these two animals: {first} and {second}.",
    )
    lines = []
    for animal in (first, second):
        legs, kind, home = _ANIMALS[animal]
        lines.append(
            f"**{animal.capitalize()}**: it is {with_article(kind)}, "
            f"has {legs} legs and lives {home}."
        )
    surplus = _ANIMALS[first][0] - _ANIMALS[second][0]
    if surplus == 0:
        verdict = f"Both of them have {legs} legs."
    else:
        most = first if surplus > 0 else second
        verdict = f"The {most} has more legs than the other one, by {abs(surplus)}."
    return question, "Here is a short comparison:\n\n- " + "\n- ".join(lines) + (
        f"\n\n{verdict}{closing(rng)}"
    )
