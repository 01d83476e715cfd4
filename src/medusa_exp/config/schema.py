"""The schema of an experiment: every key, its type, its meaning, checked on construction.

Values come from the YAML groups under `conf/`, which hold what differs between choices; a default
that stands here is right for all of them.
"""

import math
from dataclasses import dataclass, field

from medusa_exp.errors import UserError


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a UserError unless `value` is one of the words allowed."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not known: use one of {', '.join(allowed)}.")


def at_least(key: str, value: float, bound: float) -> None:
    """Raise a UserError unless `value` is finite and not below `bound`."""
    if not math.isfinite(value):
        raise UserError(f"{key}={value} is no finite number: it must be one of at least {bound}.")
    if value < bound:
        raise UserError(f"{key}={value} is too small: it must be at least {bound}.")


def within(key: str, value: float, low: float, high: float) -> None:
    """Raise a UserError unless `value` lies between `low` and `high`, both included."""
    if not low <= value <= high:
        raise UserError(f"{key}={value} is out of range: it must lie between {low} and {high}.")


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


HEAD_KINDS = ("medusa", "medusa_tied", "medusa_lowrank", "hydra")
"""The names of `model.heads.FAMILIES`, written out: to import these takes torch, and seconds."""


@dataclass
class HeadConfig:
    """The Medusa heads."""

    kind: str = "medusa"
    """medusa (a vocabulary projection for each head), medusa_tied (the backbone's lm_head for all),
    medusa_lowrank (projections of low `rank`, or of `num_tokens` frequent tokens) or hydra (each
    head sees the tokens that are drafted before its own)."""
    num_heads: int = 4
    """K: head k predicts the token k places after the backbone's next one."""
    num_layers: int = 1
    """L: residual blocks before each head's vocabulary projection."""
    bias: bool = True
    """Of the residual blocks."""
    rank: int | None = None
    """Of the projections of medusa_lowrank; null is full."""
    num_tokens: int | None = None
    """Tokens that the heads of medusa_lowrank know, the most frequent ones in the training data;
    others are never guessed. null is all."""
    prefix_attention: bool = False
    """Let a layer of attention over all hidden states so far stand before the heads (of any kind,
    but it was found for hydra)."""

    def __post_init__(self) -> None:
        one_of("head.kind", self.kind, HEAD_KINDS)
        for key in ("rank", "num_tokens"):
            if (value := getattr(self, key)) is not None:
                at_least(f"head.{key}", value, 16)
                one_of(f"head.kind (with head.{key})", self.kind, ("medusa_lowrank",))
        if self.kind == "medusa_lowrank" and self.rank is None and self.num_tokens is None:
            raise UserError("head.kind=medusa_lowrank needs head.rank or head.num_tokens.")
        if self.kind in ("medusa_tied", "hydra"):
            at_least(f"head.num_layers (with head.kind={self.kind})", self.num_layers, 1)
        within("head.num_heads", self.num_heads, 1, 16)
        within("head.num_layers", self.num_layers, 0, 16)


@dataclass
class LoraSettings:
    """Of kind=medusa2: adapters on the backbone's linear layers, and how they learn."""

    rank: int = 32
    """Of the two matrices that are added to a layer's weights."""
    alpha: int = 16
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of the adapters' inputs that is left out at random in training."""
    layers: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt, such as q_proj; none means all of them, but not the
    lm_head."""
    learning_rate: float = 5e-4
    """Of the adapters; `train.learning_rate` is the heads'."""
    heads_only_fraction: float = 0.1
    """Share of the steps, at the beginning, in which the heads learn alone."""
    self_distillation: bool = False
    """Keep the backbone near to what it says without its adapters, instead of to the data."""
    gradient_checkpointing: bool = False
    """Compute the backbone's activations twice instead of keeping them."""
    output: str = "merged"
    """merged (a whole model in `backbone/`) or adapter (the adapters alone)."""

    def __post_init__(self) -> None:
        at_least("train.lora.rank", self.rank, 1)
        at_least("train.lora.alpha", self.alpha, 1)
        within("train.lora.dropout", self.dropout, 0.0, 0.9)
        at_least("train.lora.learning_rate", self.learning_rate, 0.0)
        within("train.lora.heads_only_fraction", self.heads_only_fraction, 0.0, 1.0)
        one_of("train.lora.output", self.output, ("merged", "adapter"))


