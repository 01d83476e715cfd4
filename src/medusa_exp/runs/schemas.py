"""What the JSON files of a run directory and of the cache hold, to check them when they are read.

A row a file name in `SCHEMAS`; `runs.files.read_json` and `read_jsonl` look it up by the name of
the file. A key that a schema does not name is let through, and one that old versions did not write
has a default: what is checked is that everything that is read is of the type that its readers take
it for.
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

MOST_NODES = 1 << 12
"""Of a tree in a file."""
MOST_RANKS = 1 << 24
Rank = Annotated[int, Meta(ge=-1, lt=MOST_RANKS)]
SEAL = "sha256.json"
"""In a directory: what its files were when they were written (`runs/seals.py`)."""
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Seconds = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Lines(msgspec.Struct):
    bytes: Count
    sha256: Digest


class _Stage(msgspec.Struct):
    status: str = ""
    began: str = ""
    process: str = ""
    command: list[str] = []
    seed: int = 0
    git: dict[str, Any] = {}
    versions: dict[str, str] = {}
    seconds: Seconds = 0.0
    peak_memory_bytes: Count = 0
    metrics: list[str] = []
    error: str = ""
    resumed_from_step: Count = 0
    features: dict[str, str] = {}
    files: dict[str, Digest] = {}
    history: _Lines | None = None


class _Run(msgspec.Struct):
    name: str = ""
    created: str = ""
    stages: dict[str, _Stage] = {}
    data: dict[str, str] = {}
    cache_keys: dict[str, str] = {}
    command: list[str] = []
    seed: int = 0
    git: dict[str, Any] = {}
    versions: dict[str, str] = {}
    device: str = ""
    peak_memory_bytes: Count = 0
    wandb: dict[str, Any] = {}
    metrics_sha256: list[Digest] = []
    check: str = ""


class _Job(msgspec.Struct):
    number: Count
    overrides: list[str]
    objective: str
    status: str
    value: Finite | None
    attempts: Count = 0
    error: str | None = None


class _Failure(msgspec.Struct):
    error: str


class _Record(msgspec.Struct):
    category: str
    method: str
    batch_size: Annotated[int, Meta(ge=1, lt=1 << 31)]
    accept_lengths: list[Count] | None
    prompt_id: str | None = None
    new_tokens: Count | None = None
    steps: Count | None = None
    seconds: Seconds | None = None
    prompt_seconds: Seconds | None = None
    baseline_seconds: Seconds | None = None
    baseline_new_tokens: Count | None = None
    identical: bool | None = None


class _Sample(msgspec.Struct):
    prompt_id: str
    category: str
    prompt: str
    steps: list[list[str]]


class _HistoryLine(msgspec.Struct):
    stage: str
    step: int | None


class Outcomes(msgspec.Struct):
    """What became of a source's raw chats."""

    records: Count = 0
    dropped: dict[str, Count] = {}
    kept: Count = msgspec.field(name="kept records", default=0)
    documents: Count = 0
    tokens: Count = 0
    trained: Count = msgspec.field(name="trained tokens", default=0)


class DataSummary(msgspec.Struct):
    """What became of every raw chat: in the cache, and as data.json."""

    key: str = ""
    sources: dict[str, Outcomes] = {}
    examples: dict[str, str] = {}
    notes: list[str] = []
    format: int = 0


class RegeneratedSummary(msgspec.Struct):
    """What became of the documents that were to be answered."""

    documents: Count
    answers: Count
    tokens: Count
    unfinished: list[str]
    no_room: list[str]


class FeaturesSummary(msgspec.Struct):
    """What hidden states in the cache are of."""

    key: str
    backbone: str
    sha256: dict[str, Digest]
    stores_all: bool = False


