"""Every key of a config: its default, what it may be, and what it means; one section per group.

The YAML files under `conf/` hold only what differs between the choices of a group; a default here
is right for all of them. What a value may be stands in its field and is checked on construction;
checks across several keys are in the section's `__post_init__`. docs/reference/config.md is
generated from this file by scripts/config_reference.py.
"""

import logging
from dataclasses import MISSING, dataclass, field
from functools import cache
from typing import Any

from medusa_exp.config.limits import (
    Between,
    NotBelow,
    OneOf,
    addresses,
    between,
    check,
    choice,
    given,
    words_of,
)
from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

_MOST_SEED = (1 << 32) - 1
"""What all that is seeded takes: Python, NumPy, torch and Lightning."""
_MOST_WEIGHTS = 2 * 10**9
"""Of the layers of a model that stage pretrain makes; those of a small one are a few million."""
_MOST_HEADS = 16
NO_MODEL = "model.path is not set: name a Hugging Face model directory or hub name."
_OF_MODEL = {"regenerate", "train", "calibrate", "evaluate", "export", "chat"}
"""Stages that take a model, and make none."""


@cache  # so that it is said once
def _new_word(key: str, value: str, word: str) -> str:
    """Return `word` for the old word `own`; other values stay."""
    if value != "own":
        return value
    log.info("%s=own is an old word: it is called %s now", key, word)
    return word


@dataclass
class SourceConfig:
    """One of several sources of conversations."""

    path: str = given(MISSING)
    """As `dataset.path`."""
    weight: float = between(0.01, 100.0, default=1.0)
    """How often each of its conversations is trained on in a pass: 0.5 is every other time."""

    def __post_init__(self) -> None:
        check(self, "dataset.sources.*")


@dataclass
class DatasetConfig:
    """Where conversations come from, which are taken, and how they are split."""

    kind: str = choice("sharegpt", "hub", "synthetic")
    """sharegpt (read `path` or `sources`), hub (the same, from a data set of the Hugging Face hub)
    or synthetic (generate `num_conversations`, then read that file)."""
    path: str | None = given()
    """A file, a folder or a glob of chats: JSON, JSON Lines, CSV, TSV, Parquet or Arrow, each also
    in gzip, bzip2, xz, zstd, zip or tar. Parquet, Arrow and zstd need pip install
    'medusa-exp[parquet]'. With kind=hub: owner/name."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources instead of one path: name -> {path, weight}."""
    hub_split: str = given("train")
    """Split of the hub's data set that conversations are taken from."""
    form: str = choice(
        "auto",
        "messages",
        "conversation",
        "prompt",
        "instruction",
        "question",
        "input",
        "user",
        "chosen",
        "contents",
        "body",
        "winner",
        "mapping",
        "replies",
        "data",
        "text",
        "list",
    )
    """Form of the records: auto (told by their keys, one by one) or a row of the table in
    docs/guide/data.md, which is named by a key of the form."""
    columns: dict[str, str] = field(default_factory=dict)
    """Keys of records of any other form: {user: KEY, assistant: KEY, system: KEY, reasoning: KEY},
    or {messages: KEY}. A key may be a path, as answers.text.0."""
    role_map: dict[str, str] = field(default_factory=dict)
    """Further names of roles: what stands in the file -> system, user, assistant or tool."""
    strict: bool = False
    """Make the first chat that cannot be used an error, instead of counting it."""
    deduplicate: bool = True
    """Take conversations of the same words once. Else copies may stand in train and in test."""
    min_turns: int = between(0, 1_000_000, default=1)
    """Fewest messages of a conversation, system messages not counted."""
    max_turns: int | None = between(1, 1_000_000, default=None)
    """Most messages of a conversation, counted alike; null is no limit."""
    min_chars: int = between(0, 1_000_000_000, default=0)
    """Fewest characters of a conversation's messages together."""
    max_chars: int | None = between(1, 1_000_000_000, default=None)
    """Most characters of a conversation's messages together; null is no limit."""
    max_record_bytes: int = between(1 << 10, 1 << 31, default=1 << 23)
    """Bytes of the largest record that is read (of a table's row: of its text as JSON); what is
    larger is dropped, and counted. 8 MiB are more than a million words."""
    sample_fraction: float = between(1e-9, 1.0, default=1.0)
    """Share of the conversations to take, by a hash of `seed` and the id."""
    max_length: int = between(8, 1 << 24, default=1024)
    """Tokens that a conversation is cut to; never more than the backbone's own limit."""
    val_fraction: float = between(0.0, 0.5, default=0.05)
    """Share of conversations, by a hash of the id, for validation and calibration."""
    test_fraction: float = between(0.0, 0.5, default=0.05)
    """Share of conversations, by a hash of the id, whose prompts the evaluation answers."""
    num_workers: int | None = between(1, 1024, default=None)
    """Processes that render and tokenize a large data set; by default, one for each core."""
    num_conversations: int = between(1, 1_000_000, default=4000)
    """How many conversations kind=synthetic generates."""
    seed: int = between(0, _MOST_SEED, default=0)
    """Seed of kind=synthetic and of `sample_fraction`; the split depends on ids alone."""

    def __post_init__(self) -> None:
        check(self, "dataset")
        if self.max_turns is not None:
            NotBelow(max(1, self.min_turns)).check("dataset.max_turns", self.max_turns)
        if self.max_chars is not None:
            NotBelow(max(1, self.min_chars)).check("dataset.max_chars", self.max_chars)


