"""Where the backbone and its tokenizer come from: a directory, a name on the hub, or the cache.

Checked as far as a look can; nothing is loaded here.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import cached_file

from medusa_exp.config import DatasetConfig, ModelConfig, PretrainConfig, TokenizerConfig
from medusa_exp.config.schema import NO_MODEL
from medusa_exp.errors import UserError
from medusa_exp.model.limits import check_directory
from medusa_exp.runs.files import content_key, settings_in_key, sha256_file
from medusa_exp.runs.seals import check

LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, IndexError),
    *(ArithmeticError, RecursionError),
)
"""What transformers raises for directories that are not what they should be."""

ADAPTED = "backbone"
"""Directory of a run of train=medusa2 that holds its own backbone."""
_BLOCK, _NUM_BLOCKS = 4096, 256
"""What is read of a file of weights to know it again, besides its header."""
_OF_PRETRAINING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "max_steps", "batch_tokens"),
    *("learning_rate", "warmup_fraction"),
)


@dataclass(frozen=True)
class ModelSpec:
    """Which backbone and tokenizer to load, and how; another process can load the same by it."""

    model: ModelConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    dtype: str = "auto"
    """Type of the backbone's weights; auto is as its own config says, where that has arithmetic."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or mps."""
    tiny: Path | None = None
    """With model.kind=tiny: its directory, see `tiny_dir`."""

    @property
    def has_model(self) -> bool:
        """Is a model named? Looking at data takes no more than a tokenizer."""
        return self.model.kind == "tiny" or self.model.path is not None

    @property
    def attention(self) -> str:
        """Attention that transformers is asked for first, and that keys of caches name.

        With attn_implementation=auto a model without it gets eager; its keys differ anyhow.
        """
        wanted = self.model.attn_implementation
        return "sdpa" if wanted == "auto" else wanted

    def model_path(self) -> str:
        """Return the directory or hub name of the backbone.

        Raises:
            UserError: it is not set, or is a directory that holds no model.
        """
        if self.tiny is not None:
            if not (self.tiny / "config.json").is_file():
                raise UserError(
                    f"{self.tiny} does not exist yet: model=tiny is made by stage pretrain. "
                    "Put pretrain first in stages."
                )
            check(self.tiny, "Put stage pretrain first in stages: it makes the model anew.")
            return str(self.tiny)
        if self.model.path is None:
            raise UserError(NO_MODEL)
        place = _place("model.path", self.model.path)
        path = Path(place)
        if path.is_dir() and not (path / "config.json").is_file():
            if is_adapters(path):
                raise UserError(
                    f"model.path={path} holds adapters, no model: go on in the run directory that "
                    "made them, or train with train.lora.output=merged, which writes a model of "
                    "its own."
                )
            why = from_gguf(path) if any(path.glob("*.gguf")) else "it has no config.json."
            raise UserError(f"model.path={path} is no model directory: {why}")
        if path.is_dir():
            check_directory("model.path", path)
        return place

    def tokenizer_path(self) -> str:
        """Return the directory or hub name of the tokenizer.

        Raises:
            UserError: tokenizer.path leads nowhere; or as `model_path`, whose it else is.
        """
        if self.tokenizer.path is None:
            return self.model_path()
        place = _place("tokenizer.path", self.tokenizer.path)
        if Path(place).is_dir():
            check_directory("tokenizer.path", Path(place))
        return place

    def model_config(self) -> Any:
        """Return the backbone's config, in transformers' form.

        Raises:
            UserError: it cannot be loaded; or as `model_path`.
        """
        path = self.model_path()
        try:
            return AutoConfig.from_pretrained(path, **self.hub_options())
        except UserError:
            raise
        except Exception as error:  # by what is in the file, anything of any type
            raise UserError(f"model.path={path} cannot be loaded: {first_lines(error)}") from error

    def hub_options(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that concern where the model comes from."""
        options: dict[str, Any] = {"trust_remote_code": self.model.trust_remote_code}
        if self.model.revision:
            options["revision"] = self.model.revision
        return options

    def files_fingerprint(self) -> str | None:
        """Return a sha256 over the model's config.json and a sample of its weights' files.

        A sample, since reading all of a large model takes minutes; no training or merging leaves it
        as it was. None where there are no such files on this machine.
        """
        directory = Path(self.model_path())
        if not directory.is_dir():
            options = {**self.hub_options(), "local_files_only": True}
            try:
                found = cached_file(str(directory), "config.json", **options)
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


def tiny_dir(
    data_files: Iterable[Path],
    dataset: DatasetConfig,
    pretrain: PretrainConfig,
    *,
    vocab_size: int,
    seed: int,
    cache_dir: str | Path,
) -> Path:
    """Return where the model that stage pretrain makes of these lies, or will lie, in the cache.

    `dataset` says how the files are split and cut; `vocab_size` is the trained tokenizer's.
    """
    made_of = [
        [sha256_file(path) for path in data_files],
        [dataset.val_fraction, dataset.test_fraction, dataset.max_length],
        vocab_size,
        settings_in_key(pretrain, _OF_PRETRAINING),
        seed,
    ]
    others = {key.name for key in fields(dataset)} - {"form", "columns"}
    if read_as := settings_in_key(dataset, (), but=others):
        made_of.append(read_as)  # models from before these keys keep their names
    return Path(cache_dir) / "pretrained" / content_key(made_of)


def adapted_path(run_dir: str | Path) -> Path | None:
    """Return where the backbone lies that a run of train=medusa2 has adapted, if it has."""
    path = Path(run_dir) / ADAPTED
    return path if run_dir and path.is_dir() else None


def is_adapters(path: Path) -> bool:
    """Does this directory hold peft's adapters, rather than a whole model?"""
    return (path / "adapter_config.json").is_file()


def from_gguf(path: Path) -> str:
    """Say what to do with a directory that has a model as GGUF alone."""
    file = sorted(path.glob("*.gguf"))[0].name
    return (
        f"it has no safetensors, and GGUF ({file}) is not read here. transformers reads it, and "
        f"saves what can be: AutoModelForCausalLM.from_pretrained({str(path)!r}, "
        f"gguf_file={file!r}).save_pretrained(OUT), and the same with AutoTokenizer; then set "
        "model.path=OUT."
    )


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
