"""The backbone's own answers in the cache: what names them, and where they are read.

Stage regenerate writes them, see `regenerate.py`; training and the feature cache read them.
"""

from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.examples import Examples, open_examples
from medusa_exp.data.tokenized import Tokenized, rows_of_split, select
from medusa_exp.decode.loop import GREEDY
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.settings import limits_of, rule_of
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.files import content_key, settings_in_key
from medusa_exp.train.trainer import AUTOCAST, pick_precision

_OF_ANSWERS = ("num_documents", "num_val_documents", "max_new_tokens")
_NOT_OF_ANSWERS = ("batch_size", "use_heads", "workers")
_OF_RULES = "name temperature top_k top_p epsilon alpha seed verifier".split()
DOCUMENTS, SUMMARY = "documents.arrow", "summary.json"


def open_regenerated(
    config: Config,
    documents: Tokenized,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, Examples, Examples]:
    """Return the key of the backbone's own answers, and the train and val documents with them.

    Raises:
        UserError: stage regenerate has not made them, or they are damaged.
    """
    key = regenerated_key(config, documents, backbone, tokenizer)
    path = regenerated_path(config, key)
    if not (path / SUMMARY).is_file():
        raise UserError(
            "train.text=own: there are no answers of this backbone to this data set yet: put stage "
            "regenerate before train, with the same regenerate.* and decode.*, or set "
            "train.text=data."
        )
    try:
        table, dataset = open_examples(path / DOCUMENTS), config.dataset
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{path}: {DOCUMENTS} is not what was written there ({error}): delete that directory, "
            "and run stage regenerate again."
        ) from error
    train, val = (
        select(table, rows_of_split(table, dataset, split), dataset, split)
        for split in ("train", "val")
    )
    return key, train, val


def regenerated_key(
    config: Config,
    documents: Tokenized,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Name all that decides the answers. Batches are left out: they only move near-ties."""
    settings = settings_in_key(config.regenerate, _OF_ANSWERS, but=_NOT_OF_ANSWERS)
    dataset = config.dataset
    limits = limits_of(config, backbone, tokenizer)
    return content_key(
        documents.summary["key"],
        [dataset.val_fraction, dataset.test_fraction],
        backbone.weights_fingerprint(),
        settings,
        settings_in_key(regeneration_rule(config), _OF_RULES),
        [sorted(limits.stop_ids), list(limits.stop_strings)],
        _precision(config, backbone),
        [metadata.version(name) for name in ("torch", "transformers")],
    )


def regenerated_path(config: Config, key: str) -> Path:
    """Return the directory of the answers of this key."""
    return Path(config.cache_dir) / "regenerated" / key


def regeneration_rule(config: Config) -> AcceptanceRule:
    """Answers are the backbone's own: never those of a rule that is lossy."""
    rule = rule_of(config)
    return replace(GREEDY, seed=rule.seed) if rule.name == "typical" else rule


def _precision(config: Config, backbone: Backbone) -> str:
    return str(AUTOCAST.get(pick_precision(config, backbone.device), backbone.model.dtype))
