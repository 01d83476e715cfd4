"""Precompute the feature cache: the frozen backbone's hidden states of all documents, made once.

Whatever the heads, these stay the same: a second training on them runs no layer of the backbone,
nor does it load one. Where the states of each document begin is known beforehand, so that several
processes (workers of a Ray cluster) may write into one file, each into its own documents' places.
Workers share the disk, and are given tokens. How the files are read: `data/feature_cache.py`.

P positions, B batch, T time, D hidden, L stored positions of a document.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from medusa_exp.config import DatasetConfig, TokenizerConfig
from medusa_exp.data.batching import epoch_planner
from medusa_exp.data.datamodule import collate
from medusa_exp.data.examples import Example, Examples
from medusa_exp.data.feature_cache import FORMAT, Features, checksum, stored_positions
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loss import teacher_argmax
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import content_key, read_json, settings_in_key, sha256_file, write_json
from medusa_exp.runs.progress import ProgressBar
from medusa_exp.train.launch import map_on_ray
from medusa_exp.train.trainer import AUTOCAST

log = logging.getLogger(__name__)

_TOKENIZER_IN_KEY = (
    *("kind", "path", "vocab_size", "tokenizer_class", "model_max_length", "padding_side"),
    *("truncation_side", "add_bos_token", "add_eos_token", "chat_template", "special_tokens"),
    *("additional_special_tokens", "resize_embedding"),
)


@dataclass(frozen=True)
class FeatureSettings:
    """How hidden states are computed and stored."""

    precision: str
    """As `pick_precision` has it."""
    attn_implementation: str | None = None
    """As the backbone was loaded with."""
    stores_all: bool = False
    """Store all positions, for heads with prefix attention, and not only those with a label."""
    batch_tokens: int = 4096
    """Tokens that run through the backbone at once, padding included."""
    num_workers: int = 0
    """Processes of a Ray cluster that compute them; 0 is this process."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the states on disk; int16 holds the bits of bfloat16, which numpy lacks."""
        return np.dtype(np.float32 if self.precision == "32-true" else np.int16)


def open_features(
    cache_dir: str,
    split: str,
    examples: Examples,
    dataset: DatasetConfig,
    data_key: str,
    settings: FeatureSettings,
    ends: Backbone,
    load: Callable[[], Backbone],
) -> Features:
    """Return the hidden states of a split's documents, which are made where there are none.

    Args:
        cache_dir: where they are kept.
        split: train or val.
        examples: its documents.
        dataset: how it is split.
        data_key: names all documents.
        settings: how they are computed.
        ends: the backbone, perhaps without its layers.
        load: returns it with them; each worker calls it too, to which Ray sends it.

    Raises:
        UserError: the disk is too small, or what lies there is damaged or of another model.
    """
    key = features_key(split, dataset, data_key, settings, ends)
    with entry(cache_dir, "features", key) as (path, partial_path):
        if partial_path is not None:
            _write(partial_path, key, examples, settings, ends, load)
    found = Features(path)
    if found.summary["key"] != key:
        raise UserError(
            f"{path} holds hidden states of {found.summary['backbone']}, or of other data, and not "
            f"those of {ends.name}: delete that directory, and they are made."
        )
    log.info("hidden states of %s: %s", split, path)
    return found


def features_key(
    split: str, dataset: DatasetConfig, data_key: str, settings: FeatureSettings, backbone: Backbone
) -> str:
    """Name all that decides the hidden states of a split."""
    return content_key(
        [FORMAT, settings.stores_all],
        split,
        data_key,
        [dataset.val_fraction, dataset.test_fraction],
        backbone.weights_fingerprint(),
        [str(backbone.model.dtype), settings.attn_implementation],
        settings.precision,
        [metadata.version(name) for name in ("torch", "transformers")],
    )


