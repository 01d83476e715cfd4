"""A conversation and a tokenizer in; token ids and what to train on out.

The text is rendered once and tokenised once. Which characters are the assistant's is found by
rendering prefixes of the conversation, and a token is trained when its last character lies in
such a span, the mark that ends the turn included. Token lengths are never added up: tokenising
pieces apart gives other tokens than tokenising the whole.
"""

from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from medusa_exp.data.conversations import Conversation, DataError, Message


@dataclass(frozen=True)
class Rendered:
    """One training sequence of length T."""

    text: str
    input_ids: list[int]
    is_trained: list[bool]
    """Per token: is it the assistant's own output?"""


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """Render with the tokenizer's chat template: one sequence, or one an assistant turn.

    The second form serves templates that render a turn differently once others follow it (Qwen3
    drops earlier reasoning): there, each turn is trained as it is served.

    Raises:
        DataError: the template refuses the conversation, or hides where an answer begins.
    """
    messages = conversation.messages
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    try:
        prompts = {i: render_prompt(messages[:i], tokenizer) for i in turns}
        through = {i: _template(messages[: i + 1], tokenizer) for i in turns}
        whole = _template(messages, tokenizer)
    except DataError as error:
        raise DataError(f"conversation {conversation.id}: {error}") from error
    for i in turns:
        if not through[i].startswith(prompts[i]):
            raise DataError(
                f"conversation {conversation.id}: the chat template renders turn {i} so that it "
                "does not begin with its prompt; where the answer starts cannot be told."
            )
    spans = [(len(prompts[i]), _turn_end(through[i], tokenizer)) for i in turns]
    if all(whole.startswith(through[i]) for i in turns):
        return [_tokenise(whole, spans, tokenizer)]
    return [_tokenise(through[i], [span], tokenizer) for i, span in zip(turns, spans, strict=True)]


def render_prompt(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text after which the assistant is to speak.

    Raises:
        DataError: the template refuses these messages.
    """
    return _template(messages, tokenizer, add_generation_prompt=True)


def check_chat_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raise a DataError that says what is missing, for tokenizers that cannot render chats."""
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer in {place} has no character offsets (tokenizer.json).")
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {place} has no chat template. Put a chat_template.jinja there "
            "(the form that the model was trained with), or set tokenizer.path to a tokenizer "
            "that has one."
        )


def _template(messages: list[Message], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except jinja2.TemplateError as error:  # no ValueError, and raised by templates on purpose
        raise DataError(f"the chat template says: {error}") from error


def _turn_end(through: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where the assistant's last turn ends: after its end mark, before a line break.

    Templates write a line break after the mark; the model stops at the mark and never says it.
    """
    stripped = through.rstrip()
    marks = tuple(tokenizer.all_special_tokens)
    return len(stripped) if stripped.endswith(marks) else len(through)


def _tokenise(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Rendered:
    # The template has written every special token; adding them again would double the BOS.
    # verbose=False: the caller cuts to its own length limit, and counts what it cut.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_trained = [False] * len(encoded.input_ids)
    position = 0
    ends = [end for _, end in encoded.offset_mapping]
    for start, stop in spans:
        while position < len(ends) and ends[position] <= start:
            position += 1
        while position < len(ends) and ends[position] <= stop:
            is_trained[position] = True
            position += 1
    return Rendered(text, encoded.input_ids, is_trained)
