"""A tokenizer and chats in; how fast and how well they are rendered, tokenised and masked, out."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import Row, best_seconds
from rivals.references import SummedMask, mask_by_lengths
from sharegpt_like import usable_conversations
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medusa_exp.data import Conversation, DataError, MaskedTokens
from medusa_exp.data.rendering import Renderer

_MASKED = 1500
"""Conversations to mask."""
_CHUNK = 256
"""Conversations that are masked together, as when a data set is tokenised."""


def mask_rows(data: Path, directory: Path, repeats: int) -> list[Row]:
    """Render, tokenise and mask on one core, with the tokenizer in a directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    conversations = list(islice(usable_conversations(data), _MASKED))
    renderer = Renderer(tokenizer)
    rendered = _render(renderer, conversations)
    samples = [row for rows in rendered for row in rows]
    texts = [sample.text for sample in samples]
    _check_ids(samples, tokenizer)
    summed = mask_by_lengths(conversations, tokenizer)
    ours, bare, theirs = best_seconds(
        repeats,
        lambda: _render(renderer, conversations),
        lambda: _encode(tokenizer, texts),
        lambda: mask_by_lengths(conversations, tokenizer),
    )
    tokens = sum(len(sample.input_ids) for sample in samples)
    their_tokens = sum(len(sample.input_ids) for sample in summed)
    faults = _faults(conversations, rendered, tokenizer)
    first_form = mask_by_lengths(conversations, tokenizer, knows_legacy=False)
    their_faults = _faults(conversations, [[sample] for sample in summed], tokenizer)
    details = {
        "tokenizer": directory.name,
        "conversations": len(conversations),
        "tokens": tokens,
        "trained share": sum(sum(sample.is_trained) for sample in samples) / tokens,
    }
    return [
        _mask_row("mask / bare encode_batch", 0.6, tokens / ours, tokens / bare, details),
        _mask_row(
            "mask / added lengths",
            5,
            tokens / ours,
            their_tokens / theirs,
            {"tokens of the reference": their_tokens, "ratio of bare encode_batch": theirs / bare},
        ),
        Row(
            "mask, samples lost or wrong",
            "",
            faults,
            "0",
            faults == 0,
            their_faults,
            details={
                "of": len(conversations),
                "lost by the reference": sum(sample.is_lost for sample in summed),
                "lost by its first form": sum(sample.is_lost for sample in first_form),
            },
        ),
    ]


def _mask_row(what: str, bar: float, ours: float, reference: float, details: dict[str, Any]) -> Row:
    ratio = ours / reference
    return Row(
        what, "M tokens/s", ours / 1e6, f">= {bar}x", ratio >= bar, reference / 1e6, ratio, details
    )


def _render(renderer: Renderer, conversations: list[Conversation]) -> list[list[MaskedTokens]]:
    rendered: list[list[MaskedTokens]] = []
    for start in range(0, len(conversations), _CHUNK):
        for rows in renderer.render_many(conversations[start : start + _CHUNK]):
            rendered.append([] if isinstance(rows, DataError) else rows)
    return rendered


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Any]:
    backend = tokenizer.backend_tokenizer
    return [
        encoding
        for start in range(0, len(texts), _CHUNK)
        for encoding in backend.encode_batch(
            texts[start : start + _CHUNK], add_special_tokens=False
        )
    ]


def _check_ids(samples: list[MaskedTokens], tokenizer: PreTrainedTokenizerBase) -> None:
    encodings = _encode(tokenizer, [sample.text for sample in samples])
    for sample, encoding in zip(samples, encodings, strict=True):
        assert sample.input_ids == encoding.ids, f"other ids than bare ones: {sample.text[:200]}"


def _faults(
    conversations: list[Conversation],
    rendered: Sequence[Sequence[MaskedTokens | SummedMask]],
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Count conversations whose trained tokens do not spell their replies, blanks apart."""
    faults = 0
    for conversation, samples in zip(conversations, rendered, strict=True):
        ids = [i for s in samples for i, m in zip(s.input_ids, s.is_trained, strict=True) if m]
        said = "".join(m.content for m in conversation.messages if m.role == "assistant")
        trained = tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        faults += "".join(trained.split()) != "".join(said.split())
    return faults
