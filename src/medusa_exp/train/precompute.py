"""Documents and backbone in; its hidden states of them in the cache out, made once.

Whatever the heads, the frozen backbone's hidden states stay the same: a second training on them
runs no layer of it, nor does it load one.

P positions, B batch, T time, D hidden.

Writing the backbone's hidden states: by this process, or by workers of a Ray cluster.

Where the states of each document begin is known beforehand, so that many may write into one file:
each into its own documents' places. Workers share the disk, and are given tokens.

P positions, B batch, T time, D hidden, L stored positions of a document.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from medusa_exp.config import Config, from_dict, to_dict
from medusa_exp.data.batching import Row, epoch_planner
from medusa_exp.data.datamodule import collate
from medusa_exp.data.examples import Example, Examples
from medusa_exp.data.feature_cache import FORMAT, Features, check, stored_positions
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loading import load_backbone, pick_device
from medusa_exp.model.loss import teacher_argmax
from medusa_exp.model.source import ModelSpec
from medusa_exp.runs.files import content_key, publish, settings_in_key, sha256_file, write_json
from medusa_exp.runs.progress import progress_bar
from medusa_exp.train.launch import Work, map_on_ray
from medusa_exp.train.trainer import AUTOCAST, pick_precision


def write_features(
    config: Config,
    spec: ModelSpec,
    directory: Path,
    examples: Examples,
    starts: np.ndarray,
    dtype: np.dtype[Any],
    hidden_size: int,
    backbone: Backbone | None,
) -> None:
    """Run the documents through the backbone, those of similar length together.

    Args:
        config: of the training.
        spec: of the backbone, for workers that load their own.
        directory: where the files are written.
        examples: the documents, N of them.
        starts: [N + 1], where the states of each begin.
        dtype: of the states on disk; int16 stands for bfloat16.
        hidden_size: D.
        backbone: None where `train.feature_workers` load their own.
    """
    shape = (int(starts[-1]), hidden_size)
    _create(directory / "hidden.npy", dtype, shape)
    _create(directory / "own.npy", np.dtype(np.int32), shape[:1])
    np.save(directory / "starts.npy", starts)
    checks = np.zeros(len(examples), np.uint32)
    plan = epoch_planner(
        "padded", examples.lengths, batch_tokens=config.train.batch_tokens, row_tokens=0, seed=0
    )
    longest = int(examples.lengths.max())
    writer = FeatureWriter(config, directory, longest, backbone) if backbone else None
    if writer is None:
        written = _written_on_ray(config, spec, directory, examples, plan(0), longest)
    else:
        written = (writer(numbers(b), [examples[n] for n in numbers(b)]) for b in plan(0))
    with progress_bar() as bar:
        task = bar.add_task("hidden states of documents", total=len(examples))
        for found in written:
            for number, value in found.items():
                checks[number] = value
            bar.advance(task, len(found))
    if writer is not None:
        writer.flush()
    np.save(directory / "checks.npy", checks)


def _create(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Make a file of zeros whose place on the disk is taken from now on.

    A disk that is full only when a memory map is written to ends the process without a word.
    """
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def numbers(batch: list[Row]) -> list[int]:
    """Return the documents of a batch that has one in each row."""
    return [number for [number] in batch]


