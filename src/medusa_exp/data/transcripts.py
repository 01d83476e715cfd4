"""Texts in which "Human:" and "Assistant:" stand before what each of them says.

A text is cut only where it is one as a whole: it may as well speak of a human.
"""

import re
from typing import Any

_WHO = "(Human|Assistant):"
# White space is matched from where it begins: from each of its places, blank lines would take long.
_PARAGRAPHS = re.compile(rf"(?:\A|(?<![ \n])(?=[ \n]*?\n\n))[ \n]*{_WHO}")
_HASHES = re.compile(rf"###\s*{_WHO}")
_STEERED = re.compile(r"(?:\A|\n)<extra_id_1>(User|Assistant)(?:\n|\Z)")
_LINES = re.compile(rf"(?:\A|(?<![ \n]) *\n)[ \n]*{_WHO}")


def transcript_in(text: Any) -> list[Any]:
    """Return the turns of a text that begins with "Human:" or "### Human:", else none."""
    if not isinstance(text, str) or not text[:100].lstrip().startswith(("Human:", "###")):
        return []
    for marks in (_PARAGRAPHS, _HASHES):
        before, names, said = _split(marks, text)
        is_marked = "Assistant" in names or text.startswith("\n\n")
        if before or names[:1] != ["Human"] or not is_marked:
            continue
        turns = _turns(names, said)
        return turns if said[-1] else turns[:-1]  # where the answer is to follow
    return []


def chat_in(text: Any) -> list[Any]:
    """Return the turns of a text that is a whole chat, else none; its marks may begin lines."""
    turns = transcript_in(text)
    if _alternate([turn["role"].title() for turn in turns]) or not isinstance(text, str):
        return turns
    before, names, said = _split(_LINES, text)
    is_whole = not before and _alternate(names) and len(names) % 2 == 0 and said[-1]
    return _turns(names, said) if is_whole else turns


def prompt_in(text: Any) -> list[Any]:
    """Return the turns of a text that the assistant is to continue, else none.

    It ends with "Assistant:"; what stands before the first "Human:" is the system's. Marks may
    begin lines where nothing stands before them.
    """
    if isinstance(text, str) and "<extra_id_1>" in text and (turns := _steered_in(text)):
        return turns
    if not isinstance(text, str) or not text.rstrip().endswith("Assistant:"):
        return transcript_in(text)
    for marks in (_PARAGRAPHS, _HASHES, _LINES):
        before, names, said = _split(marks, text)
        is_whole = _alternate(names) and len(names) % 2 == 0 and not said[-1]
        if is_whole and not (before and marks is _LINES):
            system = [{"role": "system", "content": before}] if before else []
            return system + _turns(names[:-1], said[:-1])
    return transcript_in(text)


def _steered_in(text: str) -> list[Any]:
    """Return the turns of a question with earlier ones, as SteerLM and HelpSteer mark them."""
    before, names, said = _split(_STEERED, text)
    names = ["Human" if name == "User" else name for name in names]
    if before:
        names, said = ["Human", *names], [before, *said]
    if names[-1:] == ["Assistant"] and not said[-1]:  # where the answer is to follow
        names, said = names[:-1], said[:-1]
    is_whole = _alternate([*names, "Assistant"]) and names[-1] == "Human" and all(said)
    return _turns(names, said) if is_whole and "<extra_id_" not in "".join(said) else []


def _split(marks: re.Pattern[str], text: str) -> tuple[str, list[str], list[str]]:
    """Return what stands before the first mark, and for each who speaks and what is said."""
    before, *pieces = marks.split(text)
    return before.strip(), pieces[::2], [words.strip() for words in pieces[1::2]]


def _alternate(names: list[str]) -> bool:
    """Do both speak in turn, the human first?"""
    pattern = ("Human", "Assistant")
    return len(names) > 1 and all(name == pattern[i % 2] for i, name in enumerate(names))


def _turns(names: list[str], said: list[str]) -> list[Any]:
    return [{"role": who.lower(), "content": words} for who, words in zip(names, said, strict=True)]
