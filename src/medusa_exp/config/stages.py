"""What a run does: keys inspect and regenerate, and the groups from head to logger."""

from dataclasses import dataclass, field

from medusa_exp.config.checks import at_least, one_of, within


@dataclass
class HeadConfig:
    """The Medusa heads."""

    kind: str = "medusa"
    num_heads: int = 4
    """K: head k predicts the token k places after the backbone's next one."""
    num_layers: int = 1
    """L: residual blocks before each head's vocabulary projection."""

    def __post_init__(self) -> None:
        one_of("head.kind", self.kind, ("medusa",))
        within("head.num_heads", self.num_heads, 1, 16)
        within("head.num_layers", self.num_layers, 0, 16)


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
    max_new_tokens: int = 256
    """Of an answer. One that is not finished by then is its document's last."""
    use_heads: bool = False
    """Decode with the heads and the tree that the run directory has already: the same answers,
    sooner where batches are small."""

    def __post_init__(self) -> None:
        for key in ("num_documents", "num_val_documents", "batch_size", "max_new_tokens"):
            if (value := getattr(self, key)) is not None:
                at_least(f"regenerate.{key}", value, 1)


@dataclass
class TrainConfig:
    """Training of the heads on the frozen backbone."""

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
    guesses against) or data (the token that stands there)."""
    batching: str = "padded"
    """padded (a document a row, rows of similar length) or packed (several documents a row, which
    do not see each other: almost no padding, but attention over longer rows)."""
    batch_tokens: int = 4096
    """Tokens of a micro-batch, padding included."""
    accumulate: int = 1
    """Micro-batches to an optimiser step."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup_fraction: float = 0.05
    """Share of the steps with a rising learning rate; a cosine to zero follows."""
    gradient_clip: float = 1.0
    decay: float = 0.8
    """Head k's loss counts decay**k (Medusa, section 2.2.1)."""
    loss_chunk_rows: int = 256
    """Rows whose logits exist at one time."""
    val_every: int = 200
    """Optimiser steps between validations; one more comes at the end."""
    val_batches: int = 16
    """Micro-batches of a validation."""
    checkpoint_every: int = 200
    """Optimiser steps between checkpoints."""
    resume: str = "auto"
    """auto (go on from the run directory's newest checkpoint) or never (start again)."""

    def __post_init__(self) -> None:
        if self.max_steps is not None:
            at_least("train.max_steps", self.max_steps, 1)
        for key in (
            "batch_tokens",
            "accumulate",
            "min_steps",
            "loss_chunk_rows",
            "val_every",
            "val_batches",
        ):
            at_least(f"train.{key}", getattr(self, key), 1)
        at_least("train.checkpoint_every", self.checkpoint_every, 1)
        one_of("train.text", self.text, ("data", "own"))
        one_of("train.labels", self.labels, ("own", "data"))
        one_of("train.batching", self.batching, ("padded", "packed"))
        at_least("train.learning_rate", self.learning_rate, 0.0)
        within("train.decay", self.decay, 0.0, 1.0)
        within("train.warmup_fraction", self.warmup_fraction, 0.0, 1.0)
        one_of("train.resume", self.resume, ("auto", "never"))


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
    """Of kind=dynamic: nodes of a step; by default, as many as the calibrated tree has."""
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
    stop_ids: list[int] = field(default_factory=list)
    """Token ids that end an answer, besides the model's own."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end an answer, with the token that completes them."""

    def __post_init__(self) -> None:
        one_of("decode.rule", self.rule, ("greedy", "sampling", "typical"))
        one_of("decode.verifier", self.verifier, ("auto", "torch", "cupy"))
        if self.rule != "greedy":
            at_least("decode.temperature", self.temperature, 1e-3)
        if self.top_k is not None:
            at_least("decode.top_k", self.top_k, 1)
        if self.top_p is not None:
            within("decode.top_p", self.top_p, 1e-3, 1.0)
        at_least("decode.max_new_tokens", self.max_new_tokens, 1)


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


@dataclass
class LoggerConfig:
    """Tracking beside the run directory's own files, which are always written."""

    kind: str = "wandb"
    """wandb, csv (history.csv and metrics.csv in the run directory) or none."""
    mode: str = "offline"
    """Of W&B: offline, or online for those logged in."""
    project: str = "medusa_exp"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None

    def __post_init__(self) -> None:
        one_of("logger.kind", self.kind, ("wandb", "csv", "none"))
        one_of("logger.mode", self.mode, ("offline", "online"))