@dataclass
class TrainConfig:
    """Training of the heads, on a frozen backbone or together with it."""

    kind: str = "medusa1"
    """medusa1 (the backbone is frozen) or medusa2 (adapters on it learn too: answers change)."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    heads_from: str | None = None
    """A run directory, or its heads/, whose heads this training starts from."""
    max_steps: int | None = None
    """Optimiser steps; overrides `epochs`."""
    epochs: float = 2.0
    """Passes over the training split, where `max_steps` is not set."""
    min_steps: int = 1000
    """A small data set is walked more often than `epochs`, until so many steps are made."""
    text: str = "data"
    """data (the conversations as they are) or own (with the backbone's own answers in them, which
    stage regenerate makes: the text that heads meet in decoding)."""
    labels: str = "own"
    """own (the token that the backbone itself would say after the same text: what decoding checks
    guesses against) or data (the token that stands there). Of loss=ce, and of validation."""
    loss: str = "ce"
    """ce (cross entropy with the labels), kl (divergence from the backbone's own distribution) or
    topk_kl (the same, from its `top_k` likeliest tokens alone: nearly as cheap as ce)."""
    top_k: int = 16
    """Of loss=topk_kl."""
    batching: str = "padded"
    """padded (a document a row, rows of similar length) or packed (several documents a row, which
    do not see each other: almost no padding, but attention over longer rows)."""
    batch_tokens: int = 4096
    """Tokens of a micro-batch, padding included."""
    accumulate: int = 1
    """Micro-batches to an optimiser step."""
    optimizer: str = "adamw"
    """adamw, adamw_8bit (needs bitsandbytes) or muon (Muon for the matrices of residual blocks,
    AdamW for the rest)."""
    learning_rate: float = 2e-3
    """Of the heads: the greatest, after the warm-up."""
    weight_decay: float = 0.0
    """Of matrices; biases do not decay. Not to be taken for `decay`, which weighs heads' losses."""
    warmup_fraction: float = 0.05
    """Share of the steps with a rising learning rate; a cosine to zero follows."""
    gradient_clip: float = 1.0
    """The greatest norm of a step's gradient; 0 does not clip."""
    average: float = 0.0
    """Decay of a moving average of the heads, such as 0.99, which is kept in their place; 0: none.
    """
    decay: float = 0.8
    """Head k's loss counts decay**k (Medusa, section 2.2.1)."""
    coefficient: float = 1.0
    """What the heads' loss is multiplied by: lambda_0 of Medusa-2. With kind=medusa1 a constant one
    does little: optimisers even it out, but the gradient is clipped before they see it."""
    coefficient_schedule: str = "constant"
    """constant, or linear or sine: the coefficient rises from nearly 0 over the whole training."""
    loss_chunk_rows: int = 256
    """Rows whose logits exist at one time."""
    loss_form: str = "recompute"
    """recompute (their logits are computed again in the backward pass) or at_once (gradients are
    computed with the loss: a quarter less work; not for the backbone's part of kind=medusa2)."""
    features: str = "online"
    """online (the backbone runs at every step) or cache (its hidden states of all documents are
    made once and read from `cache_dir`: for several trainings on the same documents)."""
    feature_workers: int = 0
    """Of features=cache: processes of a Ray cluster that make the hidden states side by side, a GPU
    or a core each (see RAY_ADDRESS); 0 is this process alone."""
    compile: bool = False
    """Let torch.compile work on the frozen backbone: a minute once, for quicker steps on a GPU."""
    val_every: int = 200
    """Optimiser steps between validations; one more comes at the end."""
    val_batches: int = 16
    """Micro-batches of a validation."""
    val_prompts: int = 16
    """Held-out prompts that the backbone answers once; each validation counts the steps that
    decoding these answers would take (val/accept_length). 0 counts none."""
    val_tree_nodes: int = 16
    """Nodes of the tree that val/accept_length is of; val/accept_length_chain is of the chain."""
    keep: str = "best"
    """best (the heads of the validation with the greatest val/accept_length) or last."""
    patience: int | None = None
    """Stop after so many validations without a greater val/accept_length."""
    checkpoint_every: int = 200
    """Optimiser steps between checkpoints. One more comes at the end, and on SIGTERM and SIGINT."""
    strategy: str = "auto"
    """auto (one device), ddp (`devices` of them on this machine, each with a copy of the backbone),
    fsdp (each keeps a part of the backbone's layers, which are gathered one by one to run) or ray
    (ddp on the machines of a Ray cluster, see RAY_ADDRESS)."""
    devices: int = 1
    """Of strategy=ddp, fsdp and ray: processes, on a GPU each or on the cores of the CPU. A step
    takes so many times `accumulate` micro-batches."""
    max_failures: int = 3
    """Of strategy=ray: times that workers may be lost and all start again from the checkpoint."""
    resume: str = "auto"
    """auto (go on from the run directory's newest checkpoint) or never (start again)."""
    deterministic: bool = False
    """Have torch refuse what is not reproducible bit by bit. A CPU is reproducible without."""

    def __post_init__(self) -> None:
        if self.max_steps is not None:
            at_least("train.max_steps", self.max_steps, 1)
        within("train.epochs", self.epochs, 1e-3, 1e6)
        for key in (
            "batch_tokens",
            "accumulate",
            "min_steps",
            "loss_chunk_rows",
            "val_every",
            "val_batches",
        ):
            at_least(f"train.{key}", getattr(self, key), 1)
        one_of("train.features", self.features, ("online", "cache"))
        at_least("train.feature_workers", self.feature_workers, 0)
        at_least("train.val_prompts", self.val_prompts, 0)
        within("train.val_tree_nodes", self.val_tree_nodes, 1, 256)
        one_of("train.keep", self.keep, ("best", "last"))
        if self.patience is not None:
            at_least("train.patience", self.patience, 1)
        at_least("train.checkpoint_every", self.checkpoint_every, 1)
        one_of("train.kind", self.kind, ("medusa1", "medusa2"))
        if self.kind == "medusa2":  # its hidden states change from step to step
            one_of("train.features (with train.kind=medusa2)", self.features, ("online",))
            one_of("train.compile (with train.kind=medusa2)", str(self.compile), ("False",))
        one_of("train.text", self.text, ("data", "own"))
        one_of("train.labels", self.labels, ("own", "data"))
        one_of("train.loss", self.loss, ("ce", "kl", "topk_kl"))
        one_of("train.loss_form", self.loss_form, ("recompute", "at_once"))
        at_least("train.top_k", self.top_k, 1)
        within("train.coefficient", self.coefficient, 0.0, 1e6)
        schedules = ("constant", "linear", "sine")
        one_of("train.coefficient_schedule", self.coefficient_schedule, schedules)
        one_of("train.batching", self.batching, ("padded", "packed"))
        at_least("train.learning_rate", self.learning_rate, 0.0)
        within("train.weight_decay", self.weight_decay, 0.0, 100.0)
        within("train.gradient_clip", self.gradient_clip, 0.0, 1e6)
        one_of("train.optimizer", self.optimizer, ("adamw", "adamw_8bit", "muon"))
        within("train.average", self.average, 0.0, 0.99999)
        within("train.decay", self.decay, 0.0, 1.0)
        within("train.warmup_fraction", self.warmup_fraction, 0.0, 1.0)
        one_of("train.strategy", self.strategy, ("auto", "ddp", "fsdp", "ray"))
        at_least("train.devices", self.devices, 1)
        at_least("train.max_failures", self.max_failures, 0)
        if self.strategy == "fsdp":  # what is trained of the backbone would have to be sharded too
            one_of("train.kind (with train.strategy=fsdp)", self.kind, ("medusa1",))
            one_of("train.compile (with train.strategy=fsdp)", str(self.compile), ("False",))
        if self.strategy == "auto":
            within("train.devices (with train.strategy=auto)", self.devices, 1, 1)
        one_of("train.resume", self.resume, ("auto", "never"))


@dataclass
class InspectConfig:
    """How much stage inspect looks at and shows."""

    num_samples: int = 3
    """Rows that are printed and written with their trained text marked."""
    num_conversations: int = 500
    """Conversations, evenly spread over the data set, whose tokens are counted by role."""
    num_documents: int = 32
    """Training documents that the model, if one is given, reads to say how near they are to it."""

    def __post_init__(self) -> None:
        at_least("inspect.num_samples", self.num_samples, 0)
        at_least("inspect.num_conversations", self.num_conversations, 1)
        at_least("inspect.num_documents", self.num_documents, 1)


@dataclass
class RerunConfig:
    """Of +experiment=rerun."""

    source: str | None = None
    """The directory of the run that is done again, with its saved config."""


@dataclass
class RegenerateConfig:
    """The backbone's own answers to the prompts of the training documents; see `train.text`.

    Tokens are chosen as `decode` says, and answers end where it says.
    """

    num_documents: int | None = None
    """Training documents, drawn by the seed, whose prompts are answered; all by default."""
    num_val_documents: int = 64
    """Documents of the validation split that are answered too, to validate heads on."""
    batch_size: int = 64
    """Documents that are answered together."""
    workers: int = 0
    """Processes of a Ray cluster that answer side by side, a GPU or a core each (see RAY_ADDRESS);
    0 is this process alone."""
    max_new_tokens: int = 256
    """Of an answer. One that is not finished by then is its document's last."""
    use_heads: bool = False
    """Decode with the heads and the tree that the run directory has already: the same answers,
    sooner where batches are small."""

    def __post_init__(self) -> None:
        at_least("regenerate.workers", self.workers, 0)
        for key in ("num_documents", "num_val_documents", "batch_size", "max_new_tokens"):
            if (value := getattr(self, key)) is not None:
                at_least(f"regenerate.{key}", value, 1)


@dataclass
class TreeConfig:
    """The tree of guesses that one step checks, and how stage calibrate chooses it."""

    kind: str = "calibrated"
    """calibrated (measured on held-out text), dynamic (at each step, the nodes that the heads hold
    for the likeliest), chain (the first guess of every head), medusa_63 (the tree of the Medusa
    authors) or custom (`path` or `paths`)."""
    path: str | None = None
    """Of kind=custom: a JSON file, as tree.json or a list like `paths`."""
    paths: list[list[int]] = field(default_factory=list)
    """Of kind=custom: nodes as ranks from the first head on, the form of the reference's
    medusa_choices: [[0],[0,0],[1]]."""
    num_nodes: int | None = None
    """Of kind=calibrated: the largest tree of at most so many nodes that was measured, instead of
    the fastest. Of kind=dynamic: nodes of a step; by default, as many as the calibrated tree has.
    """
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Calibration finds the fastest tree for each; decoding uses that of the size next below."""
    num_prompts: int = 32
    """Held-out prompts that the backbone answers to count which guesses come true."""
    max_nodes: int = 64
    """The largest tree that calibration considers, the root included."""
    max_rank: int = 10
    """Guesses of a head that calibration considers."""

    def __post_init__(self) -> None:
        one_of("tree.kind", self.kind, ("calibrated", "dynamic", "chain", "medusa_63", "custom"))
        if self.num_nodes is not None:
            within("tree.num_nodes", self.num_nodes, 1, 256)
        for size in self.batch_sizes or [0]:
            at_least("tree.batch_sizes", size, 1)
        within("tree.max_nodes", self.max_nodes, 1, 256)
        at_least("tree.num_prompts", self.num_prompts, 1)
        at_least("tree.max_rank", self.max_rank, 1)


@dataclass
class DecodeConfig:
    """How tokens are generated."""

    rule: str = "greedy"
    """greedy (token for token what plain greedy decoding gives), sampling (the same distribution as
    plain sampling) or typical (Medusa's acceptance, which is lossy)."""
    temperature: float = 1.0
    """Of sampling and typical."""
    top_k: int | None = None
    """Of sampling: draw from so many of the likeliest tokens alone."""
    top_p: float | None = None
    """Of sampling: draw from the likeliest tokens that together have this probability."""
    epsilon: float = 0.09
    """Of typical: a guess of a probability above this is always accepted."""
    alpha: float = 0.3
    """Of typical: and so is one above this times exp(-entropy)."""
    cuda_graph: bool = True
    """On a GPU, capture a step (propose, backbone, verify, commit) as one CUDA graph and replay it;
    plain decoding too. false runs it op by op, in tensors that grow."""
    verifier: str = "auto"
    """torch, cupy (the CUDA kernels), or auto (the kernels wherever they can be used)."""
    max_new_tokens: int = 128
    """Tokens after which an answer ends at the latest. A prompt has to leave room for them."""
    stop_ids: list[int] = field(default_factory=list)
    """Token ids that end an answer, besides the model's own."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end an answer, with the token that completes them."""

    def __post_init__(self) -> None:
        one_of("decode.rule", self.rule, ("greedy", "sampling", "typical"))
        one_of("decode.verifier", self.verifier, ("auto", "torch", "cupy"))
        if self.rule != "greedy":
            at_least("decode.temperature", self.temperature, 1e-3)
        within("decode.epsilon", self.epsilon, 0.0, 1.0)
        within("decode.alpha", self.alpha, 0.0, 1e6)
        if self.top_k is not None:
            at_least("decode.top_k", self.top_k, 1)
        if self.top_p is not None:
            within("decode.top_p", self.top_p, 1e-3, 1.0)
        at_least("decode.max_new_tokens", self.max_new_tokens, 1)
        if "" in self.stop_strings:
            raise UserError("decode.stop_strings has an empty one, which ends any answer: drop it.")


@dataclass
class EvaluateConfig:
    """The measurement: every method answers the same prompts, in turn, in one process."""

    path: str | None = None
    """Prompts of a file instead of held-out ones: chats, the question.jsonl of MT-bench or
    Spec-Bench, or a .txt of a question a line."""
    num_prompts: int = 48
    """Held-out prompts; each assistant turn of a test conversation gives one. Of a file of
    questions, as many, evenly spread over it."""
    warmup_prompts: int = 2
    """Prompts that every method answers before the clock counts."""
    repeats: int = 1
    """Times each prompt is answered by each method; the fastest counts."""
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    """Prompts that are answered together; every size is measured."""
    baselines: list[str] = field(default_factory=lambda: ["chain", "hf_generate", "prompt_lookup"])
    """Further methods beside plain decoding: chain (the first guess of every head), and, at batch
    size 1, hf_generate and prompt_lookup."""

    def __post_init__(self) -> None:
        at_least("evaluate.num_prompts", self.num_prompts, 1)
        at_least("evaluate.warmup_prompts", self.warmup_prompts, 0)
        at_least("evaluate.repeats", self.repeats, 1)
        for name in self.baselines:
            one_of("evaluate.baselines", name, ("chain", "hf_generate", "prompt_lookup"))
        for size in self.batch_sizes or [0]:
            at_least("evaluate.batch_sizes", size, 1)
        if len(set(self.batch_sizes)) < len(self.batch_sizes):  # its prompts would count twice
            raise UserError(f"evaluate.batch_sizes={self.batch_sizes} names a size twice.")


@dataclass
class LoggerConfig:
    """Tracking beside the run directory's own files, which are always written."""

    kind: str = "wandb"
    """wandb, csv (history.csv and metrics.csv in the run directory) or none."""
    mode: str = "offline"
    """Of W&B: offline, online for those logged in, or disabled."""
    project: str = "medusa_exp"
    """W&B's project that the run belongs to."""
    entity: str | None = None
    """W&B's user or team that owns the project; by default, that of who is logged in."""
    group: str | None = None
    """By default a sweep's jobs are a group, of the sweep's name."""
    job_type: str | None = None
    """By default the run's stages, as in train+calibrate+evaluate."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run on W&B."""
    notes: str | None = None
    """A text about the run on W&B."""
    artifacts: bool = True
    """Give W&B the heads, the tree, the evaluation and the report as versioned artifacts."""

    def __post_init__(self) -> None:
        one_of("logger.kind", self.kind, ("wandb", "csv", "none"))
        one_of("logger.mode", self.mode, ("offline", "online", "disabled"))


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
