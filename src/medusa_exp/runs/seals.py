"""Seals: the sha256 of files, written beside them, by which damage is found before it does harm.

`sha256.json` in a directory names its files; that of a lone file is a hidden sibling of it. What
has no seal, as older versions wrote, is taken as it is, and what systems put into folders
(`.DS_Store`) is neither sealed nor looked at.

Whenever something is opened: of every file, its length and its two ends, where formats say what is
in between; and of the smallest ones, as many as are a GiB together, every byte. (sha256 takes about
a second for that.) Where `cache.verify=true` asks for it, every byte of the others too: of those
in the cache, and of the run's heads and backbone.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

from medusa_exp.errors import UserError
from medusa_exp.runs.files import is_partial, read_json, remove, sha256_file, sync, write_json
from medusa_exp.runs.schemas import SEAL, seal_beside

log = logging.getLogger(__name__)

_READ_WHOLE, _END = 1 << 30, 1 << 20
_OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")
_PREFIXES_OF_SYSTEMS = ("._", ".nfs")
"""AppleDouble files, and what NFS keeps of a file that was deleted while it was open."""


def seal(place: Path, path: Path | None = None) -> None:
    """Write the seal of a directory, or of a file that lies at `place` and is to be at `path`."""
    if place.is_dir():
        # Without what another process, of the same call, is about to put there.
        there = [file for file in sorted(place.rglob("*")) if not is_partial(file)]
        files = {str(file.relative_to(place)): file for file in there}
        target = place / SEAL
    else:
        path = path or place
        files, target = {path.name: place}, path.with_name(seal_beside(path.name))
    facts = {
        name: _facts(file)
        for name, file in files.items()
        if file.is_file() and name != SEAL and not is_of_system(file)
    }
    write_json(target, {"files": facts})


def is_of_system(path: Path) -> bool:
    """Is this a file that no program of ours wrote or reads, but a system, for its own ends?"""
    return path.name in _OF_SYSTEMS or path.name.startswith(_PREFIXES_OF_SYSTEMS)


def damage(path: Path, *, is_thorough: bool = False) -> str | None:
    """Return in which of its files a directory, or a file, is not what was sealed; None for none.

    Args:
        path: of the directory or file.
        is_thorough: read every byte, however many there are.
    """
    folder = path if path.is_dir() else path.parent
    target = folder / (SEAL if path.is_dir() else seal_beside(path.name))
    try:
        sealed, left = read_json(target, {"files": {}})["files"], _READ_WHOLE
        for name, facts in sorted(sealed.items(), key=lambda item: int(item[1]["bytes"])):
            file, left = folder / name, left - facts["bytes"]
            if is_of_system(file):  # older versions sealed them too
                continue
            if not _is_as_sealed(file, facts, is_read_whole=is_thorough or left >= 0):
                return str(file)
    except (UserError, OSError) as error:
        return f"{target} ({error})"
    return None


def check(path: Path, remedy: str, *, is_thorough: bool = False) -> None:
    """Raise a UserError with a remedy where a directory, or a file, is not what was sealed."""
    if (name := damage(path, is_thorough=is_thorough)) is not None:
        raise UserError(f"{name} is not what was written there: it is damaged. {remedy}")


def check_heads(place: Path) -> None:
    """Raise a UserError where the heads in a directory are not those that were saved."""
    check(
        place,
        "Restore it, or train the heads again. If it was changed on purpose, delete "
        f"{place / SEAL}, which has the sha256 of all files.",
    )


def verify(root: Path, run: Path) -> None:
    """Read every byte of a cache, and remove the entries that are damaged: they are made anew.

    And every byte of what a run has trained.

    Raises:
        UserError: that is damaged.
    """
    for place in (run / "heads", run / "backbone"):
        check(place, f"Restore it, or delete {place} and train again.", is_thorough=True)
    for kind in sorted(root.iterdir()) if root.is_dir() else ():
        for path in sorted(kind.iterdir()) if kind.is_dir() else ():
            if path.name.startswith("."):
                continue
            if (name := damage(path, is_thorough=True)) is not None:
                log.warning("%s is damaged: %s is removed, and is made anew", name, path)
                remove(path)


def seal_config(place: Path) -> None:
    """Have what Hydra has written of a call's config on the disk, and seal it.

    To be done before run.json says that there is a run: lost power leaves no run without a config.
    """
    if place.is_dir():
        sync(place)
        seal(place)


def check_config(run: Path) -> None:
    """Raise a UserError where the saved config of a run is not the one that it began with."""
    place = run / ".hydra"
    check(place, f"Restore it; if it was changed on purpose, delete {place / SEAL}.")


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file), "ends": _ends(file)}


def _is_as_sealed(file: Path, facts: dict[str, Any], *, is_read_whole: bool) -> bool:
    if not file.is_file() or file.stat().st_size != facts["bytes"]:
        return False
    if not is_read_whole:
        return bool(_ends(file) == facts["ends"])
    return bool(sha256_file(file) == facts["sha256"])


def _ends(path: Path) -> str:
    """Return the sha256 of a file's first and last bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_END))
        file.seek(max(0, size - _END))
        digest.update(file.read(_END))
    return digest.hexdigest()
