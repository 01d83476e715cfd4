"""Conversations in; prompts to answer out."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.conversations import Conversation, DataError
from medusa_exp.data.template import ChatTemplate
from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

_MAX_CATEGORIES = 16


@dataclass(frozen=True)
class Prompt:
    """All that stands before one of the assistant's turns."""

    prompt_id: str
    category: str
    text: str
    input_ids: list[int]


def prompts_of(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    max_positions: int,
    num_prompts: int,
) -> list[Prompt]:
    """Return prompts for the first assistant turns that leave room for an answer.

    Raises:
        UserError: no turn does.
    """
    limit = min(config.dataset.max_length, max_positions) - config.decode.max_new_tokens
    template = ChatTemplate(tokenizer)
    left_out: Counter[str] = Counter()
    prompts: list[Prompt] = []
    for conversation in conversations:
        for prompt in _of_conversation(conversation, tokenizer, template, left_out):
            if len(prompt.input_ids) > limit:
                left_out[f"more than {limit} tokens"] += 1
            elif len(prompts) < num_prompts:
                prompts.append(prompt)
        if len(prompts) == num_prompts:
            break
    for reason, count in left_out.items():
        log.warning("data: prompts left out: %s: %d", reason, count)
    if not prompts:
        why = "; ".join(f"{reason}: {count}" for reason, count in left_out.items())
        raise UserError(
            f"no held-out prompt is left ({why}). decode.max_new_tokens leaves {limit} tokens to "
            "a prompt: lower it, or raise dataset.max_length."
        )
    return _merge_many_categories(prompts)


def _of_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    left_out: Counter[str],
) -> Iterator[Prompt]:
    category = category_of(conversation.id)
    for turn, message in enumerate(conversation.messages):
        if message.role != "assistant" or turn == 0:
            continue
        try:
            text = template.prompt(conversation.messages[:turn])
        except DataError:
            left_out["refused by the chat template"] += 1
            continue
        input_ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        yield Prompt(f"{conversation.id}#{turn}", category, text, input_ids)


def category_of(conversation_id: str) -> str:
    """Return an id without its running number: arithmetic-000123 is of category arithmetic."""
    return re.sub(r"[-_#]?\d+$", "", conversation_id) or "all"


def _merge_many_categories(prompts: list[Prompt]) -> list[Prompt]:
    """Put all in one category where ids are names rather than numbered kinds."""
    if len({prompt.category for prompt in prompts}) <= _MAX_CATEGORIES:
        return prompts
    return [Prompt(p.prompt_id, "all", p.text, p.input_ids) for p in prompts]
