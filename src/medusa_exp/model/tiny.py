"""Where the small Llama of stage pretrain lies: in the cache, under a hash of all that made it."""

from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.data.sources import dataset_files, dataset_key
from medusa_exp.runs.files import content_key, settings_in_key, sha256_file

_OF_PRETRAINING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "max_steps", "batch_tokens"),
    *("learning_rate", "warmup_fraction"),
)


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
        settings_in_key(config.model.pretrain, _OF_PRETRAINING),
        config.seed,
    ]
    return Path(config.cache_dir) / "pretrained" / content_key(made_of)
