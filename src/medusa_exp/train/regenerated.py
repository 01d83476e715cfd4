"""Regenerated responses in the cache: the key that names them, and the documents with them.

Stage regenerate writes them; training and the feature cache read them.
"""

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from medusa_exp.config import DatasetConfig, RegenerateConfig
from medusa_exp.data.examples import Examples, Table, open_examples
from medusa_exp.data.faults import check_pyarrow
from medusa_exp.data.tokenized import rows_of_split, select
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.files import content_key, read_json, settings_in_key
from medusa_exp.runs.schemas import RegeneratedSummary
from medusa_exp.runs.seals import check
from medusa_exp.train.trainer import AUTOCAST

KIND = "regenerated"
"""Directory of the cache."""
DOCUMENTS, SUMMARY = "documents", "summary.json"
_BEFORE = "documents.arrow"
"""What earlier versions have written: responses take hours, and their runs go on with them."""
_IN_KEY = ("num_documents", "num_val_documents", "max_new_tokens")
_NOT_IN_KEY = ("batch_size", "use_heads", "workers", "server", "server_concurrency")
_DRAWS = 2
"""Counts the ways in which samples have been drawn: 2 is by the seed, the document and its turn."""
_RULE_IN_KEY = "name temperature top_k top_p epsilon alpha seed".split()


def open_regenerated(cache_dir: str, key: str, dataset: DatasetConfig) -> dict[str, Examples]:
    """Return the documents with regenerated responses: of `train`, and of `val` if it has some.

    Raises:
        UserError: stage regenerate has not made them, or they are damaged.
    """
    path = Path(cache_dir) / KIND / key
    if not has_responses(path):
        raise UserError(
            "train.text=regenerated: there are no responses of this backbone to this data set yet: "
            "put stage regenerate before train, with the same regenerate.* (regenerate.server too: "
            "an engine's responses are kept apart) and decode.*, or set train.text=data."
        )
    check(path, "Run stage regenerate again: it makes the responses anew.")
    table = _open(path)
    found = {
        split: select(table, rows_of_split(table, dataset, split), dataset, split)
        for split in ("train", "val")
    }
    return {split: examples for split, examples in found.items() if examples}


def _open(path: Path) -> Table:
    if not (old := path / _BEFORE).is_file():
        return open_examples(path / DOCUMENTS)
    check_pyarrow(f"{old}, of an earlier version,", "an Arrow file")
    from medusa_exp.data.columnar import read_examples

    return read_examples(old)


def has_responses(path: Path) -> bool:
    """Does this directory of the cache hold responses?"""
    try:
        return read_json(path / SUMMARY, kind=RegeneratedSummary) is not None
    except UserError:
        return False


def regenerated_key(
    settings: RegenerateConfig,
    dataset: DatasetConfig,
    *,
    documents_key: str,
    backbone: Backbone,
    rule: AcceptanceRule,
    limits: Limits,
    precision: str,
) -> str:
    """Name all that decides the responses. Batches are left out: they only move near-ties.

    An engine's responses have a name of their own, since its arithmetic is its own: whoever trains
    on them says `regenerate.server` too. Which engine it was, and where, does not count: each is
    held against this backbone before it is asked. Nor do this process's precision and versions
    count then, so that the stage may run with device=cpu beside an engine that has the GPU.

    `documents_key` names the tokenized documents, `precision` is as `pick_precision` has it.
    """
    names, arithmetic = set(_RULE_IN_KEY), list[Any](["engine"])
    if settings.server is None:
        names.add("verifier")
        dtype = str(AUTOCAST.get(precision, backbone.model.dtype))
        arithmetic = [dtype, [metadata.version(name) for name in ("torch", "transformers")]]
    return content_key(
        documents_key,
        [dataset.val_fraction, dataset.test_fraction],
        backbone.weights_fingerprint(),
        settings_in_key(settings, _IN_KEY, but=_NOT_IN_KEY),
        settings_in_key(regeneration_rule(rule), names, but={"verifier"}),
        [sorted(limits.stop_ids), list(limits.stop_strings)],
        *arithmetic,
        *([_DRAWS] if rule.name == "sampling" else []),
    )


def regeneration_rule(rule: AcceptanceRule) -> AcceptanceRule:
    """Return the rule of decoding, or greedy for a lossy one: responses are the backbone's own.

    Drafts are the likeliest tokens, whatever decode.draft says: the key of responses in the cache
    does not tell drafts apart.
    """
    if rule.name == "typical":
        return replace(GREEDY, seed=rule.seed)
    return replace(rule, draft="top")
