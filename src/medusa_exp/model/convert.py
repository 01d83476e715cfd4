"""Write old weights, of models (pytorch_model.bin) and of heads (.pt), as safetensors.

    python -m medusa_exp.model.convert MODEL OUT [--revision NAME]
    python -m medusa_exp.model.convert FILE.pt [OUT]

Such a file is a pickle, and a pickle may name code to run. Here torch reads it with
`weights_only=True`, which takes tensors and plain containers and refuses all else. Of a MODEL (a
directory, or a name on the hub) they go into an ordinary model directory at OUT, beside its config
and tokenizer; of a file alone, into one beside it. The log has the sha256 of every file that was
read and of every one written.
"""

import argparse
import logging
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from medusa_exp.errors import UserError, as_program
from medusa_exp.model.checkpoint import save_tensors
from medusa_exp.runs.files import publish, read_json, sha256_file

log = logging.getLogger(__name__)

_PATTERN = "pytorch_model*.bin"
_INDEX = "pytorch_model.bin.index.json"
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*")


def convert(model: str, out: str | Path, revision: str | None = None) -> Path:
    """Write a model directory whose weights are safetensors; return it.

    Args:
        model: a directory with pytorch_model.bin, whole or in shards, or a name on the hub.
        out: the new directory; must not exist.
        revision: branch, tag or commit on the hub.

    Raises:
        UserError: there are no such files, one holds more than tensors or is damaged, or `out`
            exists.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists: name a directory that is yet to be made.")
    source = _source(model, revision)
    tensors: dict[str, Tensor] = {}
    for path in _files(source):
        tensors |= read_pickle(path)
        log.info("read %s, sha256 %s", path, sha256_file(path))
    with publish(out) as partial:
        partial.mkdir()
        save_torch_state_dict(tensors, partial)
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if file.name != _INDEX and file.is_file():
                    shutil.copy(file, partial)
    for path in sorted(out.glob("*.safetensors")):
        log.info("wrote %s, sha256 %s", path, sha256_file(path))
    return out


def convert_file(source: Path, target: Path) -> None:
    """Write the tensors of one pickle as safetensors.

    Tensors that share memory, as blocks of FasterDecoding's trainer do, are written for each name.

    Raises:
        UserError: it holds anything but tensors under names, or is damaged.
    """
    found = read_pickle(source)
    log.info("read %s, sha256 %s", source, sha256_file(source))
    with publish(target) as partial:
        save_tensors(
            {str(name): tensor.clone().contiguous() for name, tensor in found.items()},
            partial,
            metadata={"format": "pt"},
        )
    log.info("wrote %s, sha256 %s", target, sha256_file(target))


def _source(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.exists():
        return path if path.is_dir() else path.parent
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=[_PATTERN, _INDEX, *_COPIED])
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{model} is no directory, and could not be had from the hub: {error}"
        ) from error


def _files(source: Path) -> list[Path]:
    """Return the files of weights, those that the index names where there is one."""
    index = read_json(source / _INDEX)
    if index is None:
        found = [source / "pytorch_model.bin"]
    elif isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
        found = [source / Path(name).name for name in sorted(set(index["weight_map"].values()))]
    else:
        raise UserError(f"{source / _INDEX} has no weight_map: download it again.")
    for path in found:
        if not path.is_file():
            raise UserError(f"{path} is missing: there is nothing to convert without it.")
    return found


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle; raise a UserError where it holds anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # of a pickle that is damaged, or that names code
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{path} is refused: it is damaged, or holds more than tensors, and could run code "
            f"where it is opened ({said})."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{path} is refused: it is no table of tensors by name.")
    return found


def _is_zip(path: Path) -> bool:
    """Tell torch's format of today, which can be mapped into memory, from that before 1.6."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m medusa_exp.model.convert", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "source", help="directory with pytorch_model.bin, name on the hub, or a file of heads"
    )
    parser.add_argument("out", type=Path, nargs="?", help="directory to make; or file to write")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    asked = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    file = Path(asked.source).expanduser()
    with as_program():
        if file.is_file():
            convert_file(file, asked.out or file.with_suffix(".safetensors"))
        elif asked.out is None:
            parser.error("name a directory to make, OUT")
        else:
            out = convert(asked.source, asked.out, asked.revision)
            log.info("done: set model.path=%s", out)


if __name__ == "__main__":
    main()
