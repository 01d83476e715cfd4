"""Rows and a model in; what does not fit together, and what to do about it, out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.conversations import Conversation, DataError
from medusa_exp.data.examples import Example
from medusa_exp.data.template import ChatTemplate
from medusa_exp.decode.settings import stop_ids
from medusa_exp.inspection.rows import Row
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.scoring import Agreement, measure_agreement

_OWN_WORDS, _NEAR = 0.85, 0.7
"""Shares of trained tokens that are the model's first choice. Rules of thumb: greedy answers of the
model itself score near 1, and heads can at best guess what the model would say."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    is_fine: bool
    sentence: str


def examine(
    config: Config,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    rows: Sequence[Row],
    examples: Sequence[Example],
    notes: Sequence[str],
) -> tuple[list[Finding], Agreement]:
    """Look at all that makes heads good in training and bad in serving.

    Args:
        config: of the run.
        backbone: the model that heads are to be trained on.
        tokenizer: with the chat template that they are trained with.
        conversations: some of the data set.
        rows: the same, rendered.
        examples: documents for the model to read.
        notes: what rendering found out about the template.
    """
    agreement = measure_agreement(backbone, examples, "reading replies")
    findings = [
        _vocabulary(backbone, tokenizer),
        _prompt(conversations, rows, tokenizer),
        _bos(rows, tokenizer),
        _eos(rows, tokenizer, stop_ids(config, backbone, tokenizer)),
        *(Finding("chat template", False, f"{note}.") for note in notes),
        _own_words(agreement),
    ]
    return findings, agreement


def _vocabulary(backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Finding:
    size, rows = len(tokenizer), backbone.vocab_size
    sentence = f"the tokenizer has {size} entries, the model's embedding {rows} rows."
    return Finding("vocabulary", size <= rows, sentence)


def _prompt(
    conversations: Sequence[Conversation], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> Finding:
    """Do replies in training begin where the generation prompt ends?"""
    template = ChatTemplate(tokenizer)
    texts = {row.number: row.rendered.text for row in reversed(rows)}
    looked_at = fine = 0
    for number, conversation in enumerate(conversations):
        turn = next((i for i, m in enumerate(conversation.messages) if m.role == "assistant"), 0)
        if number not in texts or not turn:
            continue
        try:
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


def _own_words(agreement: Agreement) -> Finding:
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
