"""The upload of a W&B run while it is written: `logger.mode=online`.

W&B's own `wandb beta sync --live` does it, in a process of its own: what a dead network or server
does, it does to that process, while the run writes to its file and waits for nothing. (In W&B's
mode online, each table and artifact asks the server first, for 20 s where none answers, and is
lost.)

    python -m medusa_exp.tracking.upload RUN_FOLDER        ends when its standard input does
"""

import http.client
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

LOG = "upload.log"
"""What W&B said, in the run's folder."""
_LONGEST_WAIT = 600.0
_PATIENCE = 8.0
"""Seconds at the end without anything new: a server that answers with errors does so for ever."""
_START = 30.0
"""Seconds from its start that W&B's program has for its first word, on a busy machine. It comes
before any answer of the server, and of all but the shortest runs before the end."""
_BETWEEN_LOOKS = 1.0
_LOOK = 3.0
"""Seconds in which a server answers at all, or is taken for dead."""
_TO_END = 1.0
"""Seconds that W&B's program has to end by itself where it is told to."""
_ERROR = "ERROR"
"""In the lines of what went wrong, W&B's and ours."""
_RETRYING = "retrying"
"""In those of what W&B tries again: it may have gone well later."""


def require_login() -> None:
    """Ask for a key where a person can answer; no server is asked.

    Raises:
        UserError: there is no key, and nobody to ask.
    """
    import wandb

    # Else it asks the server who that is, for 5 s where none answers.
    wandb.setup(settings=wandb.Settings(x_disable_viewer=True, silent=True))
    try:
        wandb.login(verify=False)
    except wandb.errors.UsageError as error:
        raise UserError(
            f"logger.mode=online: {error} Run `wandb login`, or set logger.mode=offline and use "
            "`wandb sync` later."
        ) from error


class Upload:
    """The upload of the run in a folder, which has its .wandb file; it starts at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_cut_off, self._started = False, time.monotonic()
        environment = dict(os.environ)
        environment.pop("WANDB_SERVICE", None)  # else W&B's program joins this process' writer
        with (folder / LOG).open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(folder)],
                stdin=subprocess.PIPE,  # it closes with this process, however that ends
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run
            )

    def finish(self) -> None:
        """Wait while the upload goes on, and say what has arrived.

        Not at all where there is no way to the server; `_PATIENCE` where nothing new is uploaded.
        """
        try:
            self._wait()
        finally:
            self._end()
        said = self._said()
        lines = said.splitlines()
        url = re.search(r"View run at (\S+)", said)
        errors = [line for line in lines if _ERROR in line]
        final = [line for line in errors if _RETRYING not in line]
        # W&B's mark of a file that is uploaded to its end; its exit status is 0 in any case.
        if any(self.folder.glob("*.wandb.synced")) and not final:
            log.info("W&B: %s", url[1] if url else self.folder)
            return
        log.warning(
            "%s has reached W&B (%s); `wandb sync %s` uploads it",
            "not all" if url else "nothing",
            "no way to the server" if self._is_cut_off else (final or errors or lines or ["?"])[-1],
            self.folder,
        )

    def _wait(self) -> None:
        """Wait until all is uploaded, or nothing new has been said for too long."""
        begin = newest = time.monotonic()
        known: set[str] = set()
        while self._process.poll() is None:
            lines = set(self._said().splitlines())
            now = time.monotonic()
            if any(_ERROR not in line for line in lines - known):
                newest = now
            known |= lines
            last = newest + _PATIENCE
            if not known:
                last = max(last, self._started + _START)
            self._is_cut_off = not _is_reachable()
            if self._is_cut_off or now > min(last, begin + _LONGEST_WAIT):
                return
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_BETWEEN_LOOKS)

    def _end(self) -> None:
        try:
            self._process.communicate(timeout=3 * _TO_END)  # closes its standard input, and waits
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        return (self.folder / LOG).read_text(encoding="utf-8", errors="replace").strip()


def _is_reachable() -> bool:
    """Does the server answer, with whatever it may be?"""
    import wandb

    url = wandb.setup().settings.base_url
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=_LOOK).close()
        except urllib.error.HTTPError:
            pass  # somebody answered
        except (OSError, http.client.HTTPException):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_LOOK)  # a head that drips in keeps to every timeout of sockets
    return answered.is_set()


def main(folder: str) -> None:
    """Be W&B's program until it has uploaded all, or until whoever started this is gone.

    Its lines say how far it is and what the server answers, too.
    """
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    from wandb.cli.cli import cli
    from wandb.sdk.lib import progress

    progress.ProgressPrinter._to_static_text = _state  # private: wandb 0.31
    cli(["beta", "sync", "--live", "--yes", folder])


def _end_with(pipe: TextIO) -> None:
    """End this process when a pipe is closed: W&B's program has a moment to end by itself."""
    pipe.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TO_END)
    os._exit(1)


def _state(printer: Any, groups: Any) -> str:
    """Return what is being uploaded, how much of it, and with which trouble; at most so often."""
    now = time.monotonic()
    if now < getattr(printer, "next_line", 0.0):
        return ""
    printer.next_line = now + _BETWEEN_LOOKS
    operations = [o for group in groups for o in group.operations]
    for operation in operations:
        operations.extend(operation.subtasks)
    return "; ".join(
        f"{o.desc} {o.progress}".rstrip()
        + (f" {_ERROR} {o.error_status}" if o.error_status else "")
        for o in operations
    )


if __name__ == "__main__":
    main(sys.argv[1])
