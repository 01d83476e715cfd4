"""Load a tokenizer that renders chats and fits the backbone; save it beside the heads.

What the config says (chat template, special tokens, BOS and EOS, sides) goes on top of what the
tokenizer's own files say, and is then looked for in what the tokenizer does: transformers 5 takes
several options without a word and without effect.
"""

import hashlib
import json
import logging
import re
import shutil
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from jinja2 import TemplateSyntaxError
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from medusa_exp.config import TokenizerConfig
from medusa_exp.data.template import check_chat_template
from medusa_exp.data.template_probe import refusal
from medusa_exp.errors import UserError
from medusa_exp.model.source import ModelSpec, first_lines
from medusa_exp.runs.files import read_json, sync, write_json

log = logging.getLogger(__name__)

SOURCE_FILE = "tokenizer_source.json"
_LIBRARIES = ("transformers", "tokenizers")
_SENTENCEPIECE = (
    "it has no tokenizer.json, only a SentencePiece model, which takes a library to read: pip "
    "install 'medusa-exp[sentencepiece]'."
)
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
_NO_FILES = (
    "it has no tokenizer files, such as tokenizer.json. Copy them there from where the model is "
    "from, or set tokenizer.path to a directory that has them."
)
_JINJA = re.compile(r"\{[{%]")

Frame = tuple[list[str], list[str]]
"""The tokens that a tokenizer puts before a text, and behind it."""


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the options of the config, and check that it is of use.

    Raises:
        UserError: it cannot be loaded, cannot do what an option asks for, has no chat template or
            one that is no Jinja, or has tokens that the model has no row for.
    """
    path = spec.tokenizer_path()
    tokenizer = _read(spec, path)
    choose_chat_template(tokenizer, spec.tokenizer.chat_template, path)
    check_chat_template(tokenizer, path)
    _check_vocabulary(tokenizer, path)
    set_special_tokens(tokenizer, spec.tokenizer)
    if spec.has_model:
        _check_fit(tokenizer, spec, path)
    return tokenizer


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest id plus one: the rows that a model needs (`len` overlooks gaps)."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Return the sha256 of what decides a text's ids and of the chat template.

    With the version of transformers and the text this names the tokens, whatever the config said.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for last_call in ("padding", "truncation"):  # what the last call was asked for
        backend.pop(last_call, None)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return {
        "backend_sha256": _sha256(json.dumps(backend, sort_keys=True)),
        "chat_template_sha256": None if template is None else _sha256(template),
    }


def differences(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[str]:
    """Return in what a tokenizer differs from that saved beside heads: tokens, chat template.

    Only where the same versions of the libraries have read both can it be told: others may write
    the same tokenizer differently.
    """
    saved = read_json(directory / SOURCE_FILE, {})
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    if not isinstance(saved, dict) or saved.get("versions") != versions:
        return []
    now = fingerprint(tokenizer)
    names = {"backend_sha256": "tokens", "chat_template_sha256": "chat template"}
    return [name for key, name in names.items() if saved.get(key) != now[key]]


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, directory: str | Path
) -> None:
    """Write the tokenizer beside the heads, for `AutoTokenizer.from_pretrained(directory)`.

    `tokenizer_source.json` beside it says what it was made of.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.partial-") as name:
        partial = Path(name)
        tokenizer.save_pretrained(partial)
        _pin_class(tokenizer, partial / "tokenizer_config.json")
        write_json(partial / SOURCE_FILE, _source(tokenizer, spec))
        sync(partial)
        for file in sorted(partial.iterdir()):  # chat_templates/ is a directory
            if (target / file.name).is_dir():
                shutil.rmtree(target / file.name)
            file.replace(target / file.name)