class FeatureWriter:
    """Writes the states of documents; each process that does has one, with a backbone of its own.

    Args:
        config: of the training.
        directory: of the files, which are there.
        longest: tokens of the longest document: a model may have no position for padding beyond.
        backbone: with its layers.
    """

    def __init__(self, config: Config, directory: Path, longest: int, backbone: Backbone) -> None:
        self.longest, self.backbone = longest, backbone
        self.stores_all = config.head.prefix_attention
        self.autocast = AUTOCAST.get(pick_precision(config, backbone.device))
        self.starts = np.load(directory / "starts.npy")
        self.hidden_PD = np.load(directory / "hidden.npy", mmap_mode="r+")
        self.teacher_P = np.load(directory / "own.npy", mmap_mode="r+")

    @torch.no_grad()
    def __call__(self, rows: list[int], documents: list[Example]) -> dict[int, int]:
        """Write the documents of these numbers; return the check of each one's bytes."""
        device = self.backbone.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            states = self._states(documents)
        found = {}
        for number, (states_LD, choices_L) in zip(rows, states, strict=True):
            place = slice(self.starts[number], self.starts[number + 1])
            self.hidden_PD[place] = _as_stored(states_LD, self.hidden_PD.dtype)
            self.teacher_P[place] = choices_L.cpu().numpy()
            found[number] = check(self.hidden_PD[place], self.teacher_P[place])
        return found

    def _states(self, documents: list[Example]) -> list[tuple[Tensor, Tensor]]:
        """Return hidden states and the backbone's next tokens at stored positions of each."""
        backbone = self.backbone
        collated = collate([[document] for document in documents], self.longest)
        hidden_BTD = backbone.hidden_states(collated.input_ids_BT.to(backbone.device))
        found = []
        for hidden_TD, document in zip(hidden_BTD, documents, strict=True):
            stored = torch.from_numpy(stored_positions(document.is_trained, self.stores_all))
            states_LD = hidden_TD[stored.to(backbone.device)]
            found.append((states_LD, teacher_argmax(backbone.next_logits, states_LD)))
        return found

    def flush(self) -> None:
        """Have the disk hold what was written."""
        self.hidden_PD.flush()
        self.teacher_P.flush()


def _written_on_ray(
    config: Config,
    spec: ModelSpec,
    directory: Path,
    examples: Examples,
    plan: list[list[Row]],
    longest: int,
) -> Iterator[dict[int, int]]:
    """Yield what workers of a Ray cluster have written."""
    items = []
    for batch in plan:
        documents = [examples[number] for number in numbers(batch)]
        texts = [[d.input_ids.tolist(), d.is_trained.tolist()] for d in documents]
        items.append(json.dumps([numbers(batch), texts]))
    arguments = {
        "config": to_dict(config),
        "spec": spec,
        "directory": directory.absolute(),
        "longest": longest,
    }
    for line in map_on_ray(
        _writer_of_a_worker,
        arguments,
        items,
        num_workers=config.train.feature_workers,
        use_gpu=pick_device(config.device).type == "cuda",
    ):
        yield {int(number): value for number, value in json.loads(line).items()}


def _writer_of_a_worker(
    config: dict[str, Any], spec: ModelSpec, directory: Path, longest: int
) -> Work:
    writer = FeatureWriter(from_dict(config), directory, longest, load_backbone(spec))

    def work(item: str) -> str:
        rows, texts = json.loads(item)
        documents = [Example(np.array(ids), np.array(trained)) for ids, trained in texts]
        found = writer(rows, documents)
        writer.flush()  # others may read it from another machine
        return json.dumps(found)

    return work


