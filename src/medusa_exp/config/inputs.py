"""What a run starts from: groups dataset, tokenizer, model and dtype."""

from dataclasses import dataclass, field

from medusa_exp.config.checks import at_least, one_of, within


@dataclass
class DatasetConfig:
    """Where conversations come from, and how they are split."""

    kind: str = "sharegpt"
    """sharegpt (read `path`) or synthetic (generate `num_conversations`, then read that file)."""
    path: str | None = None
    """A file, a folder or a glob of ShareGPT JSON or JSON Lines files."""
    max_length: int = 1024
    """Tokens a conversation is cut to; never more than the backbone's own limit."""
    val_fraction: float = 0.05
    """Share of conversations, by a hash of the id, for validation and calibration."""
    test_fraction: float = 0.05
    """Share of conversations, by a hash of the id, whose prompts the evaluation answers."""
    num_conversations: int = 4000
    """How many conversations kind=synthetic generates."""
    seed: int = 0
    """Seed of the generator of kind=synthetic; the split depends on ids alone."""

    def __post_init__(self) -> None:
        one_of("dataset.kind", self.kind, ("sharegpt", "synthetic"))
        at_least("dataset.max_length", self.max_length, 8)
        at_least("dataset.num_conversations", self.num_conversations, 1)
        within("dataset.val_fraction", self.val_fraction, 0.0, 0.5)
        within("dataset.test_fraction", self.test_fraction, 0.0, 0.5)


@dataclass
class TokenizerConfig:
    """Which tokenizer and chat template: the model's own, or one trained by stage pretrain."""

    kind: str = "auto"
    """auto (the one in `path`, or in the model's directory) or trained (a byte-level BPE)."""
    path: str | None = None
    """Directory or hub name, where it is not the model's."""
    vocab_size: int = 2048
    """Entries of a trained tokenizer, special tokens included."""

    def __post_init__(self) -> None:
        one_of("tokenizer.kind", self.kind, ("auto", "trained"))
        at_least("tokenizer.vocab_size", self.vocab_size, 272)


@dataclass
class PretrainConfig:
    """The small Llama that stage pretrain makes for model=tiny, and how it is trained."""

    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024
    max_steps: int = 300
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    warmup_fraction: float = 0.05

    def __post_init__(self) -> None:
        at_least("model.pretrain.max_steps", self.max_steps, 1)
        at_least("model.pretrain.batch_tokens", self.batch_tokens, 16)


@dataclass
class ModelConfig:
    """The backbone."""

    kind: str = "pretrained"
    """pretrained (a Hugging Face causal LM at `path`) or tiny (made by stage pretrain)."""
    path: str | None = None
    """Directory, or hub name where there is a network."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    attn_implementation: str = "sdpa"
    """Attention of transformers; a tree needs one that takes a 4-D mask: sdpa."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        one_of("model.kind", self.kind, ("pretrained", "tiny"))
        one_of("model.attn_implementation", self.attn_implementation, ("sdpa", "eager"))


@dataclass
class DtypeConfig:
    """Number formats. Heads and optimiser always hold their weights in float32."""

    backbone: str = "auto"
    """Weights of the backbone: auto (as its own config says), bfloat16, float16 or float32."""
    precision: str = "auto"
    """Arithmetic of training, in Lightning's words: auto (bf16-mixed where the hardware has it,
    else 16-mixed on a GPU and 32-true on a CPU), bf16-mixed, 16-mixed or 32-true."""

    def __post_init__(self) -> None:
        one_of("dtype.backbone", self.backbone, ("auto", "bfloat16", "float16", "float32"))
        one_of("dtype.precision", self.precision, ("auto", "bf16-mixed", "16-mixed", "32-true"))