def _write(
    path: Path,
    key: str,
    examples: Examples,
    settings: FeatureSettings,
    ends: Backbone,
    load: Callable[[], Backbone],
) -> None:
    """Write all files of an entry, once the disk is found to have room for them."""
    positions = [len(stored_positions(e.is_trained, settings.stores_all)) for e in examples]
    starts = np.concatenate([[0], np.cumsum(positions)]).astype(np.int64)
    size = int(starts[-1]) * (ends.hidden_size * settings.dtype.itemsize + 4)
    _check_room(path.parent, size)
    log.info("writing %s of hidden states", decimal(size))
    path.mkdir()
    _create(path / "hidden.npy", settings.dtype, (int(starts[-1]), ends.hidden_size))
    _create(path / "own.npy", np.dtype(np.int32), (int(starts[-1]),))
    np.save(path / "starts.npy", starts)
    np.save(path / "checks.npy", _fill(path, examples, settings, ends, load))
    summary: dict[str, Any] = {
        "key": key,
        "stores_all": settings.stores_all,
        "backbone": str(ends.model.config.name_or_path),
        "sha256": {name: sha256_file(path / name) for name in ("starts.npy", "checks.npy")},
    }
    write_json(path / "summary.json", summary)


def _check_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > 0.95 * free:
        raise UserError(
            f"train.features=cache: hidden states take {decimal(size)}, and {directory} has "
            f"{decimal(free)} left: set train.features=online, cache_dir to a larger disk, or "
            "dataset.sample_fraction to less."
        )


def _fill(
    directory: Path,
    examples: Examples,
    settings: FeatureSettings,
    ends: Backbone,
    load: Callable[[], Backbone],
) -> np.ndarray:
    """Run the documents through the backbone, those of similar length together.

    Returns:
        The check of each document's bytes.
    """
    planner = epoch_planner(
        "padded",
        examples.lengths,
        batch_tokens=settings.batch_tokens,
        row_tokens=0,
        seed=0,
        boundary=ends.rotary_boundary,
    )
    # Documents by their numbers in the split; one in each row of the plan.
    batches = ({number: examples[number] for [number] in batch} for batch in planner(0))
    # A model may have no position for padding beyond the longest document.
    make = partial(FeatureWriter, directory, settings, int(examples.lengths.max()), load)
    written: Iterator[list[tuple[int, int]]]
    writer = None if settings.num_workers else make()
    if writer is None:
        plain = ([_plain(number, one) for number, one in batch.items()] for batch in batches)
        work, use_gpu = partial(_writes_plain, make), ends.device.type == "cuda"
        written = map_on_ray(work, plain, num_workers=settings.num_workers, use_gpu=use_gpu)
    else:
        written = map(writer, batches)
    checks = np.zeros(len(examples), np.uint32)
    with ProgressBar("hidden states of documents", len(examples)) as bar:
        for found in written:
            for number, value in found:
                checks[number] = value
            bar.advance(len(found))
    if writer is not None:
        writer.flush()
    return checks


def _plain(number: int, document: Example) -> list[Any]:
    """Return a numbered document as JSON can have it."""
    return [number, document.input_ids.tolist(), document.is_trained.tolist()]


def _writes_plain(make: Callable[[], "FeatureWriter"]) -> Callable[[list[Any]], Any]:
    """Return what writes the states of documents that `_plain` has made."""
    writer = make()

    def write(documents: list[Any]) -> list[tuple[int, int]]:
        return writer(
            {
                number: Example(np.array(ids, np.int32), np.array(is_trained, bool))
                for number, ids, is_trained in documents
            }
        )

    return write


