"""A number of records in; a JSON file in the size and shape of ShareGPT out, the same every time.

No real chat can be shipped, so this one is made up: about seven turns a record with a heavy tail,
replies several times as long as questions, English-like prose, markdown, code, other scripts, JSON
escapes, some system turns, and some records that cannot be used. About 6 kB a record: 68,000 make
some 420 MB. Passages are drawn from a pool that is escaped once, so that writing takes seconds.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from medusa_exp.data import Conversation, read_conversations

_COMMON = """the of and to a in is that it for you as with on be are this by or from can an at not
have if your which we they will one use but all there has more other when their how some so would
what into them time any these each code data new also may should may function value model number
like first then just need such here only example using make list set get over string it's used many
two way between because system them does after while user where help information different order
most could very about before being through example's provide include create text process work
return type result case based following specific test file water people important world high part
important language however write well same within point good table change small large long story
class object line start next under both state question answer name simple show further without
without every since another must order possible general around name still against during available
current understand note known life several best several step day user's""".split()
_PREFIXES = "re con de in pro trans ex sub inter per com dis over un pre ad".split()
_STEMS = """struct form port duct spect tract ject scrib vert press mit fer cept vent serv sign plic
gress tend pos clud volv cid nov loc mark land wood light stone field work board hand""".split()
_SUFFIXES = "s ed ing ion er or ive able ance ation al ity ally ful less ness".split()
_FOREIGN = """d\u00e9j\u00e0 na\u00efve fa\u00e7ade \u00fcber Stra\u00dfe ma\u00f1ana \u017elu\u0165
\u043f\u0440\u0438\u0432\u0435\u0442 \u0441\u043f\u0430\u0441\u0438\u0431\u043e \u0434\u0430\u043d
\u4f60\u597d \u4e16\u754c \u6a21\u578b \u6570\u636e \u3053\u3093\u306b\u3061\u306f
\ud55c\uad6d\uc5b4 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \U0001f600 \U0001f680
\u2192 \u2264 \u03c0 \u201cquoted\u201d it\u2019s \u2014""".split()

_QUESTION_PASSAGES = (0.3, 0.9)
_REPLY_PASSAGES = (2.35, 0.85)
_ROUNDS = (0.55, 1.0)
"""Mean and deviation of the logarithm: of passages in a turn, of rounds in a conversation."""
_SYSTEM_SHARE = 0.05
_ODD_EVERY = 200
"""One record in so many cannot be used, or only in part."""
ODD = "odd-"
"""How the ids of such records begin."""


def sharegpt_like(directory: Path, num_records: int, seed: int = 0) -> Path:
    """Return a ShareGPT-like file, written if it is not there yet.

    Args:
        directory: where such files are kept from run to run.
        num_records: odd ones included.
        seed: decides every character.
    """
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    path = directory / f"sharegpt-like-{num_records}-{seed}-{code}.json"
    if not path.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write("[\n")
            for number, record in enumerate(_records(num_records, seed)):
                file.write((",\n" if number else "") + record)
            file.write("\n]\n")
        partial.replace(path)
    return path


def usable_conversations(path: Path) -> Iterator[Conversation]:
    """Read such a file, but for the odd records."""
    return (c for c in read_conversations(path) if not c.id.startswith(ODD))


