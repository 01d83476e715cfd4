"""What a run does: keys inspect and regenerate, and the groups from head to logger."""

from dataclasses import dataclass, field

from medusa_exp.config.checks import at_least, one_of, within
from medusa_exp.errors import UserError


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
