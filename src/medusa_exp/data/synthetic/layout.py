"""Tasks whose answer has a form: tables, JSON records, numbered instructions."""

import json
import random

from medusa_exp.data.synthetic.wording import ITEMS, NAMES, closing, numbered, pick, with_article

_CITIES = "Berlin Cairo Lima Madrid Nairobi Oslo Paris Quito Rome Sofia Tokyo Vienna".split()
_JOBS = "teacher nurse baker pilot farmer writer engineer painter doctor chef".split()

_RECIPES = {
    "tea": (
        "Boil fresh water in a kettle.",
        "Put a tea bag into a cup.",
        "Pour the hot water over the tea bag.",
        "Let it steep for about four minutes.",
        "Take out the tea bag and enjoy your tea.",
    ),
    "a boiled egg": (
        "Bring a small pot of water to a boil.",
        "Lower the egg gently into the water.",
        "Let it cook for about seven minutes.",
        "Cool the egg under cold water.",
        "Peel it and add a little salt.",
    ),
    "a paper plane": (
        "Take a sheet of paper and fold it in half lengthwise.",
        "Open it and fold the top corners to the middle line.",
        "Fold the edges to the middle line once more.",
        "Fold the plane in half along the middle line.",
        "Fold down the wings on both sides.",
    ),
    "a sandwich": (
        "Take two slices of bread.",
        "Spread a little butter on each slice.",
        "Put cheese and tomato on one slice.",
        "Cover it with the other slice.",
        "Cut the sandwich in half.",
    ),
    "pancakes": (
        "Mix flour, milk and eggs in a bowl.",
        "Stir until the batter is smooth.",
        "Heat a little butter in a pan.",
        "Pour some batter into the pan.",
        "Turn the pancake when it is golden.",
    ),
    "a plant happy": (
        "Put the plant in a bright place.",
        "Water it when the soil feels dry.",
        "Turn the pot a little every week.",
        "Remove dry leaves from time to time.",
        "Give it a larger pot in spring.",
    ),
}


def table(rng: random.Random) -> tuple[str, str]:
    """A shopping list as a Markdown table, with its total."""
    items = rng.sample(ITEMS, rng.randint(3, 4))
    rows = [(item, rng.randint(1, 9), rng.randint(1, 9)) for item in items]
    wish = ", ".join(f"{count} {item}s at {price} each" for item, count, price in rows)
    lines = [f"| {item} | {count} | {price} | {count * price} |" for item, count, price in rows]
    total = sum(count * price for _, count, price in rows)
    sums = " + ".join(str(count * price) for _, count, price in rows)
    question = pick(
        rng,
        f"Make a table of my shopping list: {wish}.",
        f"Please put this into a table with the costs: {wish}.",
    )
    return (
        question,
        f"{pick(rng, 'Here is your shopping list as a table:', 'Here is the table:')}\n\n"
        "| Item | Quantity | Price | Cost |\n| --- | --- | --- | --- |\n"
        + "\n".join(lines)
        + f"\n\nThe total cost is {sums} = {total}.{closing(rng)}",
    )


def record(rng: random.Random) -> tuple[str, str]:
    """A sentence about a person as JSON."""
    name, city, job = rng.choice(NAMES), rng.choice(_CITIES), rng.choice(_JOBS)
    age, likes = rng.randint(18, 79), rng.sample(ITEMS, 2)
    value = {"name": name, "age": age, "city": city, "job": job, "likes": [f"{x}s" for x in likes]}
    facts = f"{name} is {age} years old, lives in {city}, works as {with_article(job)} and likes "
    question = pick(
        rng,
        "Turn this into JSON: ",
        "Write this as a JSON object: ",
        "Please give me this as JSON. ",
    )
    return (
        f"{question}{facts}{likes[0]}s and {likes[1]}s.",
        f"{pick(rng, 'Here is the JSON object:', 'As JSON, this is:', 'Sure, here it is:')}\n\n"
        f"```json\n{json.dumps(value, indent=2)}\n```{closing(rng)}",
    )


def steps(rng: random.Random) -> tuple[str, str]:
    """Instructions for something simple."""
    thing = rng.choice(sorted(_RECIPES))
    verb = "keep" if thing == "a plant happy" else "make"
    question = pick(
        rng,
        f"How do I {verb} {thing}?",
        f"Explain how to {verb} {thing}.",
        f"Give me simple steps to {verb} {thing}.",
    )
    lead = pick(
        rng,
        f"Here is how to {verb} {thing}:",
        f"It is easy to {verb} {thing}. Just follow these steps:",
        f"To {verb} {thing}, follow these steps:",
    )
    return question, f"{lead}\n\n{numbered(list(_RECIPES[thing]))}{closing(rng)}"