class TreeShape(msgspec.Struct):
    """A tree as tree.json has it: parents stand before their children, and the root has none."""

    parents: Annotated[list[int], Meta(min_length=1, max_length=MOST_NODES)]
    ranks: Annotated[list[Rank], Meta(min_length=1, max_length=MOST_NODES)]
    num_picked: Annotated[int, Meta(ge=1)] | None = None
    num_lookup: Annotated[int, Meta(ge=0, le=MOST_NODES)] = 0

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.ranks):
            raise ValueError("as many parents as ranks are needed")
        if any(not -1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError("parents must stand before their children")
        if -1 in self.parents[1:] or (self.parents[0], self.ranks[0]) != (-1, -1):
            raise ValueError("the first node is the root, and it alone: its parent and rank are -1")


class _Point(msgspec.Struct):
    num_nodes: Count
    tokens_per_step: Finite
    step_seconds: Positive
    tokens_per_second: Finite
    tree: TreeShape | None = None
    is_rehearsed: bool = False


class _Curve(msgspec.Struct):
    batch_size: Count
    num_nodes: Count
    predicted_tokens_per_step: Finite
    predicted_speedup: Finite
    plain_step_seconds: Positive | None = None
    curve: list[_Point] = []
    tree: TreeShape | None = None


class _Calibration(msgspec.Struct):
    """What a page shows of it; what decoding takes from it is `tree.calibration.Calibration`."""

    num_positions: Count
    rank_share: list[list[Finite]]
    curve: Annotated[list[_Point], Meta(min_length=1)]
    num_nodes: Count
    node_probability: list[Finite]
    plain_step_seconds: Positive
    batch_sizes: Annotated[list[_Curve], Meta(min_length=1)]
    break_even_batch_size: Count | None
    heads_sha256: str = ""
    tree: TreeShape | None = None
    with_lookup: list[_Point] = []
    predicted_tokens_per_step: Finite | None = None


class _Part(msgspec.Struct):
    name: str
    times: Finite
    share: Finite


class _Waterfall(msgspec.Struct):
    batch_size: Count
    ideal: Positive
    measured: Finite
    parts: list[_Part]


class _Why(msgspec.Struct):
    """Why the speed-up is no larger, and from which batch size on plain decoding is faster."""

    waterfalls: list[_Waterfall]
    advice: list[str]
    when: str
    validation: Finite | None = None
    schedule: list[list[Count]] | None = None


class _Served(msgspec.Struct):
    url: str = ""
    model: str = ""
    fingerprint: str | None = None


class _TokenizerSource(msgspec.Struct):
    versions: dict[str, str] = {}
    backend_sha256: str = ""
    chat_template_sha256: str | None = None


class _Sealed(msgspec.Struct):
    bytes: Count
    sha256: Digest
    ends: Digest


class _Seal(msgspec.Struct):
    files: dict[str, _Sealed]


def seal_beside(name: str) -> str:
    """Return the name of the seal of a lone file, which lies beside it."""
    return f".{name}.{SEAL}"


def is_seal(name: str) -> bool:
    """Is this the name of a seal, of a directory or of a lone file?"""
    return name == SEAL or name.endswith(f".{SEAL}")


@dataclass(frozen=True)
class Schema:
    """What a file has to hold, and what to do where it does not."""

    kind: Any
    remedy: str
    has_nan: bool = False
    """May numbers be NaN? Older versions wrote such a line."""
    has_check: bool = False
    """Does it hold a checksum of itself, as the key `check`? `runs.files` writes and reads it."""


def _again(stage: str) -> str:
    return f"restore it, or delete it and run stage {stage} again"


SCHEMAS = {
    "run.json": Schema(
        _Run, "restore it, or delete it: the next call then begins a new record", has_check=True
    ),
    "metrics.json": Schema(
        dict[str, Finite], "restore it, or delete it and run the stages again whose numbers count"
    ),
    "job.json": Schema(
        _Job, "restore it, or delete it: the sweep then does this job again", has_check=True
    ),
    "failure.json": Schema(_Failure, "delete it: the next call writes its own, if it fails too"),
    "history.jsonl": Schema(
        _HistoryLine, "delete that line, or restore the file: its other lines count", has_nan=True
    ),
    "records.jsonl": Schema(_Record, _again("evaluate")),
    "samples.jsonl": Schema(_Sample, _again("evaluate")),
    "why.json": Schema(_Why, _again("evaluate"), has_check=True),
    "serving.json": Schema(dict[str, _Served | None], _again("evaluate")),
    "data.json": Schema(
        DataSummary, "restore it, or delete it: stages train and inspect write it", has_check=True
    ),
    "data_samples.jsonl": Schema(dict[str, Any], _again("inspect")),
    "calibration.json": Schema(_Calibration, _again("calibrate")),
    "tree.json": Schema(TreeShape, _again("calibrate"), has_check=True),
    "regenerated.json": Schema(
        RegeneratedSummary, "delete it and run stage regenerate again: it finds what it has made"
    ),
    SEAL: Schema(_Seal, "restore it, or delete it: its files are then not checked"),
    "tokenizer_source.json": Schema(
        _TokenizerSource, "restore it, or delete it: nothing is then known of the heads' tokenizer"
    ),
}
"""Of each file of a run directory, by its name."""
