"""What the config changes in a tokenizer that is loaded: its chat template and special tokens."""

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from medusa_exp.config import TokenizerConfig
from medusa_exp.errors import UserError

_JINJA = re.compile(r"\{[{%]")

Frame = tuple[list[str], list[str]]
"""The tokens that a tokenizer puts before a text, and behind it."""


def choose_chat_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None, path: str) -> None:
    """Make the wanted template (text, name or file) the tokenizer's only one; None changes nothing.

    Raises:
        UserError: there is no such template, there are several and none is the default, or it is
            no Jinja.
    """
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if wanted is not None:
        named = {"default": _find_template(wanted, named)}
        tokenizer.chat_template = named["default"]
    elif named and "default" not in named:
        raise UserError(
            f"the tokenizer in {path} has the chat templates {', '.join(sorted(named))} and none "
            "of them is the default: set tokenizer.chat_template to a name."
        )
    if named:
        of = f"tokenizer.chat_template={_short(wanted)}" if wanted else f"the one in {path}"
        _check_template(named["default"], of)


def _find_template(wanted: str, named: dict[str, str]) -> str:
    if _JINJA.search(wanted):
        return wanted
    if wanted in named:
        return named[wanted]
    file = Path(wanted).expanduser()
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer.chat_template={_short(wanted)} is neither Jinja text (it has no {{{{ or "
            f"{{%), nor a template's name (the tokenizer ships {', '.join(sorted(named)) or 'none'}"
            f"), nor a file that can be read ({_short(str(file.absolute()))}: "
            f"{getattr(error, 'strerror', None) or error})."
        ) from error


def _check_template(template: str, what: str) -> None:
    if not _JINJA.search(template):
        raise UserError(f"chat template: {what} is no Jinja template: it has no {{{{ or {{%.")
    try:
        # Of no conversations: transformers compiles it, with the tags it knows, and renders none.
        render_jinja_template([], chat_template=template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"chat template: {what} does not compile: line {error.lineno}: {error.message}"
        ) from error


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def set_special_tokens(tokenizer: PreTrainedTokenizerBase, settings: TokenizerConfig) -> None:
    """Add and name special tokens; put BOS and EOS around texts, or not, as the config says.

    Where the config says nothing of that, BOS and EOS stand where they stood, under new names too.

    Raises:
        UserError: BOS or EOS is asked for, and there is none, or the tokenizer puts others there.
    """
    old = _frame(tokenizer)
    is_known = old[0] in ([], [tokenizer.bos_token]) and old[1] in ([], [tokenizer.eos_token])
    _add_special_tokens(tokenizer, settings)
    asked = [
        f"tokenizer.{key}={str(value).lower()}"
        for key in ("add_bos_token", "add_eos_token")
        if (value := getattr(settings, key)) is not None
    ]
    if not is_known and asked:
        raise UserError(
            f"{asked[0]}: {type(tokenizer).__name__} puts {old[0]} before and {old[1]} behind a "
            "text, which are not its bos_token and eos_token: this cannot be changed."
        )
    if is_known:
        wanted = (
            _edge(tokenizer, "bos_token", settings.add_bos_token, bool(old[0])),
            _edge(tokenizer, "eos_token", settings.add_eos_token, bool(old[1])),
        )
        _set_frame(tokenizer, wanted, " and ".join(asked) or "tokenizer.special_tokens")


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, settings: TokenizerConfig) -> None:
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}

    def as_added(content: str) -> AddedToken:
        # A token that is there keeps its ways (some take the blanks behind them), unlike a string.
        token = known.get(content) or AddedToken(content, normalized=False)
        token.special = True
        return token

    tokens: dict[str, Any] = {
        role: as_added(content) for role, content in settings.special_tokens.items()
    }
    if settings.additional_special_tokens:
        tokens["extra_special_tokens"] = [as_added(t) for t in settings.additional_special_tokens]
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)


def _edge(
    tokenizer: PreTrainedTokenizerBase, role: str, asked: bool | None, before: bool
) -> list[str]:
    if not (before if asked is None else asked):
        return []
    token = getattr(tokenizer, role)
    if token is None:
        raise UserError(
            f"tokenizer.add_{role}=true, but the tokenizer has no {role}: set "
            f"tokenizer.special_tokens.{role}."
        )
    return [token]


def _frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    encoded = tokenizer("x")
    tokens = encoded.tokens()
    own = [i for i, sequence in enumerate(encoded.sequence_ids(0)) if sequence is not None]
    return (tokens[: own[0]], tokens[own[-1] + 1 :]) if own else (tokens, [])


def _set_frame(tokenizer: PreTrainedTokenizerBase, wanted: Frame, key: str) -> None:
    """Put tokens around texts, through the post-processor of the backend.

    The arguments add_bos_token and add_eos_token of transformers 5 do not do: each of them, given
    alone, switches the other one off, and both drop the other post-processors.
    """
    if _frame(tokenizer) == wanted:
        return
    backend = tokenizer.backend_tokenizer
    kept = _byte_level(backend.post_processor)
    try:
        template = _template(tokenizer, *wanted)
        backend.post_processor = processors.Sequence([*kept, template]) if kept else template
    except ValueError as error:
        raise UserError(f"{key}: {type(tokenizer).__name__} cannot do this: {error}") from error
    if _frame(tokenizer) != wanted:
        raise UserError(f"{key}: {type(tokenizer).__name__} does not do this.")


def _template(tokenizer: PreTrainedTokenizerBase, before: list[str], behind: list[str]) -> Any:
    single = [*before, "$A", *behind]
    second = [*(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in behind)]
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*before, *behind}]
    return processors.TemplateProcessing(single=single, pair=[*single, *second], special_tokens=ids)


def _byte_level(processor: Any) -> list[Any]:
    """Return the parts of a post-processor that care for offsets, and are to be kept."""
    is_several = isinstance(processor, processors.Sequence)
    parts = list(processor) if is_several else [processor]
    return [part for part in parts if isinstance(part, processors.ByteLevel)]
