"""Where the small Llama of stage pretrain lies: in the cache, under a hash of all that made it."""

from dataclasses import asdict
from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.data.sources import dataset_files, dataset_key
from medusa_exp.files import content_key, sha256_file


def cache_keys(config: Config) -> dict[str, str]:
    """Return the names of the cache entries that this config uses."""
    keys = {}
    if config.dataset.kind == "synthetic":
        keys["dataset"] = dataset_key(config.dataset)
    if config.model.kind == "tiny":
        keys["model"] = tiny_dir(config).name
    return keys


def tiny_dir(config: Config) -> Path:
    """Return where the pretrained model of this config lies, or will lie."""
    dataset = config.dataset
    made_of = [
        [sha256_file(path) for path in dataset_files(config)],
        [dataset.val_fraction, dataset.test_fraction, dataset.max_length],
        config.tokenizer.vocab_size,
        asdict(config.model.pretrain),
        config.seed,
    ]
    return Path(config.cache_dir) / "pretrained" / content_key(made_of)
