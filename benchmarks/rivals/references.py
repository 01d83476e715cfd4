"""What the data side is compared with: two usual ways of doing the same, at the same place.

Own code, written from descriptions. Neither is made slow on purpose: the reader does no more than
its description says, and the mask arithmetic uses the same tokenizer (the original used the slow
Python one) and leaves out the padding and the tensors of the original.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rivals.vicuna_like import ASSISTANT, vicuna_text
from transformers import PreTrainedTokenizerBase

from medusa_exp.data import Conversation

Chat = list[dict[str, str]]

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_with_tasks(path: Path) -> list[tuple[str, Chat]]:
    """Read with `json.load`, and have one asyncio task a record build its id and message list.

    Records that are not of the expected form are left out.
    """
    with path.open(encoding="utf-8") as file:
        records = json.load(file)

    async def build_all() -> list[tuple[str, Chat] | None]:
        return await asyncio.gather(*(_build(record) for record in records))

    return [chat for chat in asyncio.run(build_all()) if chat is not None]


async def _build(record: dict[str, Any]) -> tuple[str, Chat] | None:
    try:
        messages = [
            {"role": _ROLES[turn["from"]], "content": turn["value"]}
            for turn in record["conversations"]
        ]
        is_text = all(isinstance(message["content"], str) for message in messages)
        return (record["id"], messages) if messages and is_text else None
    except (KeyError, TypeError):
        return None


@dataclass(frozen=True)
class SummedMask:
    """A sample of `mask_by_lengths`."""

    input_ids: list[int]
    is_trained: list[bool]
    is_lost: bool
    """Did the lengths not add up, so that nothing of it is trained?"""


def mask_by_lengths(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    knows_legacy: bool = True,
) -> list[SummedMask]:
    """Tokenise whole conversations, then every turn and its instruction again, and add up lengths.

    As FastChat's training script does for Vicuna, with its constants for LLaMA: a turn tokenised
    alone begins with BOS, which stands for the end mark that splitting took away; an instruction
    alone has BOS and a last blank too many. With tokenizers that are not `legacy`, later turns are
    one shorter: its first form, of before September 2023, did not know.
    """
    texts = [vicuna_text(conversation, tokenizer.eos_token) for conversation in conversations]
    wholes = tokenizer(texts, return_attention_mask=False, verbose=False).input_ids
    shorter = int(knows_legacy and not getattr(tokenizer, "legacy", True))
    return [_sum_up(*pair, tokenizer, shorter) for pair in zip(texts, wholes, strict=True)]


def _sum_up(
    text: str, whole: list[int], tokenizer: PreTrainedTokenizerBase, shorter: int
) -> SummedMask:
    is_trained = [False] * len(whole)
    place = 1
    for number, turn in enumerate(text.split(tokenizer.eos_token)):
        if not turn:
            break
        instruction, found, _ = turn.partition(f" {ASSISTANT}")
        if not found:
            break
        turn_length = _length(turn, tokenizer)
        instruction_length = _length(instruction + found, tokenizer) - 2
        if number:
            turn_length -= shorter
            instruction_length -= shorter
        start, place = place + instruction_length, place + turn_length
        is_trained[start:place] = [True] * (min(place, len(whole)) - start)
    is_lost = place != len(whole)
    return SummedMask(whole, [False] * len(whole) if is_lost else is_trained, is_lost)


def _length(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, return_attention_mask=False, verbose=False).input_ids)
