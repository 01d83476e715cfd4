"""The doctor of stage inspect: do data, chat template and model fit together, and what if not?

Looks at rows of conversations token by token: which role wrote each, and whether it is trained.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from medusa_exp.data import Conversation, DataError
from medusa_exp.data.rendering import MaskedTokens, Renderer
from medusa_exp.data.template import ChatTemplate, to_chat
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.scoring import Agreement

TEMPLATE = "template"
"""The role of what no message says: headers, marks, blanks."""
_OWN_WORDS, _NEAR = 0.85, 0.7
"""Shares of trained tokens that are the model's first choice. Rules of thumb: greedy answers of the
model itself score near 1, and heads can at best predict what the model would say."""


@dataclass(frozen=True)
class Row:
    """A rendered row of T tokens."""

    conversation_id: str
    source: str
    number: int
    """Number of its conversation among those that were sampled."""
    rendered: MaskedTokens
    roles: list[str]
    """Per token: system, user, assistant, tool or template."""
    pieces: list[str]
    """Per token: the part of the text that it adds."""


def sample_rows(
    conversations: Iterable[tuple[str, Conversation]],
    tokenizer: PreTrainedTokenizerBase,
    notes: Iterable[str] = (),
) -> list[Row]:
    """Render conversations of named sources; those that the template refuses are passed over.

    `notes` on the template that are known need not be logged again.
    """
    sourced = list(conversations)
    renderer = Renderer(tokenizer)
    renderer.template.notes.update(notes)
    results = renderer.render_many(conversation for _, conversation in sourced)
    rows = []
    for number, result in enumerate(results):
        source, conversation = sourced[number]
        for rendered in [] if isinstance(result, DataError) else result:
            offsets = tokenizer(
                rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            ).offset_mapping
            written = _writers(rendered.text, conversation)
            roles = [written[end - 1] if end else TEMPLATE for _, end in offsets]
            pieces = _pieces(rendered.text, offsets)
            rows.append(Row(conversation.id, source, number, rendered, roles, pieces))
    return rows


def count_roles(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, int]]]:
    """Return source -> role -> {tokens, trained tokens}."""
    tokens: Counter[tuple[str, str]] = Counter()
    trained: Counter[tuple[str, str]] = Counter()
    for row in rows:
        tokens.update((row.source, role) for role in row.roles)
        marked = zip(row.roles, row.rendered.is_trained, strict=True)
        trained.update((row.source, role) for role, is_trained in marked if is_trained)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (source, role), number in tokens.most_common():
        entry = {"tokens": number, "trained tokens": trained[source, role]}
        found.setdefault(source, {})[role] = entry
    return found


def count_runs(rows: Iterable[Row]) -> dict[str, int]:
    """Look for masks shifted by one: does each run of trained tokens begin and end with a reply?

    Where replies stand is looked up here by their words, which the mask knows nothing of. A run in
    which no words were found (an empty reply's end mark; a reply that the template edits) says
    neither yes nor no.
    """
    total = right = undecided = 0
    for row in rows:
        is_reply = np.array([role == "assistant" for role in ["", *row.roles, ""]])
        mask = np.array([0, *row.rendered.is_trained, 0])
        starts, stops = np.flatnonzero(np.diff(mask) == 1), np.flatnonzero(np.diff(mask) == -1)
        for start, stop in zip(starts, stops, strict=True):  # of roles: start + 1 to stop, included
            if set(row.roles[start:stop]) == {TEMPLATE}:
                undecided += 1
                continue
            begins = is_reply[start + 1] and not is_reply[start]
            total += 1
            right += bool(begins and not is_reply[stop + 1])
    return {
        "runs": total,
        "runs from edge to edge of a reply": int(right),
        "runs that could not be checked": undecided,
    }


def _writers(text: str, conversation: Conversation) -> list[str]:
    """Return per character the role of the message it was found in, one message after another.

    A message that the template edits is not found, and counts as the template's; a very short one
    may be found in a header before it.
    """
    written = [TEMPLATE] * len(text)
    cursor = 0
    for message in to_chat(conversation.messages):
        for content in (message.get("reasoning_content", "").strip(), message["content"].strip()):
            place = text.find(content, cursor) if content else -1
            if place >= 0:
                cursor = place + len(content)
                written[place:cursor] = [message["role"]] * len(content)
    return written


def _pieces(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """Cut a text at the ends of tokens; together the pieces are the text."""
    pieces = []
    position = 0
    for _, end in offsets:
        pieces.append(text[position : max(position, end)])
        position = max(position, end)
    if pieces:
        pieces[-1] += text[position:]
    return pieces


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    is_fine: bool
    sentence: str


def examine_text(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    conversations: Sequence[Conversation],
    rows: Sequence[Row],
) -> list[Finding]:
    """Look for what makes heads good in training and bad in serving; no model reads anything.

    `stop_ids` end a response, and `rows` are the conversations rendered.
    """
    return [
        _vocabulary(backbone, tokenizer),
        _prompt(conversations, rows, tokenizer),
        _bos(rows, tokenizer),
        _eos(rows, tokenizer, stop_ids),
    ]


def _vocabulary(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Finding:
    size, rows = len(tokenizer), backbone.vocab_size
    sentence = f"the tokenizer has {size} entries, the model's embedding {rows} rows."
    return Finding("vocabulary", size <= rows, sentence)


def _prompt(
    conversations: Sequence[Conversation], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Finding:
    """Do replies in training begin where the generation prompt ends?"""
    every_template = ChatTemplate(tokenizer)
    texts = {row.number: row.rendered.text for row in reversed(rows)}
    looked_at = fine = 0
    for number, conversation in enumerate(conversations):
        turn = next((i for i, m in enumerate(conversation.messages) if m.role == "assistant"), 0)
        if number not in texts or not turn:
            continue
        try:
            template = every_template.with_tools(conversation.tools)
            prompt = template.prompt(conversation.messages[:turn])
        except DataError:
            continue
        looked_at += 1
        rest = texts[number].removeprefix(prompt)
        reply = conversation.messages[turn].content.strip()
        fine += rest != texts[number] and rest.lstrip().startswith(reply[:20])
    sentence = f"{fine} of {looked_at} first replies begin where the generation prompt ends."
    if fine < looked_at:
        sentence += (
            " The others follow other text in training than in serving: look at the samples, and "
            "at the template's generation prompt."
        )
    return Finding("generation prompt", fine == looked_at, sentence)


def _bos(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Finding:
    bos = tokenizer.bos_token_id
    if bos is None:
        return Finding("BOS", True, "the tokenizer has none.")
    times = Counter(row.rendered.input_ids[:2].count(bos) for row in rows)
    words = ", ".join(
        f"{times[n]} rows start with {n} x {tokenizer.bos_token}" for n in sorted(times)
    )
    return Finding("BOS", len(times) < 2 and max(times, default=0) < 2, f"{words}.")


def _eos(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, stops: frozenset[int]) -> Finding:
    """Does what ends a reply in training end an answer in serving?"""
    last = Counter(
        [i for i, t in zip(row.rendered.input_ids, row.rendered.is_trained, strict=True) if t][-1]
        for row in rows
        if any(row.rendered.is_trained)
    )
    if not last:
        return Finding("EOS", False, "no row has a trained token.")
    token, count = last.most_common(1)[0]
    word = tokenizer.convert_ids_to_tokens(token)
    sentence = f"{count} of {last.total()} rows end their last reply with {word} (id {token})"
    if token in stops:
        return Finding("EOS", True, f"{sentence}, which ends an answer.")
    advice = f", which does not end an answer: set decode.stop_ids=[{token}] if it should."
    return Finding("EOS", False, sentence + advice)


def own_words(agreement: Agreement) -> Finding:
    """Say how near the replies are to what the model would say, who has read them."""
    share = agreement.top1
    sentence = (
        f"on {agreement.num_tokens} trained tokens the model has {agreement.nats_per_token:.2f} "
        f"nats a token, and {share:.0%} of them are its own first choice: "
    )
    if share >= _OWN_WORDS:
        return Finding("replies", True, sentence + "this is nearly what it says itself.")
    if share >= _NEAR:
        sentence += "near to what it says itself; heads gain if it answers the prompts anew."
        return Finding("replies", True, sentence)
    sentence += "far from what it says itself; let it answer the prompts, and train on its answers."
    return Finding("replies", False, sentence)
