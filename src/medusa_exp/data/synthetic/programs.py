"""Small programs: Python functions and SQL queries."""

import random

from medusa_exp.data.synthetic.wording import closing, pick

# task, function name, argument, body, example argument, example result
_FUNCTIONS = (
    (
        "adds up the even numbers of a list",
        "sum_even",
        "numbers",
        "    total = 0\n    for number in numbers:\n        if number % 2 == 0:\n"
        "            total += number\n    return total",
        "[1, 2, 3, 4]",
        "6",
    ),
    (
        "counts the vowels in a text",
        "count_vowels",
        "text",
        '    count = 0\n    for letter in text.lower():\n        if letter in "aeiou":\n'
        "            count += 1\n    return count",
        '"banana"',
        "3",
    ),
    (
        "finds the largest number of a list",
        "find_largest",
        "numbers",
        "    largest = numbers[0]\n    for number in numbers:\n        if number > largest:\n"
        "            largest = number\n    return largest",
        "[3, 9, 4]",
        "9",
    ),
    (
        "reverses the words of a sentence",
        "reverse_words",
        "sentence",
        '    words = sentence.split()\n    words.reverse()\n    return " ".join(words)',
        '"one two three"',
        "three two one",
    ),
    (
        "computes the factorial of a number",
        "factorial",
        "number",
        "    result = 1\n    for factor in range(2, number + 1):\n        result *= factor\n"
        "    return result",
        "5",
        "120",
    ),
    (
        "says whether a word is a palindrome",
        "is_palindrome",
        "word",
        "    word = word.lower()\n    return word == word[::-1]",
        '"level"',
        "True",
    ),
    (
        "squares every number of a list",
        "square_all",
        "numbers",
        "    squares = []\n    for number in numbers:\n        squares.append(number * number)\n"
        "    return squares",
        "[1, 2, 3]",
        "[1, 4, 9]",
    ),
    (
        "counts how often each word occurs in a text",
        "count_words",
        "text",
        "    counts = {}\n    for word in text.split():\n"
        "        counts[word] = counts.get(word, 0) + 1\n    return counts",
        '"a b a"',
        "{'a': 2, 'b': 1}",
    ),
)

_TABLES = {
    "customers": ("name", "city", "age"),
    "orders": ("customer", "total", "date"),
    "books": ("title", "author", "year"),
    "products": ("name", "price", "stock"),
    "students": ("name", "grade", "school"),
}


def program(rng: random.Random) -> tuple[str, str]:
    """A Python function with a docstring, an example and an explanation."""
    task, name, argument, body, example, result = rng.choice(_FUNCTIONS)
    question = pick(
        rng,
        f"Write a Python function that {task}.",
        f"How do I write a function in Python that {task}?",
        f"I need a Python function that {task}. Can you help?",
    )
    lead = pick(
        rng,
        f"Here is a Python function that {task}:",
        f"Sure! This function {task}:",
        f"You can do it like this. The function {task}:",
    )
    doc = pick(rng, f'    """Return the result for {argument}."""\n', "", "")
    explanation = pick(
        rng,
        f"For example, `{name}({example})` returns `{result}`.",
        f"You can call it like this:\n\n```python\nprint({name}({example}))  # {result}\n```",
    )
    return (
        question,
        f"{lead}\n\n```python\ndef {name}({argument}):\n{doc}{body}\n```\n\n"
        f"{explanation}{closing(rng)}",
    )


def query(rng: random.Random) -> tuple[str, str]:
    """A SQL query over a small table."""
    table = rng.choice(sorted(_TABLES))
    columns = _TABLES[table]
    wanted, ordered = rng.sample(columns, 2)
    limit = rng.randint(3, 20)
    direction, words = rng.choice((("DESC", "largest first"), ("ASC", "smallest first")))
    question = pick(
        rng,
        f"Write a SQL query for the {wanted} of the first {limit} {table} by {ordered}, {words}.",
        f"In SQL, how do I list the {wanted} of {limit} {table}, sorted by {ordered}, {words}?",
    )
    return (
        question,
        f"{pick(rng, 'You can use this query:', 'This query does it:', 'Here is the query:')}\n\n"
        f"```sql\nSELECT {wanted}\nFROM {table}\nORDER BY {ordered} {direction}\n"
        f"LIMIT {limit};\n```\n\nThe `ORDER BY` clause sorts the {table} by {ordered}, {words}, "
        f"and `LIMIT {limit}` keeps only the first {limit} rows.{closing(rng)}",
    )
