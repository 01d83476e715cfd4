"""Which process wrote something, and whether it is still there: names of processes in files."""

import hashlib
import os
import platform
import uuid
from functools import cache
from pathlib import Path

_NAMES_OF_MACHINE = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id")


def this_process() -> str:
    """Name this process, for `is_process_alive`."""
    return f"{_machine()}-{os.getpid()}"


def is_process_alive(name: str) -> bool | None:
    """Say whether a process is still there that `this_process` has named; None if it is not known.

    Of processes on other machines it is never known.
    """
    machine, _, number = name.partition("-")
    if machine != _machine() or not number.isdecimal() or len(number) >= 10:
        return None
    import psutil  # os.kill ends the process that it asks for, on Windows

    return bool(psutil.pid_exists(int(number)))


@cache
def _machine() -> str:
    """Name where process numbers mean what they mean here: a boot of a machine, a container on it.

    Host names and numbers of namespaces alone are the same on many.
    """
    known = [path.read_text() for path in map(Path, _NAMES_OF_MACHINE) if path.is_file()]
    spaces = Path("/proc/self/ns/pid")
    space = str(spaces.readlink()) if spaces.exists() else ""
    # Where there is no file: in a container without tools it is another number in each process.
    hardware = [] if known else [f"{uuid.getnode()}"]
    text = " ".join([platform.node(), space, *known, *hardware])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