@dataclass
class TokenizerConfig:
    """Which tokenizer and chat template: the model's own, or one trained by stage pretrain.

    Where a key is null or empty, what the tokenizer's own files say holds.
    """

    kind: str = choice("auto", "trained")
    """auto (the one in `path`, or in the model's directory) or trained (a byte-level BPE)."""
    path: str | None = given()
    """Directory or hub name, where it is not the model's."""
    vocab_size: int = between(272, 1 << 20, default=2048)
    """Entries of a trained tokenizer, special tokens included."""
    tokenizer_class: str = "auto"
    """auto (as the files say) or a fast class of transformers: PreTrainedTokenizerFast takes
    tokenizer.json as it stands, where others (LlamaTokenizer) build it anew from its vocabulary."""
    model_max_length: int | None = between(1, 1 << 31, default=None)
    """Tokens from which on the tokenizer warns; what cuts sequences is dataset.max_length."""
    padding_side: str | None = choice("left", "right", default=None)
    """Side on which the tokenizer pads."""
    truncation_side: str | None = choice("left", "right", default=None)
    """Side from which a conversation that is too long is cut."""
    add_bos_token: bool | None = None
    """Whether the tokenizer puts bos_token before a text."""
    add_eos_token: bool | None = None
    """Whether the tokenizer puts eos_token behind a text."""
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
        check(self, "tokenizer")
        words = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # as transformers has them
        roles, longer = OneOf(tuple(f"{word}_token" for word in words)), NotBelow(1)
        for role, token in self.special_tokens.items():
            roles.check("tokenizer.special_tokens", role)
            longer.check(f"tokenizer.special_tokens.{role}: the token's length", len(token))
        for token in self.additional_special_tokens:
            longer.check("tokenizer.additional_special_tokens: a token's length", len(token))


@dataclass
class PretrainConfig:
    """The small Llama that stage pretrain makes for model=tiny, and how it is trained.

    The keys up to max_position_embeddings are those of transformers' LlamaConfig.
    """

    hidden_size: int = between(1, 1 << 14, default=256)
    """Width D of the hidden states."""
    intermediate_size: int = between(1, 1 << 16, default=688)
    """Width of the MLP of a layer."""
    num_hidden_layers: int = between(1, 256, default=4)
    """Transformer layers."""
    num_attention_heads: int = between(1, 256, default=4)
    """Query heads of a layer."""
    num_key_value_heads: int = between(1, 256, default=2)
    """Key-value heads of a layer."""
    max_position_embeddings: int = between(1, 1 << 20, default=1024)
    """Tokens of the longest sequence."""
    max_steps: int = between(1, 10_000_000, default=300)
    """Optimizer steps; a batch each."""
    batch_tokens: int = between(16, 1 << 22, default=4096)
    """Tokens of a batch, padding included."""
    learning_rate: float = between(1e-9, 10.0, default=3e-3)
    """The greatest learning rate; see `train.warmup_fraction`."""
    warmup_fraction: float = between(0.0, 1.0, default=0.05)
    """Share of the steps with a rising learning rate; a cosine to zero follows."""

    def __post_init__(self) -> None:
        check(self, "model.pretrain")
        for key, pieces, times in (
            ("hidden_size", "num_attention_heads", 2),  # rotary positions come in pairs
            ("num_attention_heads", "num_key_value_heads", 1),
        ):
            if getattr(self, key) % (parts := times * getattr(self, pieces)):
                raise UserError(
                    f"model.pretrain.{key}={getattr(self, key)} must be a multiple of {parts}, "
                    f"since model.pretrain.{pieces}={getattr(self, pieces)}."
                )
        if (number := self._num_weights()) > _MOST_WEIGHTS:
            raise UserError(
                f"model.pretrain.hidden_size={self.hidden_size}: its layers would have {number:,} "
                f"weights, and a tiny model has {_MOST_WEIGHTS:,} at most: make it smaller, or "
                "use model=pretrained."
            )

    def _num_weights(self) -> int:
        """Count the weights of the layers: four projections of attention, three of the MLP."""
        width_of_keys = self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        attention = 2 * self.hidden_size * (self.hidden_size + width_of_keys)
        of_layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * of_layer


@dataclass
class ModelConfig:
    """The backbone: the target model that heads are trained for."""

    kind: str = choice("pretrained", "tiny")
    """pretrained (a Hugging Face causal LM at `path`) or tiny (made by stage pretrain)."""
    path: str | None = given()
    """Directory, or hub name where there is a network."""
    revision: str | None = given()
    """Branch, tag or commit of a hub name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    attn_implementation: str = choice("auto", "sdpa", "eager")
    """Attention of transformers, of those that take the 4-D mask of a tree: auto (sdpa, or eager
    for a model that has no sdpa, such as Gemma 2 with its soft-capping; steps of decoding read the
    keys of grouped queries once, by a function of our own), sdpa or eager (as transformers has
    them)."""
    quantization: str | None = choice("8bit", "4bit", default=None)
    """8bit or 4bit (NF4): the weights of linear layers but the lm_head, by bitsandbytes. The
    quantized model is then what heads are trained for and answers are compared with."""
    device_map: str | None = choice("auto", "sequential", default=None)
    """How accelerate spreads the layers of a model too large for one GPU over all of them: auto
    (evenly) or sequential (one GPU after the other). Nothing is offloaded."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        check(self, "model")