def _records(num_records: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    passages = Passages.draw(rng)
    odd = [passages.odd(kind) for kind in range(len(_ODD_TURNS))]
    for number in range(num_records):
        if number % _ODD_EVERY == _ODD_EVERY - 1:
            yield odd[number // _ODD_EVERY % len(odd)].replace("NUMBER", str(number))
        else:
            yield passages.record(number)


@dataclass
class Passages:
    """Pieces of text, escaped for JSON, and records made of them."""

    rng: random.Random
    sentences: list[str]
    questions: list[str]
    replies: list[str]

    @classmethod
    def draw(cls, rng: random.Random) -> "Passages":
        """Make up the pool."""
        prose = _prose_writer(rng)
        sentences = [_escape(rng, prose(rng.randint(6, 26)) + " ") for _ in range(40_000)]
        blocks = [_escape(rng, _block(rng, prose)) for _ in range(8_000)]
        return cls(rng, sentences, sentences + blocks[:800], sentences + blocks)

    def record(self, number: int) -> str:
        """Return a usable record."""
        rng = self.rng
        turns = []
        if rng.random() < _SYSTEM_SHARE:
            turns.append(_turn("system", self._text(self.questions, _QUESTION_PASSAGES)))
        for _ in range(1 + int(rng.lognormvariate(*_ROUNDS))):
            turns.append(_turn("human", self._text(self.questions, _QUESTION_PASSAGES)))
            turns.append(_turn("gpt", self._text(self.replies, _REPLY_PASSAGES)))
        return _record(f"c{number:06d}_0", ",\n".join(turns))

    def odd(self, kind: int) -> str:
        """Return one of the records that readers stumble over."""
        turns = [
            _turn(role, self._text(self.questions, _QUESTION_PASSAGES)) if role != "null" else _NULL
            for role in _ODD_TURNS[kind].split()
        ]
        return _record(f"{ODD}NUMBER", ",\n".join(turns))

    def _text(self, pool: list[str], size: tuple[float, float]) -> str:
        rng = self.rng
        pieces = rng.choices(pool, k=int(rng.lognormvariate(*size)))
        return "".join(pieces) + rng.choice(self.sentences).removesuffix(" ")  # never all blank


_NULL = '      {\n        "from": "gpt",\n        "value": null\n      }'
_ODD_TURNS = (
    "human null",
    "",
    "human",
    "gpt human gpt",
    "human narrator human gpt",
    "human human gpt",
)
"""Roles of odd records: a value that is null, no turn, no reply, a reply first, an unknown role,
the same role twice."""


def _record(identity: str, turns: str) -> str:
    body = f"[\n{turns}\n    ]" if turns else "[]"
    return f'  {{\n    "id": "{identity}",\n    "conversations": {body}\n  }}'


def _turn(role: str, escaped: str) -> str:
    return f'      {{\n        "from": "{role}",\n        "value": "{escaped}"\n      }}'


def _escape(rng: random.Random, text: str) -> str:
    """Escape for JSON: all but ASCII as it stands or as \\u escapes, as files in the wild have."""
    return json.dumps(text, ensure_ascii=rng.random() < 0.5)[1:-1]


def _prose_writer(rng: random.Random) -> Callable[[int], str]:
    """Return the function from a number of words to a sentence, with frequencies as in prose."""
    rare = [p + s + e for p in ["", *_PREFIXES] for s in _STEMS for e in ["", *_SUFFIXES]]
    rng.shuffle(rare)
    words = [*dict.fromkeys(_COMMON), *rare, *_FOREIGN]
    weights = [(rank + 3) ** -1.3 for rank in range(len(words) - len(_FOREIGN))]
    cumulative = list(accumulate(weights + [2e-4] * len(_FOREIGN)))

    def prose(num_words: int) -> str:
        drawn = rng.choices(words, cum_weights=cumulative, k=num_words)
        if rng.random() < 0.4:
            drawn[num_words // 2] += ","
        if rng.random() < 0.1:
            drawn[-1] = rng.choice((f'"{drawn[-1]}"', f"**{drawn[-1]}**", f"`{drawn[-1]}`"))
        if rng.random() < 0.1:
            drawn[0] = str(rng.randint(1, 9999))
        return " ".join(drawn).capitalize() + rng.choice("....:?!")

    return prose


def _block(rng: random.Random, prose: Callable[[int], str]) -> str:
    kind = rng.random()
    if kind < 0.4:
        return "\n\n"
    if kind < 0.7:
        rows = [f"{n}. {prose(rng.randint(4, 12))}" for n in range(1, rng.randint(3, 8))]
        return "\n\n" + "\n".join(rows) + "\n\n"
    if kind < 0.75:
        cells = [f"| {prose(2)} | {rng.randint(0, 999)} |" for _ in range(4)]
        return "\n\n" + "\n".join(["| What | Value |", "| --- | ---: |", *cells]) + "\n\n"
    if kind < 0.8:
        return f"\n\n## {prose(4)}\r\n\tC:\\{rng.choice(_STEMS)}\\{rng.choice(_STEMS)}\n\n"
    name, other = rng.choice(_STEMS), rng.choice(_STEMS)
    lines = [f'    {name}[{i}] = {other}.get("{prose(1)}", {i})' for i in range(rng.randint(1, 9))]
    return (
        f"\n\n```python\ndef {name}({other}):\n" + "\n".join(lines) + f"\n    return {name}\n```\n"
    )
