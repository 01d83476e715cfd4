"""Documents and backbone in; its hidden states of them in the cache out, made once.

Whatever the heads, the frozen backbone's hidden states stay the same: a second training on them
runs no layer of it, nor does it load one.

P positions, B batch, T time, D hidden.
"""

import json
import logging
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from medusa_exp.config import Config
from medusa_exp.data.examples import Examples
from medusa_exp.data.feature_cache import FORMAT, Features, stored_positions
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.files import content_key, publish, settings_in_key, sha256_file, write_json
from medusa_exp.train.feature_writing import write_features
from medusa_exp.train.trainer import pick_precision

log = logging.getLogger(__name__)

_OF_TOKENIZERS = (
    *("kind", "path", "vocab_size", "tokenizer_class", "model_max_length", "padding_side"),
    *("truncation_side", "add_bos_token", "add_eos_token", "chat_template", "special_tokens"),
    *("additional_special_tokens", "resize_embedding"),
)


def open_features(
    config: Config,
    documents: dict[str, Examples],
    data_key: str,
    ends: Backbone,
    body: Callable[[], Backbone],
) -> dict[str, Features]:
    """Return the hidden states of some lists of documents, which are made where there are none.

    Args:
        config: what decides them besides the documents.
        documents: of each split.
        data_key: names all documents.
        ends: the backbone, perhaps without its layers.
        body: loads it with them.

    Raises:
        UserError: the disk is too small, or what lies there is damaged or of another model.
    """
    found = {}
    for split, examples in documents.items():
        key = features_key(config, split, data_key, ends)
        path = Path(config.cache_dir) / "features" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{key}.lock")):
            if not path.is_dir():
                _publish(config, path, key, examples, ends, body)
        found[split] = Features(path)
        if (theirs := found[split].summary)["key"] != key:
            raise UserError(
                f"{path} holds hidden states of {theirs['backbone']}, or of other data, and not "
                f"those of {ends.name}: delete that directory, and they are made."
            )
        log.info("hidden states of %s: %s", split, path)
    return found


def features_key(config: Config, split: str, data_key: str, backbone: Backbone) -> str:
    """Name all that decides the hidden states."""
    dataset = config.dataset
    return content_key(
        [FORMAT, config.head.prefix_attention],  # for which all positions are kept
        split,
        data_key,
        [dataset.val_fraction, dataset.test_fraction],
        backbone.weights_identity(),
        [str(backbone.model.dtype), config.model.attn_implementation],
        pick_precision(config, backbone.device),
        [metadata.version(name) for name in ("torch", "transformers")],
    )


def _publish(
    config: Config,
    path: Path,
    key: str,
    examples: Examples,
    ends: Backbone,
    body: Callable[[], Backbone],
) -> None:
    for unfinished in path.parent.glob(f".{key}.partial-*"):  # left by a killed process
        shutil.rmtree(unfinished)
    precision = pick_precision(config, ends.device)
    dtype = np.dtype(np.float32 if precision == "32-true" else np.int16)  # numpy has no bfloat16
    starts = _starts(examples, config.head.prefix_attention)
    size = int(starts[-1]) * (ends.hidden_size * dtype.itemsize + 4)
    _check_room(path.parent, size)
    log.info("writing %.2f GB of hidden states", size / 1e9)
    backbone = None if config.train.feature_workers else body()
    with publish(path) as partial:
        partial.mkdir()
        write_features(config, partial, examples, starts, dtype, ends.hidden_size, backbone)
        names = ("starts.npy", "checks.npy")
        summary: dict[str, Any] = {
            "key": key,
            "stores_all": config.head.prefix_attention,
            "backbone": str(ends.model.config.name_or_path),
            "sha256": {name: sha256_file(partial / name) for name in names},
        }
        write_json(partial / "summary.json", summary)


def _starts(examples: Examples, stores_all: bool) -> np.ndarray:
    counts = [len(stored_positions(example.is_trained, stores_all)) for example in examples]
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _check_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > 0.95 * free:
        raise UserError(
            f"train.features=cache: hidden states take {size / 1e9:.2f} GB, and {directory} has "
            f"{free / 1e9:.2f} GB left: set train.features=online, cache_dir to a larger disk, or "
            "dataset.sample_fraction to less."
        )


def known_identities(config: Config, files: str | None) -> tuple[str, str] | None:
    """Return the identities of the backbone in these files, if they have been noted."""
    path = _note(config, files)
    if path is None or not path.is_file():
        return None
    try:
        identity, weights_identity = json.loads(path.read_text())
    except ValueError:  # damaged since: the backbone is loaded, and noted again
        return None
    return identity, weights_identity


def note_identities(config: Config, files: str | None, backbone: Backbone) -> None:
    """Note which backbone these files hold, to know it again without loading its layers."""
    path = _note(config, files)
    if path is not None:
        write_json(path, [backbone.identity(), backbone.weights_identity()])


def _note(config: Config, files: str | None) -> Path | None:
    if files is None:
        return None
    # What makes other weights of the same files stands in the name too.
    tokenizer = settings_in_key(config.tokenizer, _OF_TOKENIZERS)
    key = content_key(files, tokenizer, config.model.quantization)
    return Path(config.cache_dir) / "backbones" / f"{key}.json"