def _read(spec: ModelSpec, path: str) -> PreTrainedTokenizerBase:
    settings = spec.tokenizer
    chosen = _tokenizer_class(settings.tokenizer_class)
    is_own = spec.has_model and path == spec.model_path()
    options: dict[str, Any] = spec.hub_options() if is_own else {}
    if chosen is not AutoTokenizer:  # means "no rebuilding" to a class of transformers
        options.pop("trust_remote_code", None)
    # As arguments, and not set on the tokenizer: only these does save_pretrained write down.
    for key in ("model_max_length", "padding_side", "truncation_side"):
        if (value := getattr(settings, key)) is not None:
            options[key] = value
    try:
        return chosen.from_pretrained(path, **options)
    except Exception as error:  # the reader in Rust raises bare Exceptions
        said = first_lines(error)
        if "tiktoken" in str(error) or "sentencepiece" in str(error).lower():
            if Path(path).is_dir() and not any(map(any, map(Path(path).glob, _VOCABULARIES))):
                said = _NO_FILES  # of which transformers says that a library is missing
            elif not find_spec("sentencepiece"):
                said = _SENTENCEPIECE
        raise UserError(f"the tokenizer in {path} cannot be loaded: {said}") from error


def _tokenizer_class(name: str) -> Any:
    if name == "auto":
        return AutoTokenizer
    try:
        found = getattr(transformers, name, None)
    except ImportError:  # transformers knows it, but not how to import it here
        found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
        raise UserError(
            f"tokenizer.tokenizer_class={name} is no tokenizer class of transformers: use auto, "
            "PreTrainedTokenizerFast, or a class such as LlamaTokenizer or Qwen2Tokenizer."
        )
    if not issubclass(found, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer.tokenizer_class={name} is not a fast one, which character offsets need: "
            "use auto or PreTrainedTokenizerFast."
        )
    return found


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
    if (why := refusal(template)) is not None:
        raise UserError(f"chat template: {what} is refused, for {why}. Use another template.")
    try:
        # Of no conversations: transformers compiles it, with the tags it knows, and renders none.
        render_jinja_template([], chat_template=template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"chat template: {what} does not compile: line {error.lineno}: {error.message}"
        ) from error


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """transformers makes an empty vocabulary of files that it cannot use, and says nothing."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UserError(
            f"the tokenizer in {path} has no tokens but {' '.join(tokenizer.all_special_tokens)}: "
            f"{type(tokenizer).__name__} found no vocabulary in its files. A tokenizer.json there, "
            "or another tokenizer.tokenizer_class, would help."
        )


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


def _check_fit(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, path: str) -> None:
    model = spec.model_path()
    rows = spec.model_config().get_text_config().vocab_size
    outside = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if outside and not spec.tokenizer.resize_embedding:
        names = ", ".join(repr(token) for _, token in outside[:8]) + ", ..." * (len(outside) > 8)
        raise UserError(
            f"the tokenizer in {path} has {len(tokenizer)} entries, the model in {model} only "
            f"{rows}: no row for {names}. Set tokenizer.path to the model's own tokenizer, or "
            "tokenizer.resize_embedding=true to add rows (heads then fit the larger model alone). "
            "If its class adds them to what tokenizer.json has, take it as it stands by "
            "tokenizer.tokenizer_class=PreTrainedTokenizerFast."
        )
    if 2 * len(tokenizer) < rows:
        log.warning(
            "the tokenizer in %s has %d entries, the model in %s has %d: do they belong together?",
            *(path, len(tokenizer), model, rows),
        )


def _pin_class(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Have the saved tokenizer read as tokenizer.json stands.

    Its own class may build it anew from the vocabulary, in each version of transformers in another
    way; what it has set as a class, and not as options, must then be said.
    """
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("padding_side", "truncation_side", "model_input_names"):
        saved[key] = getattr(tokenizer, key)
    write_json(file, saved)


def _source(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> dict[str, Any]:
    path = spec.tokenizer_path()
    default, settings = asdict(TokenizerConfig()), asdict(spec.tokenizer)
    return {
        "path": str(Path(path).resolve()) if Path(path).exists() else path,
        "revision": spec.model.revision if path == spec.model_path() else None,
        "class": type(tokenizer).__name__,
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
        **fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "overrides": {k: v for k, v in settings.items() if k != "path" and v != default[k]},
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
