"""Folders that the library datasets has saved: which of their files hold rows, and which do not."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from medusa_exp.data.faults import DataError

log = logging.getLogger(__name__)

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Has `save_to_disk` written a folder?"""
    return (folder / _SPLITS).is_file() or all((folder / n).is_file() for n in (_STATE, _INFO))


def is_cache(name: str) -> bool:
    """Tell a file of what `map` or `filter` gave in an earlier program, by its name."""
    name = name.rpartition("/")[2]
    return name.startswith("cache-") and name.endswith(".arrow")


def files_beside_rows(files: Sequence[Path]) -> set[Path]:
    """Return those of the files below a folder that are the library's own notes, or outdated.

    Raises:
        DataError: a file of rows is missing.
    """
    there = set(files)
    aside = {file for file in files if is_cache(file.name)}
    splits: dict[Path, list[str]] = {}
    for state in files:
        if state.name != _STATE or (info := state.with_name(_INFO)) not in there:
            continue
        listed = _listed(state)
        if missing := [name for name in listed if state.with_name(name) not in there]:
            raise DataError(
                f"{state} lists {missing[0]}, which is not there: copy the whole folder again."
            )
        aside |= {state, info}
        if listed:
            of_folder = {file for file in files if file.parent == state.parent}
            kept = {state.with_name(name) for name in listed}
            aside |= {file for file in of_folder - kept if file.suffix == ".arrow"}
        if (of_splits := state.parent.with_name(_SPLITS)) in there:
            aside.add(of_splits)
            splits.setdefault(of_splits.parent, []).append(state.parent.name)
    for folder, names in splits.items():
        if len(names) > 1:
            log.warning(
                "data: %s: chats are read from its splits %s; of one alone, if its folder is named",
                folder,
                ", ".join(names),
            )
    return aside


def _listed(state: Path) -> list[str]:
    """Return the names of the files that a data set was saved in."""
    try:
        found: Any = msgspec.json.decode(state.read_bytes())
        return [str(file["filename"]) for file in found["_data_files"]]
    # It is not the library's, or of no use.
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        return []
