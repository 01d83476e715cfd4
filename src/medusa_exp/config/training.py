"""How heads are made: groups head and train."""

from dataclasses import dataclass, field

from medusa_exp.config.checks import at_least, one_of, within
from medusa_exp.errors import UserError

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
