"""Launch a training alone, with torchrun or on Ray, and map work over Ray workers.

    train.strategy=ddp, fsdp                          `train_in_processes`, on this machine
    train.strategy=ray                                `train_on_ray`, on the machines of a cluster
    regenerate.workers, train.feature_workers         `map_on_ray`

A training's processes are equal: each loads what it needs by the config, as a training of one
process does, and the first alone writes. The command starts them itself, so that the process that a
user starts is alone, whatever its environment says: `be_alone`. Ray looks for a cluster where
RAY_ADDRESS says, or makes one of this machine.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

from medusa_exp.config import TrainConfig
from medusa_exp.errors import Stopped, UserError
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.locks import locked
from medusa_exp.runs.record import Notes

log = logging.getLogger(__name__)

Worker = Callable[[dict[str, Any], Path, Notes], dict[str, float]]
"""Trains in this process, alone or as one of several: takes the config as a dict, the run directory
and what to note in, and returns the metrics."""
_ALIVE = "alive.lock"
"""Beside the job of torchrun's processes; the stage holds it for as long as it waits."""
_RANKS = (
    "RANK LOCAL_RANK NODE_RANK GROUP_RANK SLURM_PROCID SLURM_LOCALID OMPI_COMM_WORLD_RANK PMI_RANK "
    "JSM_NAMESPACE_RANK"
).split()
_SIZES = "WORLD_SIZE OMPI_COMM_WORLD_SIZE PMI_SIZE JSM_NAMESPACE_SIZE SLURM_STEP_NUM_TASKS".split()
"""Variables of a launcher's processes alone: SLURM_NTASKS stands in an allocation's shell too."""


def be_alone() -> None:
    """Make this process the only one; say so where its environment says otherwise.

    Pods of a training operator, shells inside torchrun, interactive allocations of SLURM and
    leftovers of other jobs all set ranks; libraries believe them, and would leave all writing to a
    first process that does not exist.
    """
    from lightning.pytorch.utilities import rank_zero_only

    said = [f"{name}={os.environ[name]}" for name in _RANKS if _number(name) > 0]
    said += [
        f"{name}={os.environ[name]}" for name in [*_SIZES, "SLURM_NTASKS"] if _number(name) > 1
    ]
    if said:
        log.info("one device is one process: %s of the environment is ignored", ", ".join(said))
    rank_zero_only.rank = 0


def refuse_other_launchers(devices: int) -> None:
    """Let no launcher's processes each start `devices` more.

    Raises:
        UserError: this is one of several; naming the launcher's variable.
    """
    for name in _SIZES:
        if _number(name) > 1:
            raise UserError(
                f"train.devices={devices}: the command starts its processes itself, and a launcher "
                f"says that this is one of several already ({name}={os.environ[name]}). Start it "
                f"once, without torchrun, srun or mpirun; where {name} is left over from another "
                f"job, unset it: env -u {name} python -m medusa_exp ..."
            )


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


@dataclass(frozen=True)
class Job:
    """A training that other processes make; the first of them gives its metrics and notes."""

    config: dict[str, Any]
    """Config of the run, as `config.to_dict` gives it."""
    out: Path
    """Its directory."""
    settings: TrainConfig
    """The section `train` of the config."""
    notes: Notes
    """Get those of the first process."""


def train_in_processes(module: str, job: Job) -> dict[str, float]:
    """Train in `train.devices` processes, which torchrun starts and ends all where one fails.

    SIGTERM is passed on to them, SIGUSR1 as SIGTERM, SIGINT reaches them by itself: they write a
    checkpoint and end. They do so too where this process is killed. `module`, which torchrun runs
    as a program, calls `main`.

    Raises:
        UserError: as the training itself, or that a process died.
        Stopped: SIGTERM or SIGINT came.
    """
    with tempfile.TemporaryDirectory(prefix="medusa_exp-") as name:
        path, result = Path(name) / "job.json", Path(name) / "result.json"
        write_json(path, {"config": job.config, "out": str(job.out), "result": str(result)})
        command = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", str(job.settings.devices)),
            *("-m", module, str(path)),
        ]
        with locked(Path(name) / _ALIVE):
            code, number = _wait(subprocess.Popen(command))
        found = read_json(result, {})
    if number is not None:  # their own message is there, unless it came before they listened
        plain = (
            f"training was stopped by {signal.Signals(number).name}: the same command with the "
            "same run_dir goes on."
        )
        raise Stopped(found.get("error", plain), number)
    if not found or (code and "error" not in found):
        raise UserError(
            f"train.strategy={job.settings.strategy}: a process of the training died (torchrun "
            f"gave {code}): what it said stands above. Where it was killed for memory, lower "
            "train.batch_tokens."
        )
    return _take(found, job.notes)


def main(worker: Worker, job_path: str) -> None:
    """Train as one of torchrun's processes, and leave the result if it is the first."""
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from medusa_exp.tracking.terminal import quiet_libraries

    is_first = rank_zero_only.rank == 0
    level = logging.INFO if is_first else logging.ERROR
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=level)
    quiet_libraries(["train"])
    _end_with_stage(Path(job_path).with_name(_ALIVE))
    job = json.loads(Path(job_path).read_text())
    if job["config"]["device"] != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # torchrun's word
    found = _attempt(worker, job)
    if is_first or "error" in found:
        write_json(Path(job["result"]), found)
    sys.exit(int("error" in found))


