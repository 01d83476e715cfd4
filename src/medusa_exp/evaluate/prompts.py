"""Conversations in; prompts to answer out."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.conversations import Conversation, DataError
from medusa_exp.data.rendering import render_prompt
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone

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
    max_positions: int,
) -> list[Prompt]:
    """Return a prompt for every assistant turn that leaves room for an answer.

    Raises:
        UserError: no prompt does.
    """
    limit = min(config.dataset.max_length, max_positions) - config.decode.max_new_tokens
    prompts = []
    too_long = refused = 0
    for conversation in conversations:
        category = category_of(conversation.id)
        for turn, message in enumerate(conversation.messages):
            if message.role != "assistant" or turn == 0:
                continue
            try:
                text = render_prompt(conversation.messages[:turn], tokenizer)
            except DataError:
                refused += 1
                continue
            input_ids = tokenizer(text, add_special_tokens=False).input_ids
            if len(input_ids) > limit:
                too_long += 1
                continue
            prompts.append(Prompt(f"{conversation.id}#{turn}", category, text, input_ids))
    if refused:
        log.warning("%d prompts are left out: the chat template refuses them", refused)
    if too_long:
        log.warning("%d prompts of more than %d tokens are left out", too_long, limit)
    if not prompts:
        raise UserError(
            f"no held-out prompt is left: {refused} are refused by the chat template, {too_long} "
            f"are longer than {limit} tokens, which is what decode.max_new_tokens leaves. Lower "
            "it, or raise dataset.max_length."
        )
    return _merge_many_categories(prompts)


def category_of(conversation_id: str) -> str:
    """Return an id without its running number: arithmetic-000123 is of category arithmetic."""
    return re.sub(r"[-_#]?\d+$", "", conversation_id) or "all"


def stop_ids(
    config: Config, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the ids that end an answer: the model's, the tokenizer's and decode.stop_ids.

    Raises:
        UserError: a configured id is no token of the model.
    """
    for token in config.decode.stop_ids:
        if not 0 <= token < backbone.vocab_size:
            raise UserError(
                f"decode.stop_ids={token} is no token: the model has {backbone.vocab_size}."
            )
    own = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    return frozenset(backbone.eos_token_ids | own | set(config.decode.stop_ids))


def _merge_many_categories(prompts: list[Prompt]) -> list[Prompt]:
    """Put all in one category where ids are names rather than numbered kinds."""
    if len({prompt.category for prompt in prompts}) <= _MAX_CATEGORIES:
        return prompts
    return [Prompt(p.prompt_id, "all", p.text, p.input_ids) for p in prompts]
