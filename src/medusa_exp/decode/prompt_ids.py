"""What may stand for a prompt: text, token ids, or what a tokenizer returns; made lists of ids.

B rows, T prompt tokens.
"""

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from medusa_exp.errors import UserError

Prompt: TypeAlias = str | Sequence[int] | Tensor | np.ndarray | BatchEncoding
Prompts: TypeAlias = Prompt | Sequence[Prompt]
"""One, or several: a list of prompts, a tensor [B, T], or an encoding of several."""
_TAKEN = (
    "a prompt is text, a list, array or tensor of token ids, or an encoding, which a tokenizer "
    "and its apply_chat_template return"
)


def ids_of_each(
    given: Prompts, tokenizer: PreTrainedTokenizerBase | None, num_ids: int
) -> list[list[int]]:
    """Return the token ids of each prompt, without padding that an encoding marks as such.

    Args:
        given: one prompt, or several.
        tokenizer: for text.
        num_ids: how many the model has.

    Raises:
        UserError: something is no prompt, or no token of the model's; or is text, and there is no
            tokenizer.
    """
    return _checked(_rows(given, tokenizer), num_ids)


def ids_of_one(given: Prompt, tokenizer: PreTrainedTokenizerBase | None, num_ids: int) -> list[int]:
    """Return the token ids of one prompt.

    Raises:
        UserError: as `ids_of_each`, or there are several.
    """
    return _only(_checked(_rows(given, tokenizer), num_ids))


def _checked(rows: list[list[int]], num_ids: int) -> list[list[int]]:
    for row in rows:
        if row and not 0 <= min(row) <= max(row) < num_ids:
            wrong = next(token for token in row if not 0 <= token < num_ids)
            raise UserError(f"{wrong} is no token: ids are integers from 0 to {num_ids - 1}.")
    return rows


def _only(rows: list[list[int]]) -> list[int]:
    if len(rows) != 1:
        raise UserError(f"{len(rows)} prompts stand where one is wanted: {_TAKEN}.")
    return rows[0]


def _rows(given: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    if isinstance(given, str):
        if tokenizer is None:
            raise UserError("a prompt of text needs Decoder(..., tokenizer=...).")
        given = tokenizer(given)
    if isinstance(given, Mapping) and "input_ids" in given:
        rows, mask = _rows(given["input_ids"], None), given.get("attention_mask")
        if mask is None:
            return rows
        return [
            [token for token, is_kept in zip(*both, strict=True) if is_kept]
            for both in zip(rows, _rows(mask, None), strict=True)
        ]
    if isinstance(given, Tensor | np.ndarray):
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise UserError(f"{given!r:.60} is no prompt: {_TAKEN}.")
    if {*map(type, given)} <= {int}:  # the usual case, and prompts are long
        return [[*given]]
    if all(map(_is_id, given)):
        return [[*map(index, given)]]
    return [_only(_rows(prompt, tokenizer)) for prompt in given]


def _is_id(value: Any) -> bool:
    """Is this a whole number, of Python, NumPy or torch?"""
    try:
        index(value)
    except (TypeError, ValueError):  # torch says the second of what has several elements
        return False
    return getattr(value, "ndim", 0) == 0