@dataclass
class DtypeConfig:
    """Number formats. Heads and optimizer always hold their weights in float32."""

    backbone: str = choice("auto", "bfloat16", "float16", "float32")
    """Weights of the backbone: auto (as its own config says; float32 on processors that have no
    arithmetic for that), bfloat16, float16 or float32."""
    precision: str = choice("auto", "bf16-mixed", "16-mixed", "32-true")
    """Arithmetic of training, in Lightning's words: auto (bf16-mixed where the hardware has it,
    else 16-mixed on a CUDA GPU and 32-true on others), bf16-mixed, 16-mixed or 32-true."""

    def __post_init__(self) -> None:
        check(self, "dtype")


@dataclass
class HeadConfig:
    """The Medusa heads, which propose draft tokens."""

    # The names of `model.heads.FAMILIES`, written out: to import these takes torch, and seconds.
    kind: str = choice(
        "medusa", "medusa_tied", "medusa_lowrank", "hydra", "rooted", "recurrent", "auto"
    )
    """medusa (a vocabulary projection for each head), medusa_tied (the backbone's lm_head for all),
    medusa_lowrank (projections of low `rank`, or of `num_tokens` frequent tokens), hydra (each head
    sees the tokens that are drafted before its own), rooted (all see the token that the hidden
    state gave, the root, and run side by side), recurrent (as hydra, by one block that all heads
    share, applied once for each token) or auto (recurrent, of 16,384 frequent tokens if
    `num_tokens` says nothing else, above 16,384 tokens of vocabulary, else rooted)."""
    num_heads: int = between(1, _MOST_HEADS, default=4)
    """K: head k predicts the token k places after the backbone's next one."""
    num_layers: int = between(0, 16, default=1)
    """L: residual blocks before each head's vocabulary projection."""
    bias: bool = True
    """Whether the residual blocks have biases."""
    rank: int | None = between(16, 1 << 16, default=None)
    """Rank of the projections of medusa_lowrank, rooted or recurrent; null is full."""
    num_tokens: int | None = between(16, 1 << 24, default=None)
    """Vocabulary of the heads of medusa_tied, medusa_lowrank, rooted or recurrent: the most
    frequent tokens of the training data; others are never proposed. null is all, or what kind=auto
    takes."""
    own_projections: bool | None = None
    """Give each head of kind recurrent a vocabulary projection of its own, not one for all: more
    tokens a step at the price of memory. null does where the heads' vocabulary has up to 16,384
    tokens."""
    prefix_attention: bool = False
    """Put a layer of attention over all hidden states so far before the heads (of any kind, but it
    was found for hydra)."""

    def __post_init__(self) -> None:
        check(self, "head")
        low_rank = ("medusa_lowrank", "rooted", "recurrent")
        for key, kinds in (("rank", low_rank), ("num_tokens", (*low_rank, "medusa_tied", "auto"))):
            if getattr(self, key) is not None:
                OneOf(kinds).check(f"head.kind (with head.{key})", self.kind)
        if self.own_projections:  # false is true of no other kind, and asks for nothing
            one_of = OneOf(("recurrent", "auto"))
            one_of.check("head.kind (with head.own_projections)", self.kind)
        if self.kind == "medusa_lowrank" and self.rank is None and self.num_tokens is None:
            raise UserError("head.kind=medusa_lowrank needs head.rank or head.num_tokens.")
        if self.kind in ("medusa_tied", "hydra", "recurrent", "auto"):
            NotBelow(1).check(f"head.num_layers (with head.kind={self.kind})", self.num_layers)


@dataclass
class LoraSettings:
    """LoRA adapters on the backbone's linear layers (train.kind=medusa2), and how they learn."""

    rank: int = between(1, 1 << 12, default=32)
    """Rank of the two matrices that are added to a layer's weights."""
    alpha: int = between(1, 1 << 16, default=16)
    """What an adapter adds is multiplied by alpha / rank."""
    dropout: float = between(0.0, 0.9, default=0.05)
    """Share of the adapters' inputs that is left out at random in training."""
    layers: list[str] = field(default_factory=list)
    """Names of the linear layers to adapt, such as q_proj; none means all of them, but not the
    lm_head."""
    learning_rate: float = between(1e-9, 10.0, default=5e-4)
    """Learning rate of the adapters; `train.learning_rate` is the heads'."""
    heads_only_fraction: float = between(0.0, 1.0, default=0.1)
    """Share of the steps, at the beginning, in which the heads learn alone."""
    self_distillation: bool = False
    """Keep the backbone near to what it predicts without its adapters, instead of to the data."""
    gradient_checkpointing: bool = False
    """Compute the backbone's activations twice instead of keeping them."""
    output: str = choice("merged", "adapter")
    """merged (a whole model in `backbone/`) or adapter (the adapters alone)."""

    def __post_init__(self) -> None:
        check(self, "train.lora")