def _as_stored(states_LD: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype == np.int16:
        return states_LD.bfloat16().view(torch.int16).cpu().numpy()
    return states_LD.float().cpu().numpy()


log = logging.getLogger(__name__)

_OF_TOKENIZERS = (
    *("kind", "path", "vocab_size", "tokenizer_class", "model_max_length", "padding_side"),
    *("truncation_side", "add_bos_token", "add_eos_token", "chat_template", "special_tokens"),
    *("additional_special_tokens", "resize_embedding"),
)


def open_features(
    config: Config,
    spec: ModelSpec,
    documents: dict[str, Examples],
    data_key: str,
    ends: Backbone,
    body: Callable[[], Backbone],
) -> dict[str, Features]:
    """Return the hidden states of some lists of documents, which are made where there are none.

    Args:
        config: what decides them besides the documents.
        spec: of the backbone.
        documents: of each split.
        data_key: names all documents.
        ends: the backbone, perhaps without its layers.
        body: loads it with them.

    Raises:
        UserError: the disk is too small, or what lies there is damaged or of another model.
    """
    found = {}
    for split, examples in documents.items():
        key = features_key(config, split, data_key, ends)
        path = Path(config.cache_dir) / "features" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{key}.lock")):
            if not path.is_dir():
                _publish(config, spec, path, key, examples, ends, body)
        found[split] = Features(path)
        if (theirs := found[split].summary)["key"] != key:
            raise UserError(
                f"{path} holds hidden states of {theirs['backbone']}, or of other data, and not "
                f"those of {ends.name}: delete that directory, and they are made."
            )
        log.info("hidden states of %s: %s", split, path)
    return found


def features_key(config: Config, split: str, data_key: str, backbone: Backbone) -> str:
    """Name all that decides the hidden states."""
    dataset = config.dataset
    return content_key(
        [FORMAT, config.head.prefix_attention],  # for which all positions are kept
        split,
        data_key,
        [dataset.val_fraction, dataset.test_fraction],
        backbone.weights_fingerprint(),
        [str(backbone.model.dtype), config.model.attn_implementation],
        pick_precision(config, backbone.device),
        [metadata.version(name) for name in ("torch", "transformers")],
    )


def _publish(
    config: Config,
    spec: ModelSpec,
    path: Path,
    key: str,
    examples: Examples,
    ends: Backbone,
    body: Callable[[], Backbone],
) -> None:
    for unfinished in path.parent.glob(f".{key}.partial-*"):  # left by a killed process
        shutil.rmtree(unfinished)
    precision = pick_precision(config, ends.device)
    dtype = np.dtype(np.float32 if precision == "32-true" else np.int16)  # numpy has no bfloat16
    starts = _starts(examples, config.head.prefix_attention)
    size = int(starts[-1]) * (ends.hidden_size * dtype.itemsize + 4)
    _check_room(path.parent, size)
    log.info("writing %.2f GB of hidden states", size / 1e9)
    backbone = None if config.train.feature_workers else body()
    with publish(path) as partial:
        partial.mkdir()
        write_features(config, spec, partial, examples, starts, dtype, ends.hidden_size, backbone)
        names = ("starts.npy", "checks.npy")
        summary: dict[str, Any] = {
            "key": key,
            "stores_all": config.head.prefix_attention,
            "backbone": str(ends.model.config.name_or_path),
            "sha256": {name: sha256_file(partial / name) for name in names},
        }
        write_json(partial / "summary.json", summary)


def _starts(examples: Examples, stores_all: bool) -> np.ndarray:
    counts = [len(stored_positions(example.is_trained, stores_all)) for example in examples]
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _check_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > 0.95 * free:
        raise UserError(
            f"train.features=cache: hidden states take {size / 1e9:.2f} GB, and {directory} has "
            f"{free / 1e9:.2f} GB left: set train.features=online, cache_dir to a larger disk, or "
            "dataset.sample_fraction to less."
        )


def known_fingerprints(config: Config, files: str | None) -> tuple[str, str] | None:
    """Return the fingerprints of the backbone in these files, if they have been noted.

    Those of a backbone that was not checked for trees as it would be run now are none: it has to be
    loaded with its layers once more.
    """
    path = _note(config, files)
    if path is None or not path.is_file():
        return None
    try:
        identity, weights_fingerprint, *checked = json.loads(path.read_text())
    except ValueError:  # damaged since: the backbone is loaded, and noted again
        return None
    is_checked = checked == [config.model.attn_implementation]
    return (identity, weights_fingerprint) if is_checked else None


def note_fingerprints(config: Config, files: str | None, backbone: Backbone) -> None:
    """Note which backbone these files hold, to know it again without loading its layers.

    It has passed `check_tree_attention`, with the attention that is noted too.
    """
    path = _note(config, files)
    if path is not None:
        found = [backbone.identity(), backbone.weights_fingerprint()]
        write_json(path, [*found, config.model.attn_implementation])


def _note(config: Config, files: str | None) -> Path | None:
    if files is None:
        return None
    # What makes other weights of the same files stands in the name too.
    tokenizer = settings_in_key(config.tokenizer, _OF_TOKENIZERS)
    key = content_key(files, tokenizer, config.model.quantization)
    return Path(config.cache_dir) / "backbones" / f"{key}.json"
