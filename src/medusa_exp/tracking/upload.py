"""The upload of a W&B run while it is written: `logger.mode=online`.

W&B's own `wandb beta sync --live` does it, in a process of its own: what a dead network or server
does, it does to that process, while the run writes to its file and waits for nothing. (In W&B's
mode online, each table and artifact asks the server first, for 20 s where none answers, and is
lost.)

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
        """Wait until all is uploaded; not at all where there is no way to the server."""
        deadline = time.monotonic() + _LONGEST_WAIT
        try:
            while self._process.poll() is None and _is_reachable() and time.monotonic() < deadline:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_BETWEEN_LOOKS)
        finally:
            self._process.communicate()  # closes its standard input, and waits
        said = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").strip()
        url = re.search(r"View run at (\S+)", said)
        if self._process.returncode == 0:
            log.info("W&B: %s", url[1] if url else self.folder)
        else:
            log.warning(
                "not all has reached W&B (%s); `wandb sync %s` uploads it",
                said.splitlines()[-1] if said else "no answer",
                self.folder,
            )


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
