"""What a run starts from: groups dataset, tokenizer, model and dtype."""

from dataclasses import dataclass, field

from medusa_exp.config.checks import at_least, one_of, within
from medusa_exp.errors import UserError


@dataclass
class SourceConfig:
    """One of several sources of conversations."""

    path: str
    """As `dataset.path`."""
    weight: float = 1.0
    """How often each of its conversations is trained on in a pass: 0.5 is every other time."""

    def __post_init__(self) -> None:
        within("dataset.sources.*.weight", self.weight, 0.01, 100.0)


@dataclass
class DatasetConfig:
    """Where conversations come from, which are taken, and how they are split."""

    kind: str = "sharegpt"
    """sharegpt (read `path` or `sources`), hub (the same, from a data set of the Hugging Face hub)
    or synthetic (generate `num_conversations`, then read that file)."""
    path: str | None = None
    """A file, a folder or a glob of chats in ShareGPT's or OpenAI's form: JSON, JSON Lines, either
    with gzip or zstd, or Parquet. With kind=hub: owner/name."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources instead of one path: name -> {path, weight}."""
    hub_split: str = "train"
    """Split of the hub's data set that conversations are taken from."""
    role_map: dict[str, str] = field(default_factory=dict)
    """Further names of roles: what stands in the file -> system, user, assistant or tool."""
    strict: bool = False
    """Make the first record that cannot be used an error, instead of counting it."""
    deduplicate: bool = True
    """Take conversations of the same words once. Else copies may stand in train and in test."""
    min_turns: int = 1
    """Fewest messages besides system ones."""
    max_turns: int | None = None
    """Most of them; null is no limit."""
    min_chars: int = 0
    """Fewest characters of a conversation's messages together."""
    max_chars: int | None = None
    """Most of them; null is no limit."""
    sample_fraction: float = 1.0
    """Share of the conversations to take, by a hash of `seed` and the id."""
    max_length: int = 1024
    """Tokens a conversation is cut to; never more than the backbone's own limit."""
    val_fraction: float = 0.05
    """Share of conversations, by a hash of the id, for validation and calibration."""
    test_fraction: float = 0.05
    """Share of conversations, by a hash of the id, whose prompts the evaluation answers."""
    num_workers: int | None = None
    """Processes that render and tokenise a large data set; by default, one for each core."""
    num_conversations: int = 4000
    """How many conversations kind=synthetic generates."""
    seed: int = 0
    """Seed of kind=synthetic and of `sample_fraction`; the split depends on ids alone."""

    def __post_init__(self) -> None:
        one_of("dataset.kind", self.kind, ("sharegpt", "hub", "synthetic"))
        at_least("dataset.max_length", self.max_length, 8)
        at_least("dataset.num_conversations", self.num_conversations, 1)
        at_least("dataset.min_turns", self.min_turns, 0)
        at_least("dataset.min_chars", self.min_chars, 0)
        if self.max_turns is not None:
            at_least("dataset.max_turns", self.max_turns, max(1, self.min_turns))
        if self.max_chars is not None:
            at_least("dataset.max_chars", self.max_chars, max(1, self.min_chars))
        within("dataset.sample_fraction", self.sample_fraction, 0.0, 1.0)
        within("dataset.val_fraction", self.val_fraction, 0.0, 0.5)
        within("dataset.test_fraction", self.test_fraction, 0.0, 0.5)
        if self.num_workers is not None:
            at_least("dataset.num_workers", self.num_workers, 1)