def _create(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Make a file of zeros whose place on the disk is taken from now on.

    A disk that is full only when a memory map is written to ends the process without a word.
    """
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class FeatureWriter:
    """Writes the states of documents; each process that does has one, with a backbone of its own.

    `directory` has the files already; the `longest` document has so many tokens.
    """

    def __init__(
        self, directory: Path, settings: FeatureSettings, longest: int, load: Callable[[], Backbone]
    ) -> None:
        self.settings, self.longest, self.backbone = settings, longest, load()
        self.starts = np.load(directory / "starts.npy")
        self.hidden_PD = np.load(directory / "hidden.npy", mmap_mode="r+")
        self.teacher_P = np.load(directory / "own.npy", mmap_mode="r+")

    @torch.no_grad()
    def __call__(self, documents: dict[int, Example]) -> list[tuple[int, int]]:
        """Write the states of numbered documents; return number and check of each one's bytes."""
        device, autocast = self.backbone.device.type, AUTOCAST.get(self.settings.precision)
        with torch.autocast(device, autocast) if autocast else nullcontext():
            states = self._states(list(documents.values()))
        found = []
        for number, (states_LD, choices_L) in zip(documents, states, strict=True):
            place = slice(self.starts[number], self.starts[number + 1])
            self.hidden_PD[place] = _as_stored(states_LD, self.hidden_PD.dtype)
            self.teacher_P[place] = choices_L.cpu().numpy()
            found.append((number, checksum(self.hidden_PD[place], self.teacher_P[place])))
        if self.settings.num_workers:  # they may be read on another machine
            self.flush()
        return found

    def flush(self) -> None:
        """Have the disk hold what was written."""
        self.hidden_PD.flush()
        self.teacher_P.flush()

    def _states(self, documents: list[Example]) -> list[tuple[Tensor, Tensor]]:
        """Return hidden states and the backbone's next tokens at stored positions of each."""
        backbone = self.backbone
        rows = [[document] for document in documents]
        collated = collate(rows, self.longest, boundary=backbone.rotary_boundary)
        hidden_BTD = backbone.hidden_states(collated.input_ids_BT.to(backbone.device))
        found = []
        for hidden_TD, document in zip(hidden_BTD, documents, strict=True):
            stored = stored_positions(document.is_trained, self.settings.stores_all)
            states_LD = hidden_TD[torch.from_numpy(stored).to(backbone.device)]
            found.append((states_LD, teacher_argmax(backbone.next_logits, states_LD)))
        return found


def _as_stored(states_LD: Tensor, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype == np.int16:
        return states_LD.bfloat16().view(torch.int16).cpu().numpy()
    return states_LD.float().cpu().numpy()


def fingerprint_note(
    cache_dir: str, files: str | None, tokenizer: TokenizerConfig, quantization: str | None
) -> Path | None:
    """Return where the fingerprints of a backbone are noted, to know it without its layers.

    `files` is the fingerprint of the model's files, None where there are none. A tokenizer may give
    the embedding new rows, and quantization makes other weights of the same files.
    """
    if files is None:
        return None
    key = content_key(files, settings_in_key(tokenizer, _TOKENIZER_IN_KEY), quantization)
    return Path(cache_dir) / "backbones" / f"{key}.json"


def known_fingerprints(
    note: Path | None, attn_implementation: str | None
) -> tuple[str, str] | None:
    """Return the fingerprints that are noted: identity, and that of all weights.

    Those of a backbone that was not checked for trees with this attention are none: it has to be
    loaded with its layers once more.
    """
    if note is None or not note.is_file():
        return None
    try:
        *found, key = read_json(note, kind=list[str | None])
    except (UserError, TypeError):  # damaged since: the backbone is loaded, and noted again
        return None
    if len(found) == 2:  # without a key, as older versions wrote
        found, key = [*found, key], content_key([*found, key])
    if len(found) != 3 or key != content_key(found) or found[2] != attn_implementation:
        return None
    return found[0], found[1]


def note_fingerprints(
    note: Path | None, backbone: Backbone, attn_implementation: str | None
) -> None:
    """Note which backbone this is, and with which attention it passed `check_tree_attention`."""
    if note is not None:
        found = [backbone.identity(), backbone.weights_fingerprint(), attn_implementation]
        write_json(note, [*found, content_key(found)])
