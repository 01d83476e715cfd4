"""Config in; where the backbone and its tokenizer come from out, checked as far as a look can.

Where the small Llama of stage pretrain lies: in the cache, under a hash of all that made it.
"""

import hashlib
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from medusa_exp.config import Config
from medusa_exp.data.sources import dataset_files
from medusa_exp.errors import UserError
from medusa_exp.runs.files import content_key, settings_in_key, sha256_file

_OF_PRETRAINING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "max_steps", "batch_tokens"),
    *("learning_rate", "warmup_fraction"),
)


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


LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)
"""What transformers raises for directories that are not what they should be."""

ADAPTED = "backbone"
"""Directory of a run of train=medusa2 that holds its own backbone."""
_BLOCK, _NUM_BLOCKS = 4096, 256
"""What is read of a file of weights to know it again, besides its header."""


def model_path(config: Config) -> str:
    """Return the directory or hub name of the backbone.

    Raises:
        UserError: it is not set, or is a directory that holds no model.
    """
    if config.model.kind == "tiny":
        pass

        path = tiny_dir(config)
        if not (path / "config.json").is_file():
            raise UserError(
                f"{path} does not exist yet: model=tiny is made by stage pretrain. "
                "Put pretrain first in stages."
            )
        return str(path)
    if config.model.path is None:
        raise UserError("model.path is not set: name a Hugging Face model directory or hub name.")
    place = _place("model.path", config.model.path)
    path = Path(place)
    if path.is_dir() and not (path / "config.json").is_file():
        if is_adapters(path):
            raise UserError(
                f"model.path={path} holds adapters, no model: go on in the run directory that made "
                "them, or train with train.lora.output=merged, which writes a model of its own."
            )
        raise UserError(f"model.path={path} is no model directory: it has no config.json.")
    return place


def adapted_path(config: Config) -> Path | None:
    """Return where the backbone lies that this run has adapted, if it has."""
    path = Path(config.run_dir) / ADAPTED
    is_there = config.train.kind == "medusa2" and bool(config.run_dir) and path.is_dir()
    return path if is_there else None


def is_adapters(path: Path) -> bool:
    """Does this directory hold peft's adapters, rather than a whole model?"""
    return (path / "adapter_config.json").is_file()


def has_model(config: Config) -> bool:
    """Does the config name a model? Looking at data takes no more than a tokenizer."""
    return config.model.kind == "tiny" or config.model.path is not None


def tokenizer_path(config: Config) -> str:
    """Return the directory or hub name of the tokenizer.

    Raises:
        UserError: tokenizer.path leads nowhere; or as `model_path`, whose it else is.
    """
    if config.tokenizer.path is None:
        return model_path(config)
    return _place("tokenizer.path", config.tokenizer.path)


def hub_options(config: Config) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that concern where the model comes from."""
    options: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    if config.model.revision:
        options["revision"] = config.model.revision
    return options


def files_fingerprint(config: Config) -> str | None:
    """Return a sha256 over the model's config.json and a sample of its weights' files.

    A sample, since reading all of a large model takes minutes; no training or merging leaves it as
    it was. None where there are no such files on this machine.
    """
    directory = Path(model_path(config))
    if not directory.is_dir():
        try:
            found = cached_file(
                str(directory), "config.json", local_files_only=True, **hub_options(config)
            )
        except LOADING_ERRORS:
            return None
        directory = Path(found).parent
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in files:
        _add_sample(digest, path)
    return digest.hexdigest()


def _add_sample(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size} ".encode())
    with path.open("rb") as file:
        # The header of a safetensors file: its length in 8 bytes, then JSON.
        digest.update(file.read(min(size, 8 + int.from_bytes(file.read(8), "little"))))
        for number in range(_NUM_BLOCKS):
            file.seek(number * max(0, size - _BLOCK) // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK))


def first_lines(error: Exception) -> str:
    """Return what a library says, short enough for a message of ours."""
    return " ".join(str(error).split())[:600]


def _place(key: str, value: str) -> str:
    path = Path(value).expanduser()
    if path.is_file():
        raise UserError(f"{key}={path} is a file; name its directory.")
    if not path.exists() and (path.is_absolute() or value.count("/") != 1):
        raise UserError(f"{key}={path}: there is no such directory.")
    return str(path) if path.exists() else value
