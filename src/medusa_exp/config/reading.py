"""Read small files that anybody may have made: regular ones alone, of a size, YAML not expanded.

A pipe would never end, a device would never be read to its end, and a few lines of YAML with
aliases stand for more values than there is memory.
"""

import os
import stat
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from medusa_exp.errors import UserError

MOST_VALUES = 5_000
"""Of a config, keys included: an experiment has two hundred, and a tree of 256 nodes a thousand."""
_MOST_BYTES = 1 << 20
_MOST_REFERENCES = 1 << 13
"""Characters of all values with `${...}` in them: OmegaConf parses some thousand in a second."""
_DEEPEST = 50
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_regular(path: Path) -> None:
    """Look whether a path is that of a file on a disk, without opening it.

    Raises:
        UserError: it is a pipe, a device, a socket or a directory; or nothing.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Restore it.") from error
    for is_one, what in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if is_one(mode):
            raise UserError(f"{path} is {what}, and a file should be there: restore it.")


def read_bytes(path: Path, most: int = _MOST_BYTES) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        UserError: as `check_regular`; or it cannot be read, or is larger.
    """
    check_regular(path)
    try:
        # Not by its name again: what is opened may be another file since, and must not block.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}. Restore it.") from error
    if len(content) > most:
        size = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most >> 10} KiB"
        raise UserError(f"{path} is larger than {size}: it is not what should be there.")
    return content


def read_yaml_text(path: Path, *, aliases: bool = True) -> str:
    """Read the text of a YAML file, and count what it stands for before anything is made of it.

    Args:
        path: of the file.
        aliases: may there be any? `*name` stands for all that `&name` marks.

    Raises:
        UserError: as `read_bytes`; it is no YAML, nests too deeply, or stands for too many values.
    """
    content = read_bytes(path)
    try:
        text = content.decode()
        number, has_aliases = _count(text)
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path} cannot be read: {said}. Restore it.") from error
    if has_aliases and not aliases:
        raise UserError(f"{path} has YAML aliases (*name): no run has saved it.")
    if number > MOST_VALUES:
        raise UserError(
            f"{path} stands for more than {MOST_VALUES:,} values, or nests more than {_DEEPEST} "
            "levels deep: no config does."
        )
    return text


def _count(text: str) -> tuple[int, bool]:
    """Return how many values YAML stands for, at least, and whether any is an alias.

    By its events, which are as long as the text: a sum for each open collection.
    """
    open_ones: list[tuple[str | None, int]] = []
    marked: dict[str | None, int] = {}
    has_aliases, total, referring = False, 0, 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            marked[anchor] = total - before + 1
        elif isinstance(event, yaml.AliasEvent):
            has_aliases = True
            # One within what it marks stands for it without end.
            total += marked.get(event.anchor, MOST_VALUES)
            continue
        elif isinstance(event, yaml.ScalarEvent):
            marked[event.anchor] = 1
            referring += len(event.value) if "${" in event.value else 0
            if referring > _MOST_REFERENCES:
                raise ValueError("its values with ${...} are longer than any config's")
        else:
            continue
        total += 1
        if total > MOST_VALUES or len(open_ones) > _DEEPEST:
            return MOST_VALUES + 1, has_aliases
    return total, has_aliases
