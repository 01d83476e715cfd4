"""Seals: the sha256 of files, written beside them, by which damage is found before it does harm.

`sha256.json` in a directory names its files; that of a lone file is a hidden sibling of it. What
has no seal, as older versions wrote, is taken as it is. A file of more than a GiB is looked at in
full only when it is asked for (`cache.verify=true`); else at its length and its two ends, where
formats say what is in between. (sha256 takes about a second for a GB.)
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, remove, sha256_file, sync, write_json
from medusa_exp.runs.schemas import SEAL, seal_beside

log = logging.getLogger(__name__)

_LARGE, _END = 1 << 30, 1 << 20


def seal(place: Path, path: Path | None = None) -> None:
    """Write the seal of a directory, or of a file that lies at `place` and is to be at `path`."""
    if place.is_dir():
        files = {str(file.relative_to(place)): file for file in sorted(place.rglob("*"))}
        target = place / SEAL
    else:
        path = path or place
        files, target = {path.name: place}, path.with_name(seal_beside(path.name))
    facts = {name: _facts(file) for name, file in files.items() if file.is_file() and name != SEAL}
    write_json(target, {"files": facts})


def damage(path: Path, *, is_thorough: bool = False) -> str | None:
    """Return in which of its files a directory, or a file, is not what was sealed; None for none.

    Args:
        path: of the directory or file.
        is_thorough: read large files too.
    """
    folder = path if path.is_dir() else path.parent
    target = folder / (SEAL if path.is_dir() else seal_beside(path.name))
    try:
        sealed = read_json(target, {"files": {}})["files"]
        for name, facts in sealed.items():
            if not _is_as_sealed(folder / name, facts, is_thorough=is_thorough):
                return str(folder / name)
    except (UserError, OSError) as error:
        return f"{target} ({error})"
    return None


def check(path: Path, remedy: str) -> None:
    """Raise a UserError with a remedy where a directory, or a file, is not what was sealed."""
    if (name := damage(path)) is not None:
        raise UserError(f"{name} is not what was written there: it is damaged. {remedy}")


def verify(root: Path) -> None:
    """Read every byte of a cache, and remove the entries that are damaged: they are made anew."""
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


def _is_as_sealed(file: Path, facts: dict[str, Any], *, is_thorough: bool) -> bool:
    if not file.is_file() or file.stat().st_size != facts["bytes"]:
        return False
    if facts["bytes"] > _LARGE and not is_thorough:
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
