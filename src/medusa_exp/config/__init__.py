"""The schema of an experiment: every key, its type, its meaning, checked on construction.

Values come from the YAML groups under `conf/`, which hold what differs between choices; a default
that stands here is right for all of them. `from_hydra` is the only way from OmegaConf to these
plain dataclasses: stages see nothing else.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medusa_exp.config.privacy import named_variables, without_environment
from medusa_exp.config.schema import (
    HEAD_KINDS,
    DatasetConfig,
    DecodeConfig,
    DtypeConfig,
    EvaluateConfig,
    HeadConfig,
    InspectConfig,
    LoggerConfig,
    LoraSettings,
    ModelConfig,
    PretrainConfig,
    RegenerateConfig,
    RerunConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
    TreeConfig,
    one_of,
)
from medusa_exp.errors import UserError

__all__ = [
    "Config",
    "DatasetConfig",
    "DecodeConfig",
    "DtypeConfig",
    "EvaluateConfig",
    "HeadConfig",
    "InspectConfig",
    "LoggerConfig",
    "LoraSettings",
    "ModelConfig",
    "PretrainConfig",
    "RegenerateConfig",
    "RerunConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TreeConfig",
    "from_hydra",
    "load_saved",
    "named_variables",
    "register",
    "to_dict",
    "to_shareable",
]


@dataclass
class Config:
    """An experiment: which stages run, on what, into which directory."""

    name: str = "default"
    """Names the run directory's parent: outputs/<name>/<timestamp>."""
    stages: list[str] = field(default_factory=list)
    """What to do, in this order."""
    run_dir: str = ""
    """Where everything is written. An existing run there is continued with its saved config."""
    sweep_dir: str = ""
    """Where a sweep's jobs have their run directories; the same one again goes on with a sweep."""
    cache_dir: str = "outputs/cache"
    """What runs share: generated and tokenised data, hidden states, own answers, pretrained tiny
    models; each by a hash of what made it."""
    heads_from: str | None = None
    """A run directory, or its heads/, whose heads this run decodes with, instead of training some.
    """
    device: str = "auto"
    """auto (cuda where there is one), cpu or cuda."""
    seed: int = 0
    """Of initial weights, order of training and sampling; the data have `dataset.seed`."""
    objective: str = "eval/speedup"
    """The metric that the jobs of a sweep are compared by, and that Optuna is told."""
    rerun: RerunConfig = field(default_factory=RerunConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dtype: DtypeConfig = field(default_factory=DtypeConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        if self.heads_from is not None and "train" in self.stages:
            raise UserError(
                "heads_from is for runs that train no heads: leave stage train out of stages, or "
                "set train.heads_from to start the training from these heads."
            )
        if self.model.device_map is not None:  # one process has all the devices
            within = " (with model.device_map)"
            one_of("train.strategy" + within, self.train.strategy, ("auto",))
            one_of("train.kind" + within, self.train.kind, ("medusa1",))
            others = tuple(kind for kind in HEAD_KINDS if kind != "medusa_tied")
            one_of("head.kind" + within, self.head.kind, others)
            one_of(
                "tokenizer.resize_embedding" + within,
                str(self.tokenizer.resize_embedding),
                ("False",),
            )


def register() -> None:
    """Make the schema known to Hydra under the name that `conf/config.yaml` starts from."""
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    # For each group that --help lists, Hydra copies this store with all its nodes, a hundred times
    # in all and most of the time that it takes; it only reads the copies.
    store.__deepcopy__ = _only_store  # type: ignore[attr-defined]


def _only_store(memo: dict[int, Any]) -> ConfigStore:
    return ConfigStore.instance()


def from_hydra(config: DictConfig) -> Config:
    """Turn a composed config into plain, checked dataclasses.

    Raises:
        UserError: naming the key and what it may be.
    """
    try:
        # Hydra lets `+key=value` add what no schema knows; merging into a fresh one does not.
        plain = OmegaConf.to_container(config, resolve=False)
        checked = OmegaConf.merge(OmegaConf.structured(Config), plain)
        return OmegaConf.to_object(checked)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {error.msg or error}") from error


def load_saved(path: Path) -> DictConfig:
    """Read a run's saved config against today's schema.

    Raises:
        UserError: the file is unreadable, or holds a key that the schema does not know.
    """
    try:
        # Places that Hydra made of the clock: nobody else could read them.
        placed = {"run_dir": str(path.parents[1]), "sweep_dir": ""}
        saved = OmegaConf.load(path)
        return OmegaConf.merge(OmegaConf.structured(Config), saved, placed)  # type: ignore
    except Exception as error:
        raise UserError(f"{path} does not fit this version of medusa_exp: {error}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested plain values, for W&B and for cache keys."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def to_shareable(config: Config, saved: Path) -> dict[str, Any]:
    """Return the config as `to_dict` does, without what came from environment variables.

    Args:
        config: the config.
        saved: as Hydra composed it, where such a value is still `${oc.env:NAME}`.
    """
    return without_environment(to_dict(config), saved)