def _attempt(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """Return what a worker has found, or the error that it ended with."""
    notes = Notes()
    try:
        metrics = worker(job["config"], Path(job["out"]), notes)
    except UserError as error:
        return {"error": str(error)}
    return {"metrics": metrics, "notes": notes.to_dict()}


def _take(found: dict[str, Any], notes: Notes) -> dict[str, float]:
    if "error" in found:
        raise UserError(found["error"])
    notes.merge(found["notes"])
    return dict(found["metrics"])


def _wait(process: "subprocess.Popen[bytes]") -> tuple[int, int | None]:
    """Return the process' exit code, and the last signal that came meanwhile."""
    stopped_by: int | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = number
        process.send_signal(signal.SIGTERM)  # torchrun knows no other

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        while True:
            try:
                return process.wait(), stopped_by
            except KeyboardInterrupt:  # theirs too: they write a checkpoint and end
                stopped_by = signal.SIGINT
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        process.kill()


def _end_with_stage(lock: Path) -> None:
    """End this process, by SIGTERM, when the stage that started it is killed and gives up its lock.

    It would go on, and write into a run directory in which others may train by then.
    """

    def watch() -> None:
        with locked(lock, poll_interval=0.5, what=None):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def train_on_ray(worker: Worker, job: Job, *, use_gpu: bool) -> dict[str, float]:
    """Train in `train.devices` workers that Ray Train places, a GPU or a core each.

    Where one is lost, all start again from the run directory's last checkpoint, which therefore
    lies on a disk that all share.

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
    settings, out = job.settings, job.out
    if settings.resume == "never":  # once, and not after each loss of a worker
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    folder = (out / "ray").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    for_worker = {
        "config": job.config | {"train": job.config["train"] | {"resume": "auto"}},
        "out": str(out.absolute()),
        "result": str(folder / "result.json"),
        "directory": str(Path.cwd()),
        "worker": worker,
    }
    trainer = TorchTrainer(
        _train_as_ray_worker,
        train_loop_config=for_worker,
        scaling_config=ScalingConfig(num_workers=settings.devices, use_gpu=use_gpu),
        run_config=RunConfig(
            name=out.name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )
    try:
        with _ray_cluster():
            trainer.fit()
    except Exception as error:  # Ray's own, of several kinds: all say that the training is lost
        raise UserError(
            f"train.strategy=ray: the training failed, and {out / 'checkpoints'} has what there is "
            f"of it. The same command with the same run_dir goes on. Ray said: {error}"
        ) from error
    found = read_json(folder / "result.json", {})
    shutil.rmtree(folder, ignore_errors=True)
    return _take(found, job.notes)


def _train_as_ray_worker(job: dict[str, Any]) -> None:
    """Train as one of Ray's workers, and leave the result if it is the first."""
    from lightning.pytorch.utilities import rank_zero_only
    from ray.train import get_context

    from medusa_exp.tracking.terminal import quiet_libraries

    os.chdir(job["directory"])  # paths of the config may be relative
    result = Path(job["result"])
    if result.is_file():  # somebody has found what no further try will mend
        return
    rank_zero_only.rank = get_context().get_world_rank()
    quiet_libraries(["train"])
    found = _attempt(job["worker"], job)
    if rank_zero_only.rank == 0 or "error" in found:
        write_json(result, found)
    if "error" in found:
        raise UserError(found["error"])


def ray_parts(*, find_unused_parameters: bool) -> tuple[Any, Any]:
    """Return Lightning's strategy and cluster environment for a worker of Ray Train."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    strategy = RayDDPStrategy(find_unused_parameters=find_unused_parameters)
    return strategy, RayLightningEnvironment()


def map_on_ray(
    make: Callable[[], Callable[[Any], Any]],
    items: Iterable[Any],
    *,
    num_workers: int,
    use_gpu: bool,
) -> Iterator[Any]:
    """Yield what `make()` returns for each item, in the order in which they are done.

    Each worker calls `make` once (it may load a model, on a GPU of its own where there is one), and
    is given item after item. Items and results are plain values, which go as JSON.

    Raises:
        UserError: Ray is not installed, or what the work raises.
    """
    try:
        import ray.data
    except ImportError as error:
        raise UserError(f"Ray Data is needed: pip install 'medusa-exp[ray]' ({error}).") from error

    with _ray_cluster():
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller has one
        context.execution_options.verbose_progress = False
        rows = [{"item": json.dumps(item)} for item in items]
        # An item a block: what is done is written down item by item.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        done = dataset.map(
            _MapWorker,
            fn_constructor_args=(make, str(Path.cwd())),
            concurrency=num_workers,
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            yield json.loads(row["found"])


class _MapWorker:
    """Makes what it works with at its first item: an error on the way then is an item's result."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], directory: str) -> None:
        os.chdir(directory)  # paths of the config may be relative
        self._make = make

    @cached_property
    def work(self) -> Callable[[Any], Any]:
        return self._make()

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            return {"found": json.dumps(self.work(json.loads(row["item"]))), "error": ""}
        except UserError as error:
            return {"found": "", "error": str(error)}


@contextmanager
def _ray_cluster() -> Iterator[None]:
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
