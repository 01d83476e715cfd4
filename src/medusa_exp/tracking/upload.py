"""An offline W&B run uploaded while it is written: `logger.mode=online`.

W&B's own `wandb beta sync --live` does it, in a process of its own. What the network or the server
does, it does to that process: the run writes to its file and waits for nothing. (In W&B's mode
online, each table and artifact asks the server first, for 20 s where none answers, and is lost.)

    python -m medusa_exp.tracking.upload RUN_FOLDER        ends when its standard input does
"""

import logging
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from medusa_exp.errors import UserError

log = logging.getLogger(__name__)

LOG = "upload.log"
"""What W&B said, in the run's folder."""
_LONGEST_WAIT = 600.0
_BETWEEN_LOOKS = 3.0
_PATIENCE = 1.0
"""Seconds that W&B's program has to end by itself where it is told to."""


class Upload:
    """The upload of one run."""

    def __init__(self, folder: Path) -> None:
        """Start it.

        Args:
            folder: of the run, with its .wandb file.
        """
        self.folder = folder
        command = [sys.executable, "-m", __name__, str(folder)]
        environment = dict(os.environ)
        environment.pop("WANDB_SERVICE", None)  # else W&B's program joins this process' writer
        with (folder / LOG).open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # it closes with this process, however that ends
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run
            )

    def finish(self) -> None:
        """Wait until all is uploaded; not at all where there is no way to the server."""
        deadline = time.monotonic() + _LONGEST_WAIT
        try:
            while self._process.poll() is None and _is_reachable():
                if time.monotonic() > deadline:
                    break
                self._look()
        finally:
            self._end()
        text = (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        url = re.search(r"View run at (\S+)", text)
        if self._process.returncode == 0:
            log.info("W&B: %s", url[1] if url else self.folder)
        else:
            log.warning(
                "not all has reached W&B (%s); `wandb sync %s` uploads it",
                (text.strip().splitlines() or ["no answer"])[-1],
                self.folder,
            )

    def _look(self) -> None:
        try:
            self._process.wait(_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            return

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


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


def _is_reachable() -> bool:
    import wandb

    try:
        urllib.request.urlopen(wandb.setup().settings.base_url, timeout=3).close()
    except urllib.error.HTTPError:
        return True  # somebody answered
    except OSError:
        return False
    return True


def main(folder: str) -> None:
    """Run W&B's program until it has uploaded all, or until whoever started this is gone."""
    command = [sys.executable, "-m", "wandb", "beta", "sync", "--live", "--yes", folder]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end_with_stdin() -> None:
        sys.stdin.read()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        process.kill()

    threading.Thread(target=end_with_stdin, daemon=True).start()
    sys.exit(process.wait())


if __name__ == "__main__":
    main(*sys.argv[1:])
