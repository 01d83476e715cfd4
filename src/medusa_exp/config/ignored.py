"""Keys that have no effect beside the choices of others: which, and what would use them.

Somebody who gives such a key on the command line expects it to do something. It is said, in a line
that names the choice which would use it, and not refused: a sweep may try several choices.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from medusa_exp.config.command_line import parsed
from medusa_exp.config.schema import Config

log = logging.getLogger(__name__)

_SET = "something"
"""In place of a word: any value but null, 0, false and none of a list."""


@dataclass(frozen=True)
class Use:
    """Some keys, and the choices of which one at least has to be made for them to matter."""

    keys: tuple[str, ...]
    """Each may end in `.*`: all keys below."""
    of: tuple[tuple[str, tuple[str, ...]], ...]
    """A key, and the words for it; where it holds a list, one word in it is enough."""

    def is_met(self, config: Config) -> bool:
        """Say whether a config makes one of the choices."""
        return any(_is_one(_value(config, key), words) for key, words in self.of)

    def wanted(self, config: Config) -> str:
        """Return the choices in words, with what the config has instead."""
        each = (
            f"{key}={' or '.join(words)} (it is {_word(_value(config, key))})"
            for key, words in self.of
        )
        return ", or with ".join(each)


def _use(*keys: str, **of: str) -> Use:
    """Make a row; `head__kind="a b"` stands for the words a and b of head.kind."""
    named = ((key.replace("__", "."), tuple(words.split())) for key, words in of.items())
    return Use(keys, tuple(named))


USES = (
    _use("dataset.num_conversations", dataset__kind="synthetic"),
    _use("dataset.hub_split", dataset__kind="hub"),
    _use("dataset.path", "dataset.sources.*", dataset__kind="sharegpt hub"),
    _use("dataset.deduplicate", "dataset.sample_fraction", dataset__kind="sharegpt hub"),
    _use(
        *("dataset.form", "dataset.columns", "dataset.role_map", "dataset.strict"),
        *("dataset.min_turns", "dataset.max_turns", "dataset.min_chars", "dataset.max_chars"),
        "dataset.max_record_bytes",
        dataset__kind="sharegpt hub",
        evaluate__path=_SET,
    ),
    _use("tokenizer.vocab_size", tokenizer__kind="trained"),
    _use("tokenizer.path", "tokenizer.tokenizer_class", tokenizer__kind="auto"),
    _use("model.path", "model.revision", "model.trust_remote_code", model__kind="pretrained"),
    _use("model.pretrain.*", model__kind="tiny"),
    _use("train.lora.*", train__kind="medusa2"),
    _use("train.epochs", "train.min_steps", train__max_steps="null"),
    _use("train.top_k", train__loss="topk_kl", train__teacher="top_k"),
    _use("train.teacher", train__loss="tv nla lk auto"),
    _use("train.lk_decay", train__loss="lk"),
    _use("train.feature_workers", train__features="cache"),
    _use("train.val_tree_nodes", "train.patience", train__val_prompts=_SET),
    _use("train.max_failures", train__strategy="ray"),
    _use(
        *("regenerate.num_documents", "regenerate.num_val_documents", "regenerate.max_new_tokens"),
        *("regenerate.server", "regenerate.workers", "regenerate.use_heads"),
        stages="regenerate",
        train__text="regenerated",
    ),
    _use("regenerate.server_concurrency", regenerate__server=_SET),
    _use("tree.path", "tree.paths", tree__kind="custom"),
    _use("tree.num_nodes", tree__kind="calibrated dynamic"),
    _use("decode.temperature", decode__rule="sampling typical"),
    _use("decode.top_k", "decode.top_p", "decode.draft", decode__rule="sampling"),
    _use("decode.epsilon", "decode.alpha", decode__rule="typical"),
    _use("evaluate.server_concurrency", evaluate__server=_SET),
    _use("serving.*", regenerate__server=_SET, evaluate__server=_SET),
    _use("export.*", stages="export"),
    _use("inspect.*", stages="inspect"),
    _use(
        *("logger.mode", "logger.project", "logger.entity", "logger.group", "logger.job_type"),
        *("logger.tags", "logger.notes", "logger.artifacts"),
        logger__kind="wandb",
    ),
)
"""Every key that a choice of another ignores."""


_OF_TRAINING = Use(("head", "head.*", "train.*"), ())
"""What says how heads are trained."""
_LATER_TOO = ("train.kind", "train.text", "train.val_tree_nodes")
"""Of that, what later stages read: which backbone decodes, and what `evaluate` finds causes by."""
_BEFORE_HEADS = {"pretrain", "inspect", "regenerate", "train"}
"""Stages of a run whose heads are still to be trained, by this call or a later one."""


def say_ignored(config: Config, overrides: Iterable[str]) -> None:
    """Warn of each key that these overrides, of a command line, give in vain.

    A value that is the default is passed over: it may be there to say that it is.
    """
    stages = ",".join(map(str, config.stages))
    has_heads = bool(stages) and not _BEFORE_HEADS & {*config.stages}
    for key in sorted(set(keys_of(overrides))):
        rows = (row for row in USES if _names(row, key))
        is_default = _value(config, key) == _value(Config(), key)
        for row in rows:
            if not is_default and not row.is_met(config):
                # Not its value, which may come from the environment.
                log.warning("%s has no effect: it is used with %s", key, row.wanted(config))
        is_of_training = _names(_OF_TRAINING, key) and key not in _LATER_TOO
        if has_heads and is_of_training and not is_default:
            log.warning(
                "%s has no effect: it is for stage train, which stages=[%s] leaves out, and the "
                "heads are those that are there",
                *(key, stages),
            )


def keys_of(overrides: Iterable[str]) -> Iterator[str]:
    """Yield the keys that overrides name; of a section that is given whole, those in it."""
    for override in overrides:
        one = parsed(override)
        if not (one.is_delete() or one.is_sweep_override()):
            yield from _leaves(str(one.key_or_group), one.value())


def _names(row: Use, key: str) -> bool:
    return any(
        key.startswith(name[:-1]) if name.endswith(".*") else key == name for name in row.keys
    )


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value and is_dataclass(_value(Config(), key)):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key


def _value(config: Any, key: str) -> Any:
    """Return what stands under a key with dots, None where there is nothing."""
    for name in key.split("."):
        config = getattr(config, name, None)
    return config


def _is_one(value: Any, words: tuple[str, ...]) -> bool:
    if words == (_SET,):
        return bool(value)
    found = value if isinstance(value, list) else [value]
    return any(_word(one) in words for one in found)


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