@dataclass
class TokenizerConfig:
    """Which tokenizer and chat template: the model's own, or one trained by stage pretrain.

    Where a key is null or empty, what the tokenizer's own files say holds.
    """

    kind: str = "auto"
    """auto (the one in `path`, or in the model's directory) or trained (a byte-level BPE)."""
    path: str | None = None
    """Directory or hub name, where it is not the model's."""
    vocab_size: int = 2048
    """Entries of a trained tokenizer, special tokens included."""
    tokenizer_class: str = "auto"
    """auto (as the files say) or a fast class of transformers: PreTrainedTokenizerFast takes
    tokenizer.json as it stands, where others (LlamaTokenizer) build it anew from its vocabulary."""
    model_max_length: int | None = None
    """Tokens from which on the tokenizer warns; what cuts sequences is dataset.max_length."""
    padding_side: str | None = None
    """left or right."""
    truncation_side: str | None = None
    """left or right."""
    add_bos_token: bool | None = None
    """Does the tokenizer put bos_token before a text?"""
    add_eos_token: bool | None = None
    """Does it put eos_token behind a text?"""
    chat_template: str | None = None
    """Jinja text (it has {{ or {% in it), else the name of a template that the tokenizer ships,
    else a file."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """Tokens for bos_token, eos_token, pad_token, unk_token, ...; what is new is added."""
    additional_special_tokens: list[str] = field(default_factory=list)
    """More special tokens, beside those that the tokenizer has."""
    resize_embedding: bool = False
    """Give the backbone a row (the mean of its own) for each token that is new to it."""

    def __post_init__(self) -> None:
        one_of("tokenizer.kind", self.kind, ("auto", "trained"))
        at_least("tokenizer.vocab_size", self.vocab_size, 272)
        if self.model_max_length is not None:
            at_least("tokenizer.model_max_length", self.model_max_length, 1)
        if self.padding_side is not None:
            one_of("tokenizer.padding_side", self.padding_side, ("left", "right"))
        if self.truncation_side is not None:
            one_of("tokenizer.truncation_side", self.truncation_side, ("left", "right"))
        words = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # as transformers has them
        for role, token in self.special_tokens.items():
            one_of("tokenizer.special_tokens", role, tuple(f"{word}_token" for word in words))
            at_least(f"tokenizer.special_tokens.{role}: the token's length", len(token), 1)
        for token in self.additional_special_tokens:
            at_least("tokenizer.additional_special_tokens: a token's length", len(token), 1)


@dataclass
class PretrainConfig:
    """The small Llama that stage pretrain makes for model=tiny, and how it is trained.

    The keys up to max_position_embeddings are those of transformers' LlamaConfig.
    """

    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024
    max_steps: int = 300
    """Optimiser steps; a batch each."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included."""
    learning_rate: float = 3e-3
    """The greatest; see `train.warmup_fraction`."""
    warmup_fraction: float = 0.05
    """Share of the steps with a rising learning rate; a cosine to zero follows."""

    def __post_init__(self) -> None:
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "max_steps",
        ):
            at_least(f"model.pretrain.{key}", getattr(self, key), 1)
        for key, parts in (
            ("hidden_size", 2 * self.num_attention_heads),  # rotary positions come in pairs
            ("num_attention_heads", self.num_key_value_heads),
        ):
            if getattr(self, key) % parts:
                raise UserError(
                    f"model.pretrain.{key}={getattr(self, key)} must be a multiple of {parts}."
                )
        at_least("model.pretrain.batch_tokens", self.batch_tokens, 16)
        at_least("model.pretrain.learning_rate", self.learning_rate, 0.0)
        within("model.pretrain.warmup_fraction", self.warmup_fraction, 0.0, 1.0)


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
    quantization: str | None = None
    """8bit or 4bit (NF4): the weights of linear layers but the lm_head, by bitsandbytes. The
    quantised model is then what heads are trained for and answers are compared with."""
    device_map: str | None = None
    """How accelerate spreads the layers of a model too large for one GPU over all of them: auto
    (evenly) or sequential (one GPU after the other). Nothing is offloaded."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        one_of("model.kind", self.kind, ("pretrained", "tiny"))
        one_of("model.attn_implementation", self.attn_implementation, ("sdpa", "eager"))
        if self.quantization is not None:
            one_of("model.quantization", self.quantization, ("8bit", "4bit"))
        if self.device_map is not None:
            one_of("model.device_map", self.device_map, ("auto", "sequential"))


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
