"""A path in; the chat files that it names, out."""

import logging
from glob import glob
from pathlib import Path

from medusa_exp.data.faults import DataError

log = logging.getLogger(__name__)

_SUFFIXES = tuple(
    f".{kind}{packed}"
    for kind in ("json", "jsonl", "ndjson", "parquet")
    for packed in ("", ".gz", ".zst")
)


def find_files(path: str | Path) -> list[Path]:
    """Return the file, the chat files of the folder at any depth, or what the glob matches.

    Raises:
        DataError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        # Hidden ones are caches and unfinished downloads.
        files = [
            p
            for p in sorted(place.rglob("*"))
            if p.is_file() and not any(n.startswith(".") for n in p.relative_to(place).parts)
        ]
        found = [p for p in files if p.name.lower().endswith(_SUFFIXES)]
        if passed_over := [str(p.relative_to(place)) for p in files if p not in found]:
            named = ", ".join(passed_over[:5]) + (" ..." if len(passed_over) > 5 else "")
            log.warning("data: %s: %d files passed over: %s", place, len(passed_over), named)
        if not found:
            raise DataError(
                f"{place} holds no *.json, *.jsonl, *.ndjson or *.parquet, plain or as .gz or .zst."
            )
        return found
    # Path.glob would need the pattern cut from its root.
    matches = glob(str(place), recursive=True)  # noqa: PTH207
    found = sorted(Path(match) for match in matches if Path(match).is_file())
    if not found:
        raise DataError(f"{place}: there is no such file, folder or match. Check dataset.path.")
    return found
