"""One training in several processes, each on a device of its own: `train.strategy=ddp`, `fsdp`.

torchrun starts them, on this machine, and ends all where one fails. Each is the stage's module,
run as a program: it loads what it needs by the config, as a training of one process does; the
first alone writes. The stage that started them waits for the file that the first one leaves, and
where it is killed, they write a checkpoint and end.

    torchrun ... -m medusa_exp.stages.train CONFIG_JSON RUN_DIR RESULT_JSON

One training on the machines of a Ray cluster, Lightning inside: `train.strategy=ray`.

Ray Train places `train.devices` workers, a GPU or a core each, and starts all of them anew where
one is lost; they go on from the run directory's last checkpoint, which therefore lies on a disk
that all share. Ray looks for a cluster where RAY_ADDRESS says, or makes one of this machine.

Work on many items in processes of a Ray cluster, by Ray Data.

For `regenerate.workers` and `train.feature_workers`.

Every worker makes what it works with once (a model, on a GPU of its own where there is one) and is
given item after item. Ray looks for a cluster where RAY_ADDRESS says, or makes one of this machine.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock

from medusa_exp.config import Config, from_dict, to_dict
from medusa_exp.errors import Stopped, UserError
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.record import Notes

Train = Callable[[Config, Path, Notes], dict[str, float]]
"""Trains in this process, alone or as one of several, and returns the metrics."""
_ALIVE = "alive.lock"
"""Beside the config; the stage holds it for as long as it waits."""


def train_in_processes(config: Config, out: Path, notes: Notes, module: str) -> dict[str, float]:
    """Run the training in `train.devices` processes; return the metrics of the first.

    Args:
        config: of the run.
        out: its directory.
        notes: get those of the first process.
        module: that torchrun starts; it calls `main`.

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
            *("-m", module, str(saved), str(out), str(result)),
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
    notes.merge(found["notes"])
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


def main(train: Train, config_path: str, out: str, result: str) -> None:
    """Train as one of several processes, and leave the result if it is the first."""
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from medusa_exp.tracking.terminal import quiet_libraries

    logging.basicConfig(
        format="[%(asctime)s] %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if rank_zero_only.rank == 0 else logging.ERROR,
    )
    quiet_libraries(["train"])
    _end_with_stage(Path(config_path).with_name(_ALIVE))
    config = from_dict(json.loads(Path(config_path).read_text()))
    if config.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # torchrun's word
    found: dict[str, Any] = {}
    code = 0
    notes = Notes()
    try:
        found = {"metrics": train(config, Path(out), notes), "notes": notes.to_dict()}
    except UserError as error:
        found, code = {"error": str(error)}, 1
    if rank_zero_only.rank == 0 or code:
        write_json(Path(result), found)
    sys.exit(code)


_RESULT = "result.json"


def train_on_ray(config: Config, out: Path, notes: Notes, train: Train) -> dict[str, float]:
    """Run the training in `train.devices` workers; return the metrics of the first.

    Raises:
        UserError: as the training itself; Ray is not installed; or more workers were lost than
            `train.max_failures` allows.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UserError(
            f"train.strategy=ray needs Ray Train: pip install 'medusa-exp[ray]' ({error})."
        ) from error
    from medusa_exp.model.loading import pick_device

    if config.train.resume == "never":  # once, and not after each loss of a worker
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    folder = (out / "ray").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    trainer = TorchTrainer(
        _train_as_worker,
        train_loop_config={
            "config": to_dict(config),
            "out": str(out.absolute()),
            "result": str(folder / _RESULT),
            "directory": str(Path.cwd()),
            "train": train,
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.devices,
            use_gpu=pick_device(config.device).type == "cuda",
        ),
        run_config=RunConfig(
            name=out.name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    try:
        with ray_cluster():
            trainer.fit()
    except Exception as error:  # Ray's own, of several kinds: all say that the training is lost
        raise UserError(
            f"train.strategy=ray: the training failed, and {out / 'checkpoints'} has what there is "
            f"of it. The same command with the same run_dir goes on. Ray said: {error}"
        ) from error
    found = read_json(folder / _RESULT, {})
    shutil.rmtree(folder, ignore_errors=True)
    if "error" in found:
        raise UserError(found["error"])
    notes.merge(found["notes"])
    return dict(found["metrics"])


def _train_as_worker(job: dict[str, Any]) -> None:
    """Train as one of several workers, and leave the result if it is the first."""
    from lightning.pytorch.utilities import rank_zero_only
    from ray.train import get_context

    from medusa_exp.tracking.terminal import quiet_libraries

    os.chdir(job["directory"])  # paths of the config may be relative
    result = Path(job["result"])
    if result.is_file():  # somebody has found what no further try will mend
        return
    rank_zero_only.rank = get_context().get_world_rank()
    quiet_libraries(["train"])
    config = from_dict(job["config"])
    config.train.resume = "auto"
    found: dict[str, Any] = {}
    notes = Notes()
    try:
        metrics = job["train"](config, Path(job["out"]), notes)
        found = {"metrics": metrics, "notes": notes.to_dict()}
    except UserError as error:
        found = {"error": str(error)}
        write_json(result, found)
        raise
    if rank_zero_only.rank == 0:
        write_json(result, found)


def ray_parts(*, find_unused_parameters: bool) -> tuple[Any, Any]:
    """Return Lightning's strategy and cluster environment for a worker of Ray Train."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    strategy = RayDDPStrategy(find_unused_parameters=find_unused_parameters)
    return strategy, RayLightningEnvironment()


Work = Callable[[str], str]


def map_on_ray(
    make: Callable[..., Work],
    arguments: dict[str, Any],
    items: Sequence[str],
    *,
    num_workers: int,
    use_gpu: bool,
) -> Iterator[str]:
    """Yield what `make(**arguments)` returns for each item, in the order in which they are done.

    Raises:
        UserError: Ray is not installed, or what the work raises.
    """
    try:
        import ray.data
    except ImportError as error:
        raise UserError(f"Ray Data is needed: pip install 'medusa-exp[ray]' ({error}).") from error

    with ray_cluster():
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller has one
        context.execution_options.verbose_progress = False
        # An item a block: what is done is written down item by item.
        dataset = ray.data.from_items([{"item": i} for i in items], override_num_blocks=len(items))
        done = dataset.map(
            _Worker,
            fn_constructor_args=(make, arguments, str(Path.cwd())),
            concurrency=num_workers,
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield row["result"]


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Be connected to Ray: as before, or for so long."""
    import ray

    if ray.is_initialized():  # by a launcher, or by the caller
        yield
        return
    ray.init(include_dashboard=False)
    try:
        yield
    finally:
        ray.shutdown()


class _Worker:
    """Makes what it works with at its first item: an error on the way then is an item's result."""

    def __init__(self, make: Callable[..., Work], arguments: dict[str, Any], where: str) -> None:
        os.chdir(where)  # paths of the config may be relative
        self._make = partial(make, **arguments)

    @cached_property
    def work(self) -> Work:
        return self._make()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            return {"result": self.work(row["item"]), "error": ""}
        except UserError as error:
            return {"result": "", "error": str(error)}
