"""Texts in which "Human:" and "Assistant:" stand before what each of them says."""

import re
from typing import Any

_TRANSCRIPTS = (
    re.compile(r"(?:\A|\n\n)[ \n]*(Human|Assistant):"),
    re.compile(r"\s*###\s*(Human|Assistant):"),
)


def transcript_in(text: Any) -> list[Any]:
    """Return the turns of a text that begins with "Human:" or "### Human:", else none."""
    if not isinstance(text, str) or not text[:100].lstrip().startswith(("Human:", "###")):
        return []
    for marks in _TRANSCRIPTS:
        pieces = marks.split(text)
        if pieces[0].strip() or pieces[1:2] != ["Human"]:
            continue
        said = zip(pieces[1::2], pieces[2::2], strict=True)
        turns = [{"role": who.lower(), "content": words.strip()} for who, words in said]
        return turns if turns[-1]["content"] else turns[:-1]  # where the answer is to follow
    return []