@dataclass
class TrainConfig:
    """Training of the heads, on a frozen backbone or together with it."""

    kind: str = choice("medusa1", "medusa2")
    """medusa1 (the backbone is frozen) or medusa2 (adapters on it learn too: answers change)."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    heads_from: str | None = given()
    """A run directory, or its heads/, whose heads this training starts from; `head.kind=auto` is
    their family then."""
    max_steps: int | None = between(1, 10_000_000, default=None)
    """Optimizer steps; overrides `epochs`."""
    epochs: float = between(1e-3, 1e4, default=2.0)
    """Passes over the training split, where `max_steps` is not set."""
    min_steps: int = between(1, 10_000_000, default=1000)
    """A small data set is walked more often than `epochs`, until so many steps are made."""
    text: str = choice("data", "regenerated")
    """data (the conversations as they are) or regenerated (self-distillation: with the responses
    that stage regenerate lets the backbone give, the text that heads meet in decoding; `own` is the
    old word for it)."""
    labels: str = choice("teacher", "data")
    """teacher (the backbone's own argmax after the same text, which is what decoding checks draft
    tokens against; `own` is the old word for it) or data (the token that stands there). Used by
    loss=ce, and by validation."""
    loss: str = choice("auto", "ce", "kl", "topk_kl", "tv", "nla", "lk")
    """ce (cross entropy with the labels), kl (divergence from the backbone's own distribution) or
    topk_kl (the same, from its `top_k` likeliest tokens alone: nearly as cheap as ce). For drafts
    that are sampled, by their probability alpha to be accepted at temperature 1: tv (1 - alpha, the
    total variation), nla (-log alpha) or lk (kl and nla, mixed by `lk_decay`). auto is nla with
    kind=medusa1 where decoding may sample drafts (decode.draft=sampled, or auto with
    tree=calibrated and no tree.lookup) at a temperature of 0.7 or more, else ce."""
    teacher: str = choice("full", "top_k")
    """With loss=tv, nla and lk: the backbone's full distribution, or its `top_k` likeliest tokens,
    as if others were never accepted."""
    top_k: int = between(1, 1 << 16, default=16)
    """Tokens of loss=topk_kl and of teacher=top_k."""
    lk_decay: float = between(0.0, 1000.0, default=10.0)
    """With loss=lk: the share of kl is exp(-lk_decay * alpha), so that it teaches what is hardly
    accepted, and nla the rest."""
    batching: str = choice("padded", "packed")
    """padded (a document a row, rows of similar length) or packed (several documents a row, which
    do not see each other: almost no padding, but attention over longer rows)."""
    batch_tokens: int = between(1, 1 << 24, default=4096)
    """Tokens of a micro-batch, padding included."""
    accumulate: int = between(1, 1 << 16, default=1)
    """Gradient accumulation: micro-batches to an optimizer step."""
    optimizer: str = choice("adamw", "adamw_8bit", "muon")
    """adamw, adamw_8bit (needs bitsandbytes) or muon (Muon for the matrices between hidden states,
    AdamW for the rest)."""
    learning_rate: float | None = between(1e-9, 10.0, default=None)
    """The heads' greatest learning rate, after the warm-up; null takes one by the size of the
    backbone's weights, its width and the tokens of a step."""
    weight_decay: float = between(0.0, 100.0, default=0.0)
    """Weight decay of matrices; biases do not decay. `decay` is another thing: it weighs the losses
    of heads."""
    warmup_fraction: float = between(0.0, 1.0, default=0.05)
    """Share of the steps with a rising learning rate; a cosine to zero follows."""
    gradient_clip: float = between(0.0, 1e6, default=1.0)
    """The greatest norm of a step's gradient; 0 does not clip."""
    average: float = between(0.0, 0.99999, default=0.0)
    """Decay of an exponential moving average (EMA) of the heads, such as 0.99, which takes their
    place in the end; 0 keeps none."""
    decay: float = between(0.01, 1.0, default=0.8)
    """Weight of the heads' losses: head k's counts decay**k (Medusa, section 2.2.1)."""
    head_weights: str = choice("auto", "decay", "acceptance")
    """decay (powers of `decay`), acceptance (by what a head adds to the expected length of a
    draft, as far as the training has come; their sum is that of the powers) or auto (acceptance
    with loss=nla, else decay). It matters where heads share parameters: head=recurrent,
    head=rooted, head.prefix_attention."""
    own_drafts_from: float | None = between(0.0, 1.0, default=None)
    """Share of the steps after which heads of kind hydra or recurrent see the tokens that they
    draft themselves in place of the text's, as in drafts that go astray; null is never."""
    coefficient: float = between(1e-6, 1e6, default=1.0)
    """Weight of the heads' loss (lambda_0 of Medusa-2). With kind=medusa1 a constant one does
    little: optimizers even it out, but the gradient is clipped before they see it."""
    coefficient_schedule: str = choice("constant", "linear", "sine")
    """constant, or linear or sine: the coefficient rises from nearly 0 over the whole training."""
    loss_chunk_rows: int | None = between(1, 1 << 24, default=None)
    """Rows whose logits exist at one time, at most. By default 256 on a CPU, and on a GPU as many
    as fit into a sixteenth of its memory."""
    loss_form: str = choice("auto", "recompute", "at_once")
    """recompute (their logits are computed again in the backward pass), at_once (gradients are
    computed with the loss: a quarter less work; not the backbone's own loss of kind=medusa2) or
    auto (at_once where there is memory for it)."""
    features: str = choice("online", "cache")
    """online (the backbone runs at every step) or cache (its hidden states of all documents are
    made once and read from `cache_dir`: for several trainings on the same documents)."""
    feature_workers: int = between(0, 1024, default=0)
    """With features=cache: processes of a Ray cluster that make the hidden states side by side, a
    GPU or a core each (see RAY_ADDRESS); 0 is this process alone."""
    compile: str = choice("auto", "true", "false")
    """Let torch.compile work on the loss and on the layers of the frozen backbone, for quicker
    steps: true, false, or auto (on a GPU, where the training is longer than a few minutes)."""
    val_every: int = between(1, 10_000_000, default=200)
    """Optimizer steps between validations; one more comes at the end."""
    val_batches: int = between(1, 1_000_000, default=16)
    """Micro-batches of a validation."""
    val_prompts: int = between(0, 100_000, default=16)
    """Held-out prompts that the backbone answers once; each validation counts the steps that
    decoding these answers would take (val/accept_length). 0 counts none."""
    val_tree_nodes: int = between(1, 256, default=16)
    """Nodes of the tree that val/accept_length is of; val/accept_length_chain is of the chain."""
    keep: str = choice("best", "last")
    """best (the heads of the validation with the greatest val/accept_length) or last."""
    patience: int | None = between(1, 1_000_000, default=None)
    """Early stopping: validations without a greater val/accept_length after which training ends."""
    checkpoint_every: int = between(1, 10_000_000, default=200)
    """Optimizer steps between checkpoints. One more comes at the end, and on SIGTERM and SIGINT."""
    strategy: str = choice("auto", "ddp", "fsdp", "ray")
    """auto (one device), ddp (`devices` of them on this machine, each with a copy of the backbone),
    fsdp (each keeps a part of the backbone's layers, which are gathered one by one to run) or ray
    (ddp on the machines of a Ray cluster, see RAY_ADDRESS)."""
    devices: int = between(1, 1024, default=1)
    """With strategy=ddp, fsdp and ray: processes, on a GPU each or on the cores of the CPU. A step
    takes so many times `accumulate` micro-batches."""
    max_failures: int = between(0, 1000, default=3)
    """With strategy=ray: times that workers may be lost and all start again from the checkpoint."""
    resume: str = choice("auto", "never")
    """auto (go on from the run directory's newest checkpoint) or never (start again)."""
    deterministic: bool = False
    """Have torch refuse what is not reproducible bit by bit. A CPU is reproducible without."""

    def __post_init__(self) -> None:
        self.text = _new_word("train.text", self.text, "regenerated")
        self.labels = _new_word("train.labels", self.labels, "teacher")
        self.compile = str(self.compile).lower()  # `true` is a truth value of YAML, not a word
        check(self, "train")
        if self.kind == "medusa2":  # its hidden states change from step to step
            self._only("features", "train.kind=medusa2", "online")
            self._only("compile", "train.kind=medusa2", "auto", "false")
        if self.strategy == "fsdp":  # what is trained of the backbone would have to be sharded too
            self._only("kind", "train.strategy=fsdp", "medusa1")
            self._only("compile", "train.strategy=fsdp", "auto", "false")
        if self.strategy == "auto":
            Between(1, 1).check("train.devices (with train.strategy=auto)", self.devices)

    def _only(self, key: str, other: str, *words: str) -> None:
        OneOf(words).check(f"train.{key} (with {other})", getattr(self, key))


@dataclass
class InspectConfig:
    """How much stage inspect looks at and shows."""

    num_samples: int = between(0, 10_000, default=3)
    """Rows that are printed and written with their trained text marked."""
    num_conversations: int = between(1, 10_000_000, default=500)
    """Conversations, evenly spread over the data set, whose tokens are counted by role."""
    num_documents: int = between(1, 1_000_000, default=32)
    """Training documents that the model, if one is given, reads to measure how near they are to
    what it would predict."""

    def __post_init__(self) -> None:
        check(self, "inspect")


@dataclass
class RerunConfig:
    """Which run +experiment=rerun does again."""

    source: str | None = given()
    """The directory of the run that is done again, with its saved config."""

    def __post_init__(self) -> None:
        check(self, "rerun")


@dataclass
class RegenerateConfig:
    """Responses of the backbone to the prompts of the training documents; see `train.text`.

    Tokens are chosen as `decode` says, and responses end where it says.
    """

    num_documents: int | None = between(1, 1_000_000_000, default=None)
    """Training documents, drawn by the seed, whose prompts are answered; all by default."""
    num_val_documents: int = between(1, 1_000_000, default=64)
    """Documents of the validation split that are answered too, to validate heads on."""
    batch_size: int = between(1, 4096, default=64)
    """Documents that are answered at a time, the next one in the place of each that is done; fewer
    where memory has no room for so many."""
    workers: int = between(0, 1024, default=0)
    """Processes of a Ray cluster that answer side by side, a GPU or a core each (see RAY_ADDRESS);
    0 is this process alone."""
    max_new_tokens: int = between(1, 1 << 20, default=256)
    """Most tokens of a response. One that is not finished by then is its document's last."""
    use_heads: bool = False
    """Decode with the heads and the tree that the run directory has already: the same responses,
    sooner where batches are small."""
    server: str | None = addresses()
    """URL of a running engine (vLLM, SGLang) that answers instead of this process, as
    http://localhost:8000; several with commas between them, in quotes. See `serving`."""
    server_concurrency: int = between(1, 4096, default=64)
    """Documents that are on their way to engines at a time."""

    def __post_init__(self) -> None:
        check(self, "regenerate")
        if self.server is not None and (self.workers or self.use_heads):
            raise UserError(
                "regenerate.server leaves the work to engines: regenerate.workers and "
                "regenerate.use_heads are for answering without one. Leave them out."
            )


@dataclass
class ServingConfig:
    """Running engines that stages ask: those of `regenerate.server` and `evaluate.server`.

    They get prompts as token ids at /v1/completions, and are refused where they answer otherwise
    than the backbone.
    """

    model: str | None = given()
    """Name under which an engine serves the model; by default, its only one."""
    key_variable: str | None = given()
    """Name of the environment variable that holds the key which an engine asks for, if it does."""
    patience: float = between(1, 86400.0, default=300.0)
    """Seconds that an engine may take for an answer. One that does not answer is asked again, for
    twice as long."""

    def __post_init__(self) -> None:
        check(self, "serving")


@dataclass
class TreeConfig:
    """The tree of draft tokens that one step verifies, and how stage calibrate chooses it."""

    kind: str = choice("calibrated", "dynamic", "chain", "medusa_63", "custom")
    """calibrated (measured on held-out text), dynamic (at each step, the nodes that the heads hold
    for the likeliest), chain (the likeliest token of every head), medusa_63 (the tree of the Medusa
    authors) or custom (`path` or `paths`)."""
    path: str | None = given()
    """With kind=custom: a JSON file, as tree.json or a list like `paths`."""
    paths: list[list[int]] = between(0, 255, default=[])
    """With kind=custom: nodes as ranks from the first head on, the form of the reference's
    medusa_choices: [[0],[0,0],[1]]."""
    num_nodes: int | None = between(1, 256, default=None)
    """With kind=calibrated: the largest tree of at most so many nodes that was measured, instead of
    the fastest. With kind=dynamic: nodes of a step; by default, as many as the calibrated tree has.
    """
    batch_sizes: list[int] = between(1, 4096, default=[1, 4, 16])
    """Calibration finds the fastest tree for each; decoding uses that of the size next below."""
    lookup: int | None = between(0, 64, default=None)
    """Nodes added to the tree, of whatever kind: a branch of tokens that are looked up in the
    prompt and the answer so far, after the longest recent match. Pays where text repeats: edits,
    summaries, retrieval. By default as many as calibration found to be fastest, or as the file of
    `path` says, and none for other trees. 0 looks nothing up."""
    num_prompts: int = between(1, 100_000, default=32)
    """Held-out prompts that the backbone answers to count which draft tokens are accepted."""
    max_nodes: int = between(1, 256, default=64)
    """The largest tree that calibration considers, the root included."""
    max_rank: int = between(1, 256, default=10)
    """Candidates of a head that calibration considers."""

    def __post_init__(self) -> None:
        check(self, "tree")
        known = {(), *map(tuple, self.paths)}
        for path in self.paths:
            if len(path) > _MOST_HEADS:
                raise UserError(
                    f"tree.paths has a path of {len(path)} ranks, and there are {_MOST_HEADS} "
                    "heads at most: shorten it."
                )
            if tuple(path[:-1]) not in known:
                raise UserError(
                    f"tree.paths: path {path} has no parent {path[:-1]} among the paths: add it."
                )


@dataclass
class DecodeConfig:
    """How tokens are generated."""

    rule: str = choice("greedy", "sampling", "typical")
    """greedy (token for token what plain greedy decoding gives), sampling (the same distribution as
    plain sampling) or typical (Medusa's acceptance, which is lossy)."""
    temperature: float = between(0.0, 1000.0, default=1.0)
    """Temperature of sampling and typical."""
    top_k: int | None = between(1, 1 << 24, default=None)
    """With rule=sampling: draw from so many of the likeliest tokens alone."""
    top_p: float | None = between(1e-3, 1.0, default=None)
    """With rule=sampling: draw from the likeliest tokens that together have this probability."""
    draft: str = choice("auto", "top", "sampled")
    """With rule=sampling, what heads draft: top (their likeliest tokens, verified by the draw of
    the next token), sampled (draws from their distributions, after the same temperature, top_k and
    top_p, verified as whole paths), or auto (what stage calibrate found to be faster at this
    temperature; top before). The distribution is that of plain sampling with each."""
    epsilon: float = between(0.0, 1.0, default=0.09)
    """Typical acceptance: a draft token is accepted if its probability is above
    min(epsilon, alpha * exp(-entropy)). This is epsilon, the hard threshold."""
    alpha: float = between(0.0, 1e6, default=0.3)
    """Typical acceptance: alpha, the factor on exp(-entropy)."""
    cuda_graph: bool = True
    """On a GPU, capture a step (draft, backbone, verify, commit) as one CUDA graph and replay it;
    plain decoding too. false runs it op by op, in tensors that grow."""
    pack_weights: bool = True
    """On a CPU, pack the weights of those linear layers for which that is faster, as is measured:
    a step over a tree then costs less, a plain one the same. Takes memory for most of them."""
    int8_heads: bool = True
    """On a CPU with AVX2 or AVX-512, draft by large float32 projections of heads in 8-bit integers,
    which a step reads in less time. Greedy answers stay the same; sampling keeps its distribution,
    though a seed gives other draws; typical acceptance may accept other tokens."""
    compile: str = choice("auto", "true", "false")
    """Compile a decoder layer (torch.compile) for all layers of captured steps, plain ones too, and
    of prompts that run together in more than 16 slots: true, false, or auto (on a GPU, where the
    steps of calibrate and evaluate, or of regenerate, are many enough to pay for it). true on a CPU
    needs a C++ compiler."""
    verifier: str = choice("auto", "torch", "cupy")
    """torch, cupy (the CUDA kernels), or auto (the kernels wherever they can be used; on a CPU, the
    nodes of a path alone)."""
    max_new_tokens: int = between(1, 1 << 20, default=128)
    """Tokens after which an answer ends at the latest. A prompt has to leave room for them."""
    stop_ids: list[int] = between(0, 1 << 24, default=[])
    """Token ids that end an answer, besides the model's own."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end an answer, with the token that completes them."""

    def __post_init__(self) -> None:
        self.compile = str(self.compile).lower()  # `true` is a truth value of YAML, not a word
        check(self, "decode")
        if self.compile == "true" and not self.cuda_graph:
            raise UserError(
                "decode.compile=true compiles steps of fixed shapes, which decode.cuda_graph=false "
                "turns off: drop one of the two."
            )
        if self.rule != "greedy":
            NotBelow(1e-3).check("decode.temperature", self.temperature)
        if self.draft == "sampled" and self.rule != "sampling":
            raise UserError(
                f"decode.draft=sampled goes with decode=sampling, not decode.rule={self.rule}: "
                "set decode=sampling, or decode.draft=auto."
            )
        if "" in self.stop_strings:
            raise UserError("decode.stop_strings has an empty one, which ends any answer: drop it.")


@dataclass
class EvaluateConfig:
    """The measurement: every method answers the same prompts, in turn, in one process."""

    path: str | None = given()
    """Prompts of a file instead of held-out ones: chats, the question.jsonl of MT-bench or
    Spec-Bench, or a .txt of a question a line."""
    num_prompts: int = between(1, 1_000_000, default=48)
    """Held-out prompts; each assistant turn of a test conversation gives one. Of a file of
    questions, as many, evenly spread over it."""
    warmup_prompts: int = between(0, 10_000, default=2)
    """Prompts that every method answers before the clock counts."""
    repeats: int = between(1, 1000, default=1)
    """Times each prompt is answered by each method; the fastest counts."""
    batch_sizes: list[int] = between(1, 4096, default=[1])
    """Prompts that are answered at a time, from 2 on the next one in the place of each that is
    done; every size is measured."""
    baselines: list[str] = choice(
        *("chain", "hf_generate", "prompt_lookup"),
        default=["chain", "hf_generate", "prompt_lookup"],
    )
    """Further methods beside plain decoding: chain (the likeliest token of every head), and, at
    batch size 1, hf_generate and prompt_lookup."""
    server: str | None = addresses()
    """URL of a running engine that serves the backbone with these heads: it is measured from
    outside, on the same prompts. See `serving`."""
    server_plain: str | None = addresses()
    """URL of one that serves the backbone without heads, for the speed-up that users of the first
    have."""
    server_concurrency: list[int] = between(1, 4096, default=[1, 8, 32])
    """Prompts that are on their way to an engine at a time; each number is measured."""

    def __post_init__(self) -> None:
        check(self, "evaluate")
        if len(set(self.batch_sizes)) < len(self.batch_sizes):  # its prompts would count twice
            raise UserError(f"evaluate.batch_sizes={self.batch_sizes} names a size twice.")
        if self.server_plain is not None and self.server is None:
            raise UserError(
                "evaluate.server_plain is what evaluate.server, the engine with heads, is compared "
                "with: set that too."
            )


@dataclass
class ExportConfig:
    """The heads in the format of a serving engine, which stage export writes and reads back."""

    format: str = choice("vllm", "vllm_medusa", "tgi", "mlc", "hf_generate")
    """vllm (vLLM with this package beside it: all kinds of heads), vllm_medusa (vLLM up to 0.32),
    tgi (FasterDecoding's names, which Text Generation Inference reads), mlc (MLC-LLM) or
    hf_generate (the whole model for transformers, whose generate decodes with the tree)."""
    out: str | None = given()
    """Directory to write; by default export/FORMAT in the run directory."""
    dtype: str = choice("auto", "float32", "bfloat16", "float16")
    """Type of the stored tensors: auto (as trained, float32), float32, bfloat16 or float16."""
    license: str | None = None
    """License that the model card names, an identifier of the hub; by default, unknown."""

    def __post_init__(self) -> None:
        check(self, "export")


@dataclass
class LoggerConfig:
    """Tracking beside the run directory's own files, which are always written."""

    kind: str = choice("wandb", "csv", "none")
    """wandb, csv (history.csv and metrics.csv in the run directory) or none."""
    mode: str = choice("offline", "online", "disabled")
    """Mode of W&B: offline, online for those logged in, or disabled."""
    project: str = "medusa_exp"
    """W&B's project that the run belongs to."""
    entity: str | None = None
    """W&B's user or team that owns the project; by default, that of who is logged in."""
    group: str | None = None
    """W&B's group of the run. By default a sweep's jobs are a group, of the sweep's name."""
    job_type: str | None = None
    """W&B's type of the run. By default its stages, as in train+calibrate+evaluate."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run on W&B."""
    notes: str | None = None
    """A text about the run on W&B."""
    artifacts: bool = True
    """Give W&B the heads, the tree, the evaluation and the report as versioned artifacts."""

    def __post_init__(self) -> None:
        check(self, "logger")


@dataclass
class CacheConfig:
    """How what lies in `cache_dir` is trusted."""

    verify: bool = False
    """Read every byte of the cache before the first stage, and make anew what is damaged; and of
    the run's heads and backbone, and refuse them. Else a GiB of each is read when it is opened, the
    smallest files first; others are looked at in part: their length, both ends, and hidden states
    one document at a time as they are used."""


@dataclass
class Config:
    """An experiment: which stages run, on what, into which directory."""

    name: str = "default"
    """Name of the run directory's parent: outputs/<name>/<timestamp>."""
    stages: list[str] = field(default_factory=list)
    """What to do, in this order."""
    run_dir: str = ""
    """Where everything is written. An existing run there is continued with its saved config."""
    sweep_dir: str = ""
    """Where a sweep's jobs have their run directories; the same one again continues a sweep."""
    cache_dir: str = given("outputs/cache")
    """What runs share: generated and tokenized data, hidden states, regenerated responses,
    pretrained tiny models; each under a hash of what made it."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    heads_from: str | None = given()
    """A run directory, or its heads/, whose heads this run decodes with, instead of training some;
    or a directory of heads in the format of FasterDecoding, vLLM, TGI, MLC-LLM or ModelOpt."""
    heads_match: str = choice("warn", "strict", "any")
    """What if heads were trained for other weights of this model (a fine-tune, merged adapters), or
    with another tokenizer: warn (say what they are worth here; refuse another tokenizer), strict
    (refuse both) or any (go on)."""
    device: str = choice("auto", "cpu", "cuda", "mps")
    """auto (cuda where there is one, else cpu), cpu, cuda, or mps (Apple's GPUs; all in float32,
    and untried)."""
    seed: int = between(0, _MOST_SEED, default=0)
    """Seed of initial weights, order of training and sampling; the data have `dataset.seed`."""
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
    export: ExportConfig = field(default_factory=ExportConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        check(self, "")
        if self.heads_from is not None and "train" in self.stages:
            raise UserError(
                "heads_from is for runs that train no heads: leave stage train out of stages, or "
                "set train.heads_from to start the training from these heads."
            )
        self._check_tree()
        self._check_prompts()
        self._check_export()
        if self.train.own_drafts_from is not None:
            kinds = ("hydra", "recurrent")
            OneOf(kinds).check("head.kind (with train.own_drafts_from)", self.head.kind)
        if self.device == "mps":
            OneOf(("auto", "float32")).check(
                "dtype.backbone (with device=mps)", self.dtype.backbone
            )
            OneOf(("auto", "32-true")).check(
                "dtype.precision (with device=mps)", self.dtype.precision
            )
        if self.model.device_map is not None:  # one process has all the devices
            untied = (kind for kind in words_of(HeadConfig, "kind") if kind != "medusa_tied")
            for key, value, words in (
                ("train.strategy", self.train.strategy, ("auto",)),
                ("train.kind", self.train.kind, ("medusa1",)),
                ("head.kind", self.head.kind, tuple(untied)),
                ("tokenizer.resize_embedding", str(self.tokenizer.resize_embedding), ("False",)),
            ):
                OneOf(words).check(f"{key} (with model.device_map)", value)

    def _check_prompts(self) -> None:
        """Refuse, before anything long, what leaves these stages no prompt to answer."""
        dataset, new_tokens = self.dataset, self.decode.max_new_tokens
        uses = {"val": "calibrate" in self.stages}
        uses["test"] = "evaluate" in self.stages and self.evaluate.path is None
        for split, stage in (("val", "calibrate"), ("test", "evaluate")):
            if not uses[split]:
                continue
            if getattr(dataset, f"{split}_fraction") == 0:
                raise UserError(
                    f"dataset.{split}_fraction=0 leaves stage {stage} no prompt: raise it, or "
                    f"leave {stage} out of stages."
                )
            if new_tokens >= dataset.max_length:
                raise UserError(
                    f"decode.max_new_tokens={new_tokens} leaves no token of dataset.max_length="
                    f"{dataset.max_length} to a prompt of stage {stage}: lower one or raise the "
                    "other."
                )

    def _check_export(self) -> None:
        """Refuse, before anything long, what a whole model for transformers cannot be."""
        if "export" not in self.stages or self.export.format != "hf_generate":
            return
        if self.export.dtype != "auto":
            raise UserError(
                f"export.dtype={self.export.dtype}: export.format=hf_generate takes the heads' "
                "files as they are, and loads them in the model's dtype. Leave it out."
            )
        is_adapted = "train" in self.stages and self.train.kind == "medusa2"
        if is_adapted and self.train.lora.output == "adapter":
            raise UserError(
                "train.lora.output=adapter leaves no whole model, which export.format=hf_generate "
                "is to write: set train.lora.output=merged, or leave export out of stages."
            )

    @property
    def uses_tree(self) -> bool:
        """Does a stage decode over the tree, or write it with a whole model?"""
        is_written = "export" in self.stages and self.export.format == "hf_generate"
        return is_written or bool({"calibrate", "evaluate", "chat"} & {*self.stages})

    def _check_tree(self) -> None:
        """Refuse, before anything long, a tree that these stages will not be able to use."""
        tree, num_heads = self.tree, self.head.num_heads
        if tree.kind == "custom" and self.uses_tree and bool(tree.path) == bool(tree.paths):
            raise UserError("tree=custom needs either tree.path, a JSON file, or tree.paths.")
        if "train" not in self.stages:  # heads that are there have a number of their own
            return
        depth = {"medusa_63": 4, "custom": max(map(len, tree.paths), default=0)}.get(tree.kind, 0)
        if depth > num_heads:
            raise UserError(
                f"head.num_heads={num_heads} is too small for tree.kind={tree.kind}, which is "
                f"{depth} deep: train {depth} heads at least, or choose another tree."
            )


def check_model(config: Any) -> None:
    """Refuse a config whose stages take a model, and that names none.

    Not where others are among them: pretrain and demo have their own, and what is no stage is told
    elsewhere. Data can be looked at by a tokenizer alone, for which that stage asks.

    Args:
        config: as it was composed, or as it was checked.

    Raises:
        UserError: model.path is not set.
    """
    stages = {*config.stages} - {"report", "inspect"}
    takes_one = bool(stages) and stages <= _OF_MODEL and config.model.kind == "pretrained"
    if takes_one and config.model.path is None:
        raise UserError(NO_MODEL)
