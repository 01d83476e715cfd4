"""One training in several processes, each on a device of its own: `train.strategy=ddp`, `fsdp`.

torchrun starts them, on this machine, and ends all where one fails. Each is this module run as a
program: it loads what it needs by the config, as a training of one process does; the first alone
writes. The stage that started them waits for the file that the first one leaves, and where it is
killed, they write a checkpoint and end.

    torchrun ... -m medusa_exp.train.launch CONFIG_JSON RUN_DIR RESULT_JSON
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock
from omegaconf import OmegaConf

from medusa_exp.config import Config, from_hydra, to_dict
from medusa_exp.errors import Stopped, UserError
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.record import annotate, collect

_ALIVE = "alive.lock"
"""Beside the config; the stage holds it for as long as it waits."""


def train_in_processes(config: Config, out: Path) -> dict[str, float]:
    """Run the training in `train.devices` processes; return the metrics of the first.

    SIGTERM is passed on to them; SIGINT reaches them by itself.

    Raises:
        UserError: as the training itself, or that a process died.
        Stopped: SIGTERM or SIGINT came.
    """
    with tempfile.TemporaryDirectory(prefix="medusa_exp-") as name:
        saved, result = Path(name) / "config.json", Path(name) / "result.json"
        write_json(saved, to_dict(config))
        alive = FileLock(Path(name) / _ALIVE)
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", str(config.train.devices)),
            *("-m", __name__, str(saved), str(out), str(result)),
        ]
        with alive:
            code, number = _wait(subprocess.Popen(command))
        found = read_json(result, {})
    if number is not None:  # their own message is there, unless it came before they listened
        plain = (
            f"training was stopped by {signal.Signals(number).name}: the same command with the "
            "same run_dir goes on."
        )
        raise Stopped(found.get("error", plain), number)
    if "error" in found:
        raise UserError(found["error"])
    if code or "metrics" not in found:
        raise UserError(
            f"train.strategy={config.train.strategy}: a process of the training died (torchrun "
            f"gave {code}): what it said stands above. Where it was killed for memory, lower "
            "train.batch_tokens."
        )
    annotate(**found["notes"])
    return dict(found["metrics"])


def _wait(process: "subprocess.Popen[bytes]") -> tuple[int, int | None]:
    """Return the process' exit code, and the last signal that came meanwhile."""
    stopped_by: int | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = number
        process.send_signal(number)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        while True:
            try:
                return process.wait(), stopped_by
            except KeyboardInterrupt:  # theirs too: they write a checkpoint and end
                stopped_by = signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, previous)
        process.kill()


def _end_with_stage(lock: Path) -> None:
    """End this process, by SIGTERM, when the stage that started it is killed and gives up its lock.

    It would go on, and write into a run directory in which others may train by then.
    """

    def watch() -> None:
        FileLock(lock).acquire(poll_interval=0.5).lock.release()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(config_path: str, out: str, result: str) -> None:
    """Train as one of several processes, and leave the result if it is the first."""
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from medusa_exp.stages.train import train
    from medusa_exp.tracking.terminal import quiet_libraries

    logging.basicConfig(
        format="[%(asctime)s] %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if rank_zero_only.rank == 0 else logging.ERROR,
    )
    quiet_libraries(["train"])
    _end_with_stage(Path(config_path).with_name(_ALIVE))
    config = from_hydra(OmegaConf.create(json.loads(Path(config_path).read_text())))
    if config.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # torchrun's word
    found: dict[str, Any] = {}
    code = 0
    with collect() as notes:
        try:
            found = {"metrics": train(config, Path(out)), "notes": notes}
        except UserError as error:
            found, code = {"error": str(error)}, 1
    if rank_zero_only.rank == 0 or code:
        write_json(Path(result), found)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
